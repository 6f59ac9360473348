"""The template workflows that make_workflows.py builds: columns of nodes, from left to right."""

from __future__ import annotations

from template_parts import NARROW, RESULT, WIDE, Base, Demo, Files, Group, Node, Template, enlarged, node, note
from templates_ip_adapter import with_ip_adapter_sd15, with_ip_adapter_sdxl

DEMO = """
*FlexIP Demo Models* is a small **trained** world that comes with the pack: no file to download, pictures of 64 x 64 px.

**With your own files** *Load Checkpoint* and *Load FlexIP Adapters* take its place, *Load Image* that of its reference, and the latent gets 512 px or more."""
GATES = "0, 0.25, 0.5, 0.75, 1"
PORTRAIT = "a portrait in a sunlit garden, oil painting"


def basic() -> Template:
    base = Files()
    picture, size = base.picture(), base.latent()
    prompt, negative = base.prompt(PORTRAIT), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    sample = base.sampler(apply, prompt, negative, size)
    read_me = note(
        "One picture with a gate",
        "The reference picture is encoded once; *Apply FlexIP Gate* lets it act on the model.\n\n"
        "**Turn** gate of *Apply FlexIP Gate*: 1 keeps the subject of the reference, 0 follows the prompt. strength is how much "
        "the reference says at all.",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.loader, picture]),
            (NARROW, [prompt, negative, size, encode]),
            (NARROW, [apply, sample]),
            (RESULT, [*base.result(sample[0], "basic", 420), read_me]),
        ]
    )


def gate_sweep() -> Template:
    base = Files()
    picture, size = base.picture(), base.latent()
    prompt, negative = base.prompt(PORTRAIT), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    sample = base.sampler(apply, prompt, negative, size, "FlexIPSampler", gates=GATES, vae=base.vae)
    save = node("SaveImage", "Contact sheet", 330, images=sample[1], filename_prefix="flexip/gate_sweep")
    report = node("PreviewAny", "Report", 300, source=sample[2])
    read_me = note(
        "Gate sweep",
        "One picture for each gate, all from the same noise, side by side: it shows at once which gate suits a subject and a prompt.\n\n"
        "**Turn** gates of *FlexIP Sampler*; strengths of the same node adds a row for each strength. The gate of *Apply FlexIP "
        "Gate* counts only while gates is empty.",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.loader, picture]),
            (NARROW, [prompt, negative, size, encode]),
            (NARROW, [apply, read_me]),
            (NARROW, [sample]),
            (2 * NARROW, [save, report]),
        ]
    )


def demo_world() -> Template:
    base = Demo(7)
    large = enlarged(base.reference, "Reference, enlarged")
    shown = node("PreviewImage", "The subject", 340, images=large[0])
    said = node("PreviewAny", "The prompt", 120, source=base.words)
    prompt, negative = base.prompt(base.words, "Prompt: the subject elsewhere", 0), base.negative()
    encode = base.encode(base.reference)
    apply = base.apply(encode[0])
    size = base.latent(3)
    sample = base.sampler(apply, prompt, negative, size, "FlexIPSampler", gates=GATES, vae=base.vae, seed=6)
    save = node("SaveImage", "The contact sheet", 520, images=sample[1], filename_prefix="flexip/demo_world")
    read_me = note(
        "The demo world",
        "A small world that comes with the pack, **trained**: no file to download, seconds on a CPU. A subject is a shape "
        "in two colours. The prompt does not name them: they come from the reference.\n\n"
        "Here: five gates, three noises. At gate 1 all three discs have the colours of the reference, at gate 0 their "
        "lower half has another one. (Measured by the hues, where 1 is the reference: 0.4 at most with gate 0, 0.95 at least with "
        "gate 1.) The prompt decides ground and corner at every gate.\n\n"
        "**Turn** subject of *FlexIP Demo Models*, gates and seed of *FlexIP Sampler*. Subjects differ: over 24 of them "
        "gate 1 keeps the colours much better than gate 0, but with some noises gate 0 hits them by chance.\n\n"
        "**Write** a prompt of your own in place of the wire: *a disc* alone leaves ground and corner open. It knows disc, "
        "square, triangle, cross; sky, grass, sand, night, brick, snow; top left, top right, bottom left, bottom right.\n\n"
        "The world is made for latents of **64 x 64 px**. Up to 96 px it still works; in larger ones the subject falls apart.",
        660,
        "",
    )
    return Template(
        [
            (NARROW, [base.models, read_me]),
            (NARROW, [large, shown, said, encode]),
            (NARROW, [prompt, negative, size, apply]),
            (NARROW, [sample]),
            (2 * NARROW, [save]),
        ]
    )


