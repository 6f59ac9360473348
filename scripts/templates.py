"""The template workflows that make_workflows.py builds: columns of nodes, from left to right."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flexip_core import mini  # noqa: E402

NARROW, WIDE, RESULT = 320, 400, 480  # of a column
NOTE_COLORS = ("#432", "#653")
FILES = """
| file | folder |
| --- | --- |
| SD1.5 or SDXL checkpoint | models/checkpoints |
| FlexIP checkpoint for the same base | models/flexip |
| CLIP and DINOv2 image encoders that it asks for | models/clip_vision |

The file names here are those of the mini models that scripts/demo.py makes; they are **untrained** and draw coloured noise. Choose your own files in their place."""


@dataclass(eq=False)
class Node:
    """`inputs`: a wire is (node, output), everything else a widget's value. `tall` is the least height, for a preview."""

    kind: str
    inputs: dict[str, Any]
    title: str = ""
    tall: int = 0
    colors: tuple[str, str] | None = None

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


@dataclass(eq=False)
class Group:
    title: str
    nodes: list[Node]
    color: str = "#3f789e"


@dataclass(eq=False)
class Template:
    columns: list[tuple[int, list[Node]]]  # width, nodes from top to bottom
    groups: list[Group] = field(default_factory=list)


def node(kind: str, title: str = "", tall: int = 0, **inputs: Any) -> Node:
    return Node(kind, inputs, title, tall)


def note(title: str, text: str, tall: int = 430, files: str = FILES) -> Node:
    return Node("MarkdownNote", {"text": f"## {title}\n{text}\n{files}"}, "Read me", tall, NOTE_COLORS)


class Base:
    """What every template begins with."""

    def __init__(self) -> None:
        self.checkpoint = node("CheckpointLoaderSimple", ckpt_name=mini.MINI_BASE)
        self.adapters = node("LoadFlexIPAdapters", preservation=mini.MINI_FLEXIP)
        self.model, self.clip, self.vae = self.checkpoint[0], self.checkpoint[1], self.checkpoint[2]

    def picture(self, title: str = "Reference picture") -> Node:
        return node("LoadImage", title, 340, image="example.png")

    def encode(self, picture: tuple, title: str = "") -> Node:
        return node("EncodeReference", title, 350, adapters=self.adapters[0], image=picture)

    def prompt(self, text: Any, title: str = "Prompt", tall: int = 130) -> Node:
        return node("CLIPTextEncode", title, tall, clip=self.clip, text=text)

    def negative(self) -> Node:
        return self.prompt("blurry, low quality", "Negative prompt", 100)

    def apply(self, reference: tuple, title: str = "", tall: int = 480, **inputs: Any) -> Node:
        wires = {"model": self.model, "adapters": self.adapters[0], "reference": reference}
        return node("ApplyFlexIPGate", title, tall, **{**wires, **inputs})

    def result(self, latent: tuple, name: str, tall: int = 540) -> list[Node]:
        decode = node("VAEDecode", samples=latent, vae=self.vae)
        return [decode, node("SaveImage", tall=tall, images=decode[0], filename_prefix=f"FlexIP/{name}")]


def latent(batch_size: int = 1, size: int = 512) -> Node:
    return node("EmptyLatentImage", width=size, height=size, batch_size=batch_size)


def sampler(model: Node, positive: Node, negative: Node, latent: Node, kind: str = "KSampler", **inputs: Any) -> Node:
    wires = {"model": model[0], "positive": positive[0], "negative": negative[0], "latent_image": latent[0]}
    settings = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    return node(kind, **{**wires, **settings, "control_after_generate": "fixed", **inputs})


