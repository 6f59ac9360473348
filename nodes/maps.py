"""FlexIPAttentionMaps: looks at a finished picture again, and shows where each group of tokens acts in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io, ui

from ..flexip_core.measuring import maps
from ..flexip_core.network.blocks import block_levels
from ..flexip_core.pictures.contact_sheet import contact_sheet
from ..flexip_core.pictures.heat import overlay
from . import notices, runtime
from .checks import check_latent, check_numbers
from .compat import KEEP_PREVIEW
from .errors import named
from .notices import Report
from .observe import Recorder, look
from .sampler import decode
from .scorers import check_pictures
from .types import CHECK_MENU

NODE = "FlexIPAttentionMaps"
ADAPTERS, WORDS, WORDS_ADDED = "adapters", "words", "words (personalization)"
MOST_WORDS = 32  # without a choice of words
SHEET = 384  # pixels: the shorter side of a picture on the contact sheet, so that the labels fit
COLUMNS = 6  # the rest goes below


class FlexIPAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Attention Maps",
            category=CHECK_MENU,
            description="Where in a finished picture the reference acts: a heat map for detail, semantic and personalization tokens, or for each word of the prompt.",
            is_output_node=True,
            **KEEP_PREVIEW,
            search_aliases=["heatmap", "heat map", "daam", "cross attention", "visualize attention", "explain"],
            inputs=[
                io.Model.Input("model", tooltip="The gated model that made the picture, from Apply FlexIP Gate."),
                io.Conditioning.Input("positive", tooltip="The positive prompt that made the picture."),
                io.Latent.Input(
                    "latent", tooltip="The finished latent, from any sampler. A batch gives a row of maps per picture."
                ),
                io.Combo.Input(
                    "show",
                    options=[ADAPTERS, WORDS, WORDS_ADDED],
                    default=ADAPTERS,
                    tooltip="adapters: what the detail, semantic and personalization tokens add. words: which places attend to each word of the prompt. words (personalization): what the personalization tokens of each word add. The last two need clip and prompt.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the latent to draw on, unless an image is wired."),
                io.Image.Input(
                    "image", optional=True, tooltip="The decoded picture to draw on; then no vae is needed."
                ),
                io.Clip.Input("clip", optional=True, tooltip="For words: the CLIP that encoded the prompt."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    dynamic_prompts=False,
                    tooltip="For words: the text of the positive prompt, exactly as it was encoded.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip=f"Only these words of the prompt, with commas between them, such as cat, red hat. Empty: all of them, {MOST_WORDS} at most.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    optional=True,
                    advanced=True,
                    tooltip="Blocks of the UNet to average over: all, output, or addresses such as input.4, output.3.0 with commas between them.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="How many noise levels are looked at and averaged. Each costs one model call without a negative.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Part of the sampling at which to start looking: early is layout, late is detail.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Part of the sampling at which to stop looking.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of the noise that is put on the latent to look at it.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "sheet",
                    display_name="contact sheet",
                    tooltip="The picture and its maps side by side, one column per group and one row per picture. Each column is scaled to its own brightest place; the number in its label is the mean.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="The maps in the size of the picture: first the first group for all pictures, then the second, ... All are scaled together, so that the highest value is 1.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The groups in the order of the masks with their mean and highest value, the blocks and noise levels, and the gate mode.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict,
        show: str,
        vae: Any = None,
        image: torch.Tensor | None = None,
        clip: Any = None,
        prompt: str = "",
        words: str = "",
        blocks: str = "all",
        steps: int = 4,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        seed: int = 0,
    ) -> io.NodeOutput:
        links = runtime.gated_links(model, NODE)
        check_latent(NODE, "latent", latent, model)
        check_numbers(NODE, 0, 1, start_percent=start_percent, end_percent=end_percent)
        if image is not None:
            check_pictures(image, "image", NODE)
        check(links, latent, show, vae, image, start_percent, end_percent)
        with named(NODE):
            chosen = maps.choose_blocks(blocks, list(block_levels(model.model.diffusion_model)))
            if show == ADAPTERS:
                groups = maps.adapter_groups(links)
                notes: list[str] = []
                measure = maps.measure_adapters(list(groups))
                labels = list(groups.values())
            else:
                found, notes = words_of_prompt(clip, prompt, words, positive)
                labels, text = list(found), positive[0][0].shape[1]
                measure = (maps.measure_words if show == WORDS else maps.measure_words_added)(
                    list(found.values()), text
                )
        span = (end_percent - start_percent) / steps
        percents = [start_percent + (step + 0.5) * span for step in range(steps)]
        recorder = Recorder(measure, len(labels), latent["samples"], first_prompt_only=show != ADAPTERS)
        warnings = look(model, positive, latent, percents, seed, chosen, recorder)
        refuse_nothing(recorder)
        result = recorder.mean.result()  # (g, b, h, w)
        report = in_words(show, labels, result, chosen, recorder, links, notes, warnings)
        logging.info("FlexIP attention maps\n%s", report.text)

        pictures = pictures_of(image, vae, latent["samples"])
        masks = F.interpolate(result, size=pictures.shape[1:3], mode="bilinear").flatten(0, 1)
        sheet = draw(pictures, result, [f"{label} {percent(mean)}" for label, mean in zip(labels, means(result))])
        said = notices.said(report, notices.id_of(cls))
        shown = said | ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(sheet, masks / masks.max().clamp_min(1e-12), report.text, ui=shown)


def check(
    links: tuple,
    latent: dict,
    show: str,
    vae: Any,
    image: torch.Tensor | None,
    start_percent: float,
    end_percent: float,
) -> None:
    samples = latent["samples"]
    if show != WORDS and all(link.silent for link in links):
        raise ValueError(f"{NODE}: every Apply FlexIP Gate has strength 0, so the reference adds nothing. Raise one.")
    if show == WORDS_ADDED and not any(link.network.reads_text("personalization") for link in links if not link.silent):
        raise ValueError(
            f"{NODE}: these adapters are IP-Adapter files, whose tokens belong to the whole picture and not to words. Choose adapters or words in show."
        )
    if not samples.any():
        raise ValueError(f"{NODE}: the latent is empty. Wire the finished latent that comes out of the sampler.")
    if start_percent >= end_percent:
        raise ValueError(
            f"{NODE}: start_percent {start_percent:g} is not before end_percent {end_percent:g}. Set start_percent below end_percent."
        )
    if image is None and vae is None:
        raise ValueError(f"{NODE}: there is no picture to draw on. Wire the decoded picture into image, or a vae.")
    if image is not None and len(image) not in (1, len(samples)):
        raise ValueError(
            f"{NODE}: got {len(image)} images for {len(samples)} latents. Wire the pictures that this latent was decoded to, or a vae."
        )


def words_of_prompt(clip: Any, prompt: str, wanted: str, positive: list) -> tuple[dict[str, list[int]], list[str]]:
    """Word -> its tokens in the first conditioning, and notes for the report."""
    if clip is None or not prompt.strip():
        raise ValueError("words need the prompt's text and its CLIP. Wire clip, and write or wire the prompt.")
    words, length = tokenized(clip, prompt)
    if length > positive[0][0].shape[1]:
        raise ValueError(
            f"the prompt has {length} tokens with the padding, but positive has {positive[0][0].shape[1]}. Use the text and the CLIP that positive was encoded from."
        )
    labels = maps.split_words(wanted)
    if labels:
        parts = {label: [word.text for word in tokenized(clip, label)[0]] for label in labels}
        return maps.chosen_words(words, parts), []
    found = maps.every_word(words)
    if not found:
        raise ValueError("the prompt has no words. Write the text that positive was encoded from.")
    if len(found) <= MOST_WORDS:
        return found, []
    note = f"note: the prompt has {len(found)} different words, and the first {MOST_WORDS} are shown; write others into words"
    return dict(list(found.items())[:MOST_WORDS]), [note]


def tokenized(clip: Any, prompt: str) -> tuple[list[maps.Word], int]:
    """The words of a prompt as CLIP splits them, and how many tokens its chunks of 77 have together.

        ComfyUI's own word ids number whole stretches of text, so the words are read from the vocabulary, where "</w>" ends one. They
    They, end and padding (0), and one embedding from the next.
    """
    by_encoder = clip.tokenize(prompt, return_word_ids=True)
    encoder = next((name for name in ("l", "g") if name in by_encoder), None)  # SDXL's two agree
    tokenizer = getattr(clip.tokenizer, f"clip_{encoder}", None)
    if tokenizer is None:
        raise ValueError("the wired clip is not that of SD1.5 or SDXL. Wire the CLIP of the model's checkpoint.")
    words: list[maps.Word] = []
    pieces: list[tuple[int, int]] = []  # (id, place) of the word being read
    embeddings: dict[int, list[int]] = {}
    place = -1
    for chunk in by_encoder[encoder]:
        for token, _, number in chunk:
            place += 1
            if number == 0:
                continue
            if not isinstance(token, int):
                embeddings.setdefault(number, []).append(place)
                continue
            pieces.append((token, place))
            if tokenizer.inv_vocab[token].endswith("</w>"):
                ids, places = zip(*pieces)
                words.append(maps.Word(tokenizer.decode(list(ids)).strip().lower(), places))
                pieces = []
    named = [maps.Word(f"embedding {i}", tuple(places)) for i, places in enumerate(embeddings.values(), 1)]
    return sorted(words + named, key=lambda word: word.tokens), place + 1


def refuse_nothing(recorder: Recorder) -> None:
    if not recorder.calls:
        raise ValueError(
            f"{NODE}: no chosen block called FlexIP. Another node replaced or compiled them after Apply FlexIP Gate; wire the model from before that node, or choose other blocks."
        )
    if not recorder.seen:
        raise ValueError(
            f"{NODE}: FlexIP adds nothing in the chosen blocks between start_percent and end_percent. Widen them, choose other blocks, or look at what Apply FlexIP Gate is set to."
        )
    if not any(recorder.seen.values()):
        raise ValueError(
            f"{NODE}: another node shows the model tiles without saying which part of the picture each one is. Remove the tiling for the maps."
        )


def means(result: torch.Tensor) -> list[float]:
    """result (g, b, h, w) -> the mean of each group"""
    return result.mean(dim=(1, 2, 3)).tolist()


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def in_words(
    show: str,
    labels: list[str],
    result: torch.Tensor,
    blocks: Sequence[str],
    recorder: Recorder,
    links: tuple,
    notes: list[str],
    warnings: tuple[str, ...],
) -> Report:
    what = "of the text's attention" if show == WORDS else "of what the text adds on average"
    lines = [
        f"{label}: {percent(mean)} {what}, at most {percent(highest)}"
        for label, mean, highest in zip(labels, means(result), result.amax(dim=(1, 2, 3)).tolist())
    ]
    sigmas = ", ".join(f"{sigma:.3g}" for sigma in recorder.seen)
    blocks = list(dict.fromkeys(address.rpartition(".")[0] for address in blocks))
    lines += [
        f"masks: {len(labels)} groups for {result.shape[1]} picture(s), in this order",
        f"averaged over {len(recorder.seen)} noise levels (sigma {sigmas}) and the blocks {', '.join(blocks)}",
        *(
            f"{number}: {link.title} (gate mode {link.network.gate_mode})" + ", strength 0" * link.silent
            for number, link in enumerate(links, 1)
        ),
        *notes,
    ]
    return Report(lines[0], tuple(lines[1:]), warnings)


def pictures_of(image: torch.Tensor | None, vae: Any, samples: torch.Tensor) -> torch.Tensor:
    pictures = decode(vae, samples) if image is None else image
    return pictures[..., :3].float().cpu().expand(len(samples), -1, -1, -1)


def draw(pictures: torch.Tensor, result: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """pictures (b, h, w, 3), result (g, b, gh, gw) -> the contact sheet; every group is scaled by its own highest value."""
    size = [round(side * SHEET / min(pictures.shape[1:3])) for side in pictures.shape[1:3]]
    pictures = F.interpolate(pictures.movedim(-1, 1), size=size, mode="bilinear", antialias=True).movedim(1, -1)
    scaled = result / result.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    heats = [overlay(pictures, group) for group in F.interpolate(scaled, size=size, mode="bilinear")]
    labels, columns = ["picture", *labels], [pictures, *heats]
    bands = [
        contact_sheet(torch.cat(columns[first : first + COLUMNS]), labels[first : first + COLUMNS])
        for first in range(0, len(columns), COLUMNS)
    ]
    width = bands[0].shape[2]
    return torch.cat([F.pad(band, (0, 0, 0, width - band.shape[2]), value=1.0) for band in bands], dim=1)