def style_over_time() -> Template:
    base = Demo(7)
    size = base.latent()
    prompt, negative = base.prompt("a disc on night, bottom left"), base.negative()
    encode = base.encode(base.reference)
    steps = node("BasicScheduler", "Basic Scheduler (for the plot)", model=base.model, scheduler="normal", steps=20)
    schedule = node("FlexIPGateSchedule", "", 840, start=0.9, end=0.2, model=base.model, sigmas=steps[0])
    apply = base.apply(encode[0], gate_schedule=schedule[0])
    sample = base.sampler(apply, prompt, negative, size, seed=6)
    read_me = note(
        "Style over time",
        "The first steps decide layout and identity, the last ones style and detail. Here the gate is 0.9 first, which "
        "keeps the subject, and 0.2 at the end, so that the prompt does the finish. The colours of the reference, which the "
        "prompt does not name, stay.\n\n"
        "**Turn** preset, start and end of *FlexIP Gate Schedule*: with *linear* and 0 for both they go. Its plot "
        "shows the gate of every step if *Basic Scheduler* has the scheduler, steps and denoise of *KSampler*; the sampling "
        "itself does not need these two wires.",
        tall=430,
        files=DEMO,
    )
    return Template(
        [
            (NARROW, [base.models, read_me]),
            (NARROW, [prompt, negative, size, encode]),
            (WIDE, [steps, schedule]),  # nothing below: the new nodes are higher, they show the curve
            (NARROW, [apply, sample]),
            (RESULT, base.result(sample[0], "style_over_time", 460)),
        ],
        [Group("Gate over time", [steps, schedule])],
    )


def two_characters_by_mask() -> Template:
    base, other = Demo(3), Demo(8, "Character 2")
    base.models.title = "Models, and character 1"
    references = [
        base.encode(each.reference, f"Encode Reference: character {n}") for n, each in enumerate((base, other), 1)
    ]
    black = node("SolidMask", "Black: the whole picture", value=0.0, width=128, height=64)
    white = node("SolidMask", "White: the left half", value=1.0, width=64, height=64)
    left = node("MaskComposite", "Left half", destination=black[0], source=white[0], x=0, y=0, operation="add")
    right = node("InvertMask", "Right half", mask=left[0])
    first = base.apply(references[0][0], "Apply FlexIP Gate: character 1", mask=left[0], gate=0.7)
    second = base.apply(references[1][0], "Apply FlexIP Gate: character 2", model=first[0], mask=right[0], gate=0.7)
    prompts = [
        area(base, side, text, x)
        for side, text, x in (
            ("left", "a cross on sand, bottom right", 0.0),
            ("right", "a triangle on sand, bottom left", 0.5),
        )
    ]
    both = node("ConditioningCombine", conditioning_1=prompts[0][1][0], conditioning_2=prompts[1][1][0])
    negative, size = base.negative(), base.latent(1, 128)
    sample = base.sampler(second, both, negative, size)
    read_me = note(
        "Two characters by mask",
        "One *Apply FlexIP Gate* for each character, one after the other: with its own reference, its own gate, and a "
        "mask that is white where the character acts. A place that is black in both masks follows the prompt alone.\n\n"
        "**Choose** the two subjects, **turn** the gate of each. Masks may have any size: draw one with *Open in "
        "MaskEditor* on a *Load Image* in place of the halves. A prompt for each half, because this world knows one "
        "subject in a picture; with your own files one prompt for both will do.",
        tall=430,
        files=DEMO,
    )
    return Template(
        [
            (NARROW, [base.models, other.models, read_me]),
            (NARROW, references),
            (NARROW, [black, white, left, right]),
            (NARROW, [first, second]),
            (NARROW, [*prompts[0], *prompts[1], both, negative]),
            (RESULT, [size, sample, *base.result(sample[0], "two_characters", 320)]),
        ],
        [Group("Masks", [black, white, left, right])],
    )