def style_over_time() -> Template:
    base = Base()
    picture, size = base.picture(), latent()
    prompt, negative = base.prompt("a portrait in a sunlit garden, oil painting"), base.negative()
    encode = base.encode(picture[0])
    steps = node("BasicScheduler", "Basic Scheduler (for the plot)", model=base.model, scheduler="karras", steps=20)
    schedule = node("FlexIPGateSchedule", "", 600, start=0.9, end=0.2, model=base.model, sigmas=steps[0])
    apply = base.apply(encode[0], gate_schedule=schedule[0])
    sample = sampler(apply, prompt, negative, size)
    read_me = note(
        "Style over time",
        "The first steps decide layout and identity, the last ones style and detail. Here the gate is 0.9 first, which "
        "keeps the subject, and 0.2 at the end, so that the prompt does the finish.\n\n"
        "**Turn** preset, start and end of *FlexIP Gate Schedule*. Its plot shows the gate of every step if *Basic "
        "Scheduler* has the scheduler, steps and denoise of *KSampler*; the sampling itself does not need these two wires.",
        400,
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, picture]),
            (NARROW, [prompt, negative, size, encode]),
            (WIDE, [steps, schedule]),  # nothing below: the new nodes are higher, they show the curve
            (NARROW, [apply, sample]),
            (RESULT, [*base.result(sample[0], "style_over_time", 460), read_me]),
        ],
        [Group("Gate over time", [steps, schedule])],
    )


def two_characters_by_mask() -> Template:
    base = Base()
    pictures = [base.picture("Character 1"), base.picture("Character 2")]
    references = [base.encode(picture[0]) for picture in pictures]
    black = node("SolidMask", "Black: the whole picture", value=0.0, width=512, height=512)
    white = node("SolidMask", "White: the left half", value=1.0, width=256, height=512)
    left = node("MaskComposite", "Left half", destination=black[0], source=white[0], x=0, y=0, operation="add")
    right = node("InvertMask", "Right half", mask=left[0])
    first = base.apply(references[0][0], "Apply FlexIP Gate: character 1", 280, mask=left[0], gate=0.7)
    second = base.apply(references[1][0], "Apply FlexIP Gate: character 2", model=first[0], mask=right[0], gate=0.7)
    prompt, negative = base.prompt("two friends in a sunlit garden, oil painting"), base.negative()
    size = latent()
    sample = sampler(second, prompt, negative, size)
    read_me = note(
        "Two characters by mask",
        "One *Apply FlexIP Gate* for each character, one after the other: with its own reference, its own gate, and a "
        "mask that is white where the character acts. A place that is black in both masks follows the prompt alone.\n\n"
        "**Choose** the two pictures, **turn** the gate of each. Masks may have any size: draw one with *Open in "
        "MaskEditor* on a *Load Image* in place of the halves.",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, read_me]),
            (NARROW, pictures),
            (NARROW, references),
            (NARROW, [black, white, left, right, prompt, negative]),
            (NARROW, [first, second]),
            (RESULT, [size, sample, *base.result(sample[0], "two_characters", 400)]),
        ],
        [Group("Masks", [black, white, left, right])],
    )


def image_to_image() -> Template:
    base = Base()
    picture, reference = base.picture("Picture to change"), base.picture("Reference picture")
    scale = node("ImageScale", image=picture[0], upscale_method="lanczos", width=512, height=512, crop="center")
    start = node("VAEEncode", pixels=scale[0], vae=base.vae)
    encode = base.encode(reference[0])
    prompt, negative = base.prompt("a portrait in a sunlit garden, oil painting"), base.negative()
    apply = base.apply(encode[0])
    sample = sampler(apply, prompt, negative, start, denoise=0.6)
    read_me = note(
        "Image to image with a reference",
        "The picture to change gives the layout, the reference the subject, the prompt the rest.\n\n"
        "**Turn** denoise of *KSampler* (lower keeps more of the picture to change) and gate of *Apply FlexIP Gate* (1 "
        "keeps the subject of the reference, 0 follows the prompt). With denoise 0.6 a gate schedule begins in its middle.",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, read_me]),
            (NARROW, [picture, reference]),
            (NARROW, [scale, start, encode]),
            (NARROW, [prompt, negative, apply]),
            (RESULT, [sample, *base.result(sample[0], "image_to_image", 420)]),
        ]
    )


def batch_of_references() -> Template:
    base = Base()
    pictures = [base.picture("Picture 1"), base.picture("Picture 2")]
    third = node(
        "ImageFlip", "Picture 3: picture 2, mirrored", image=pictures[1][0], flip_method="y-axis: horizontally"
    )
    batch = node("BatchImagesNode", **{"images.image0": pictures[1][0], "images.image1": third[0]})
    references = [base.encode(pictures[0][0]), base.encode(batch[0])]
    combine = node(
        "FlexIPCombineReferences",
        combine="one per batch item",
        **{f"references.reference_{number}": reference[0] for number, reference in enumerate(references)},
    )
    gates = node("FlexIPGateBatch", gates="0.9, 0.9, 0.9, 0.3, 0.3, 0.3", spread="repeat")
    size = latent(6)
    prompt, negative = base.prompt("a portrait in a sunlit garden, oil painting"), base.negative()
    apply = base.apply(combine[0], gate_schedule=gates[0])
    sample = sampler(apply, prompt, negative, size)
    read_me = note(
        "Batch of references",
        "Three pictures, six latents. *one per batch item* gives latent 1 picture 1, latent 2 picture 2, and so on, from "
        "the beginning again for latents 4 to 6. *FlexIP Gate Batch* gives the first three gate 0.9 (keep the subject) "
        "and the others 0.3 (follow the prompt).\n\n"
        "**Turn** combine (*average*: one blend of all), weights (one number per reference), gates and spread. A socket "
        "for another reference appears when the last one is wired.",
        490,
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, read_me]),
            (NARROW, [*pictures, third, batch]),
            (NARROW, references),
            (NARROW, [combine, gates, size, prompt, negative]),
            (NARROW, [apply, sample]),
            (RESULT, base.result(sample[0], "batch_of_references")),
        ],
        [Group("One for each latent", [combine, gates, size])],
    )


def scores_and_attention_maps() -> Template:
    base = Base()
    picture, size = base.picture(), latent()
    words = node("PrimitiveStringMultiline", "Prompt", 110, value="a portrait in a sunlit garden, oil painting")
    gates = node("PrimitiveString", "Gates", value="0, 0.25, 0.5, 0.75, 1")
    prompt, negative = base.prompt(words[0], "Prompt, encoded", 0), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    sample = sampler(apply, prompt, negative, size, "FlexIPSampler", gates=gates[0], vae=base.vae)
    sample.tall = 560
    decode = node("VAEDecode", samples=sample[0], vae=base.vae)
    score = node(
        "FlexIPScore",
        tall=780,
        images=decode[0],
        reference_image=picture[0],
        prompt=words[0],
        adapters=base.adapters[0],
        gates=gates[0],
    )
    report = node("PreviewAny", "Scores in words", 340, source=score[0])
    maps = node(
        "FlexIPAttentionMaps",
        tall=900,
        model=apply[0],
        positive=prompt[0],
        latent=sample[0],
        image=decode[0],
        clip=base.clip,
        prompt=words[0],
    )
    read_me = note(
        "Scores and attention maps",
        "One picture for each gate, from the same noise. *FlexIP Score* measures how near each is to the reference "
        "(CLIP-I, DINO-I) and to the prompt (CLIP-T, which needs a CLIP with its text tower), and plots it over the gate. "
        "*FlexIP Attention Maps* shows where in each picture the reference acts.\n\n"
        "**Turn** gates and prompt: both are used in three places and written once. show of the maps: *words* gives one "
        "map for each word of the prompt. Scores of the untrained mini models mean nothing.",
        500,
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, picture, size]),
            (NARROW, [words, prompt, negative, gates, encode]),
            (NARROW, [apply, read_me]),
            (RESULT, [sample, report]),
            (RESULT, [decode, score]),
            (RESULT, [maps]),
        ]
    )


def auto_gate() -> Template:
    base = Base()
    picture, size = base.picture(), latent()
    prompt, negative = base.prompt("a portrait in a sunlit garden, oil painting"), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    find = sampler(
        apply, prompt, negative, size, "FlexIPAutoGate", vae=base.vae, reference_image=picture[0], target=0.6, steps=8
    )
    find.tall = 700
    report = node("PreviewAny", "What it found", 280, source=find[3])
    sample = sampler(find, prompt, negative, size)
    read_me = note(
        "Auto gate",
        "*FlexIP Auto Gate* tries some gates in short runs, scores how much of the subject each keeps, and hands on the "
        "model with the smallest gate that reaches the target: as much freedom for the prompt as the identity allows.\n\n"
        "**Turn** target: 0 is what gate 0 gives, 1 the best that any gate gives. More noises and steps are slower and "
        "surer. Scores of the untrained mini models mean nothing.",
        470,
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, picture]),
            (NARROW, [prompt, negative, size, encode]),
            (NARROW, [apply, read_me]),
            (WIDE, [find, report]),
            (RESULT, [sample, *base.result(sample[0], "auto_gate", 420)]),
        ]
    )