def area(base: Base, side: str, text: str, x: float) -> list[Node]:
    """A prompt for the left or right half."""
    prompt = base.prompt(text, f"Prompt, {side}", 100)
    half = {"width": 0.5, "height": 1.0, "x": x, "y": 0.0}
    return [prompt, node("ConditioningSetAreaPercentage", f"Area, {side}", conditioning=prompt[0], **half)]


def image_to_image() -> Template:
    base, other = Demo(2), Demo(1, "Picture to change")
    base.models.title = "Models, and reference picture"
    start = node("VAEEncode", pixels=other.reference, vae=base.vae)
    large = enlarged(other.reference)
    shown = node("PreviewImage", "The picture to change", 340, images=large[0])
    encode = base.encode(base.reference)
    prompt, negative = base.prompt("a triangle"), base.negative()
    apply = base.apply(encode[0], gate=0.9)
    sample = base.sampler(apply, prompt, negative, start, denoise=0.6)
    read_me = note(
        "Image to image with a reference",
        "The picture to change gives the layout (here night, bottom left), the reference the subject (its two colours), the "
        "prompt the rest.\n\n"
        "**Turn** denoise of *KSampler* (lower keeps more of the picture to change) and gate of *Apply FlexIP Gate* (1 "
        "keeps the subject of the reference, 0 follows the prompt). With denoise 0.6 a gate schedule begins in its middle.",
        tall=430,
        files=DEMO,
    )
    return Template(
        [
            (NARROW, [base.models, other.models, read_me]),
            (NARROW, [start, large, shown, encode]),
            (NARROW, [prompt, negative, apply]),
            (RESULT, [sample, *base.result(sample[0], "image_to_image", 460)]),
        ]
    )


def batch_of_references() -> Template:
    base, *others = Demo(7), Demo(11, "Subject 2"), Demo(12, "Subject 3")
    base.models.title = "Models, and subject 1"
    batch = node("BatchImagesNode", **{f"images.image{number}": each.reference for number, each in enumerate(others)})
    references = [
        base.encode(picture, f"Encode Reference: {title}")
        for picture, title in ((base.reference, "subject 1"), (batch[0], "subjects 2 and 3"))
    ]
    combine = node(
        "FlexIPCombineReferences",
        combine="one per batch item",
        **{f"references.reference_{number}": reference[0] for number, reference in enumerate(references)},
    )
    gates = node("FlexIPGateBatch", gates="0.9, 0.9, 0.9, 0.3, 0.3, 0.3", spread="repeat")
    size = base.latent(6)
    prompt, negative = base.prompt("a disc on sand, bottom right"), base.negative()
    apply = base.apply(combine[0], gate_schedule=gates[0])
    sample = base.sampler(apply, prompt, negative, size)
    read_me = note(
        "Batch of references",
        "Three pictures, six latents. *one per batch item* gives latent 1 picture 1, latent 2 picture 2, and so on, from "
        "the beginning again for latents 4 to 6. *FlexIP Gate Batch* gives the first three gate 0.9 (keep the subject) "
        "and the others 0.3 (follow the prompt).\n\n"
        "**Turn** combine (*average*: one blend of all), weights (one number per reference), gates and spread. A socket "
        "for another reference appears when the last one is wired.",
        tall=430,
        files=DEMO,
    )
    return Template(
        [
            (NARROW, [base.models, *(each.models for each in others), batch]),
            (NARROW, references),
            (NARROW, [combine, gates, size, prompt, negative]),
            (NARROW, [apply, sample]),
            (RESULT, [*base.result(sample[0], "batch_of_references"), read_me]),
        ],
        [Group("One for each latent", [combine, gates, size])],
    )