def regional_prompts() -> Template:
    base = Base()
    pictures = [base.picture("Reference, left"), base.picture("Reference, right")]
    references = [base.encode(picture[0]) for picture in pictures]
    sides = []
    for side, text, x, gate, reference in (
        ("left", "a portrait in a sunlit garden, oil painting", 0.0, 0.8, references[0]),
        ("right", "a marble statue in a museum hall", 0.5, 0.3, references[1]),
    ):
        prompt = base.prompt(text, f"Prompt, {side}", 100)
        area = node(
            "ConditioningSetAreaPercentage", f"Area, {side}", conditioning=prompt[0], width=0.5, height=1.0, x=x, y=0.0
        )
        own = node("FlexIPConditioning", conditioning=area[0], reference=reference[0], gate=gate)
        sides.append([prompt, area, own])
    both = node("ConditioningCombine", conditioning_1=sides[0][2][0], conditioning_2=sides[1][2][0])
    negative, size = base.negative(), latent()
    apply = base.apply(references[0][0], tall=520)
    sample = sampler(apply, both, negative, size)
    read_me = note(
        "Regional prompts",
        "Each prompt has its own area, reference and gate: the left half keeps its subject (gate 0.8), the right half "
        "follows its prompt (gate 0.3). *Apply FlexIP Gate* must be on the model; its own reference and gate count for "
        "prompts that bring none.\n\n"
        "**Choose** the two pictures, **turn** gate of *FlexIP Conditioning* and the areas (parts of width and height).",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.adapters, read_me]),
            (NARROW, pictures),
            (NARROW, references),
            (NARROW, [*sides[0], *sides[1]]),
            (NARROW, [both, negative, apply, size]),
            (RESULT, [sample, *base.result(sample[0], "regional_prompts", 420)]),
        ],
        [Group("Left", sides[0]), Group("Right", sides[1], "#8a6d3b")],
    )


def demo_world() -> Template:
    demo = node("FlexIPDemoModels", "", 280)
    model, clip, vae, adapters, picture, words = (demo[output] for output in range(6))
    enlarged = node("ImageScaleBy", "Reference, enlarged", image=picture, upscale_method="nearest-exact", scale_by=4.0)
    shown = node("PreviewImage", "The subject", 340, images=enlarged[0])
    said = node("PreviewAny", "The prompt", 120, source=words)
    prompt = node("CLIPTextEncode", "Prompt: the subject elsewhere", clip=clip, text=words)
    negative = node("CLIPTextEncode", "Negative prompt", 80, clip=clip, text="")
    encode = node("EncodeReference", "", 350, adapters=adapters, image=picture)
    apply = node("ApplyFlexIPGate", "", 480, model=model, adapters=adapters, reference=encode[0])
    size = latent(3, 64)
    world = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    sample = sampler(apply, prompt, negative, size, "FlexIPSampler", gates="0, 0.25, 0.5, 0.75, 1", vae=vae, **world)
    save = node("SaveImage", "The contact sheet", 520, images=sample[1], filename_prefix="FlexIP/demo_world")
    read_me = note(
        "The demo world",
        "A small world that comes with the pack, **trained**: no file to download, seconds on a CPU. A subject is a shape "
        "in two colours, and the prompt does not name them: they come from the reference.\n\n"
        "At gate 1 the subject keeps its colours, at gate 0 only a rough idea of them is left; the prompt decides the "
        "ground and the corner everywhere.\n\n"
        "**Turn** subject of *FlexIP Demo Models* and gates of *FlexIP Sampler*. **Write** a prompt of your own in place "
        "of the wire: *a disc* alone leaves ground and corner open, and then gate 1 copies them from the reference, too. "
        "It knows disc, square, triangle, cross; sky, grass, sand, night, brick, snow; top left, top right, bottom left, "
        "bottom right.",
        420,
        "",
    )
    return Template(
        [
            (NARROW, [demo, read_me]),
            (NARROW, [enlarged, shown, said, encode]),
            (NARROW, [prompt, negative, size, apply]),
            (NARROW, [sample]),
            (2 * NARROW, [save]),
        ]
    )


TEMPLATES = {
    f"flexip_{make.__name__}": make
    for make in (
        demo_world,
        style_over_time,
        two_characters_by_mask,
        image_to_image,
        batch_of_references,
        scores_and_attention_maps,
        auto_gate,
        regional_prompts,
    )
}