def scores_and_attention_maps() -> Template:
    base = Files()
    picture, size = base.picture(), base.latent()
    words = node("PrimitiveStringMultiline", "Prompt", 110, value=PORTRAIT)
    gates = node("PrimitiveString", "Gates", value=GATES)
    prompt, negative = base.prompt(words[0], "Prompt, encoded", 0), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    sample = base.sampler(apply, prompt, negative, size, "FlexIPSampler", gates=gates[0], vae=base.vae)
    sample.tall = 844
    decode = node("VAEDecode", samples=sample[0], vae=base.vae)
    score = node(
        "FlexIPScore",
        tall=780,
        images=decode[0],
        reference_image=picture[0],
        prompt=words[0],
        adapters=base.adapters,
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
        620,
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.loader, picture, size]),
            (NARROW, [words, prompt, negative, gates, encode]),
            (NARROW, [apply, read_me]),
            (RESULT, [sample, report]),
            (RESULT, [decode, score]),
            (RESULT, [maps]),
        ]
    )


def auto_gate() -> Template:
    base = Files()
    picture, size = base.picture(), base.latent()
    prompt, negative = base.prompt(PORTRAIT), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    wires = {"vae": base.vae, "reference_image": picture[0]}
    find = base.sampler(apply, prompt, negative, size, "FlexIPAutoGate", target=0.6, steps=8, **wires)
    find.tall = 800
    report = node("PreviewAny", "What it found", 280, source=find[3])
    sample = base.sampler(find, prompt, negative, size)
    read_me = note(
        "Auto gate",
        "*FlexIP Auto Gate* tries some gates in short runs, scores how much of the subject each keeps, and hands on the "
        "model with the smallest gate that reaches the target: as much freedom for the prompt as the identity allows.\n\n"
        "**Turn** target: 0 is what gate 0 gives, 1 the best that any gate gives. More noises and steps are slower and "
        "surer. Scores of the untrained mini models mean nothing.",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.loader, picture]),
            (NARROW, [prompt, negative, size, encode]),
            (NARROW, [apply, read_me]),
            (WIDE, [find, report]),
            (RESULT, [sample, *base.result(sample[0], "auto_gate", 420)]),
        ]
    )


def regional_prompts() -> Template:
    base, other = Demo(3), Demo(8, "Subject, right")
    base.models.title = "Models, and subject, left"
    sides, references = [], []
    for side, text, x, gate, each in (
        ("left", "a cross on sand", 0.0, 0.9, base),
        ("right", "a triangle on night", 0.5, 0.3, other),
    ):
        reference = base.encode(each.reference, f"Encode Reference, {side}")
        prompt, half = area(base, side, text, x)
        own = node("FlexIPConditioning", conditioning=half[0], reference=reference[0], gate=gate)
        sides.append([prompt, half, own])
        references.append(reference)
    both = node("ConditioningCombine", conditioning_1=sides[0][2][0], conditioning_2=sides[1][2][0])
    negative, size = base.negative(), base.latent(1, 128)
    apply = base.apply(references[0][0], tall=520)
    sample = base.sampler(apply, both, negative, size)
    read_me = note(
        "Regional prompts",
        "Each prompt has its own area, reference and gate: the left half keeps its subject (gate 0.9), the right half "
        "follows its prompt (gate 0.3). *Apply FlexIP Gate* must be on the model; its own reference and gate count for "
        "prompts that bring none.\n\n"
        "**Choose** the two subjects, **turn** gate of *FlexIP Conditioning* and the areas (parts of width and height).",
        tall=430,
        files=DEMO,
    )
    return Template(
        [
            (NARROW, [base.models, other.models, read_me]),
            (NARROW, references),
            (NARROW, [*sides[0], *sides[1]]),
            (NARROW, [both, negative, apply, size]),
            (RESULT, [sample, *base.result(sample[0], "regional_prompts", 320)]),
        ],
        [Group("Left", sides[0]), Group("Right", sides[1], "#8a6d3b")],
    )


TEMPLATES = {
    f"flexip_{make.__name__}": make
    for make in (
        basic,
        gate_sweep,
        demo_world,
        style_over_time,
        two_characters_by_mask,
        image_to_image,
        batch_of_references,
        scores_and_attention_maps,
        auto_gate,
        regional_prompts,
        with_ip_adapter_sd15,
        with_ip_adapter_sdxl,
    )
}
