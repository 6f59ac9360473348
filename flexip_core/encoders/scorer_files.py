"""Which image encoder a file is, for scores: how to build it, how it wants its pictures, and whether its
scores can be compared with published ones.

A file's tensors do not tell three things, which are decided here:
- Number of heads: 64 channels each, except in the CLIP towers that are published with wider ones.
- CLIP's activation: OpenAI's weights need QuickGELU, LAION's and DataComp's of the very same sizes need GELU. OpenAI's
  code rounds all linear weights to half precision before anybody gets them (openai/CLIP, clip/model.py,
  convert_weights), so in a float32 file they are exact half precision numbers; weights that were trained in float32
  are not. So: of the sizes that OpenAI published, rounded weights are OpenAI's, others are not. In a file stored in
  half precision this cannot be seen (and one that was converted back to float32 misleads); it is taken for OpenAI's,
  which its note says. All other sizes: GELU.
- DINO v1's training: other plain vision transformers have the same shapes. Files with a classifier or a pooler, which
  DINO's do not have, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ..files.weights import Header, read_header, read_tensors, read_weights
from ..network.config import ClipConfig, DinoConfig
from ..pictures import crop
from . import layouts, towers
from .layouts import EncoderFile, TowerShape, describe
from .text_tower import TextFile, find_text_tower

CLIP_STANDARD = "OpenAI's CLIP ViT-B/32"
DINO_STANDARD = "DINO v1 ViT-S/16"
CLIP_ADVICE = "model.safetensors of openai/clip-vit-base-patch32"
DINO_ADVICE = "dino_deitsmall16_pretrain.pth of facebookresearch/dino, or the file of facebook/dino-vits16"

_NEED = "scores need it whole, so use another file"
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # of CLIP's image towers; 64 otherwise
# width, layers, patch, positions, embedding of the four towers that OpenAI published
_OPENAI_B32 = (768, 12, 32, 49, 512)
_OPENAI = {_OPENAI_B32, (768, 12, 16, 196, 512), (1024, 24, 14, 256, 768), (1024, 24, 14, 576, 768)}
_CLIP_REMARKS = {
    True: "",
    None: "The file is stored in half precision, which hides whose weights they are: they are taken for OpenAI's.",
    False: "Its weights are not OpenAI's: they are run with GELU, as LAION's and DataComp's need, not with QuickGELU, "
    "as MetaCLIP's and DFN's would need.",
}
# What adapters usually read (IP-Adapter: ViT-H and bigG; FlexIP by default: ViT-H and DINOv2 ViT-L): kind, width, layers, patch
_USUALLY_READ = {("clip", 1280, 32, 14), ("clip", 1664, 48, 14), ("dino", 1024, 24, 14)}
# DINO's and DINOv2's evaluation transform: Resize(256, bicubic), CenterCrop(224)
_DINO_RESIZE, _DINO_CROP = 256, 224


@dataclass(frozen=True)
class ScorerFile:
    """A file that can score. `name` is how people know it; `shape` and `encoder` tell how its tower is built."""

    name: str
    path: Path
    file: EncoderFile
    encoder: ClipConfig | DinoConfig
    title: str  # "CLIP ViT-B/32"
    standard: bool  # the encoder that published scores use
    remark: str  # what is uncertain about it, a sentence or nothing
    resize: int  # pixels: the short side of a picture is scaled to this,
    crop: int  # and the middle square of this side is looked at
    assumed: bool = False  # that the weights are OpenAI's, which the file cannot tell
    text: TextFile | None = None  # CLIP only
    no_text: str = ""  # why there is no text tower

    @property
    def kind(self) -> str:
        return self.file.shape.kind

    @property
    def quick_gelu(self) -> bool:
        return isinstance(self.encoder, ClipConfig) and self.encoder.vision_cfg["quick_gelu"]

    @property
    def label(self) -> str:
        return f"{self.title} ({self.name})"

    def note(self, score: str, read_by_adapters: bool = False) -> str:
        """Whether a `score` ("CLIP-I") by this file can be compared with published ones, in a sentence or two."""
        standard = CLIP_STANDARD if self.kind == "clip" else DINO_STANDARD
        if read_by_adapters:
            text = (
                f"NOT comparable with published {score}: the adapters read this encoder themselves, "
                "so its scores favour them."
            )
        elif self.standard:
            text = f"Comparable with published {score} that used {standard} on the same pictures and prompts."
        else:
            also = ", and adapters usually read this encoder" if self.usually_read else ""
            text = (
                f"NOT comparable with published {score}, which use {standard}{also}; "
                f"compare it only with {score} by this same file."
            )
        return f"{text} {self.remark}".rstrip()

    @property
    def usually_read(self) -> bool:
        shape = self.file.shape
        return (shape.kind, shape.width, shape.depth, shape.patch) in _USUALLY_READ

    def is_read_by(self, needs: Iterable) -> bool:
        """Whether one of these FeatureNeeds is served by an encoder of this architecture."""
        return any(_comparable(towers.wanted_shape(need.encoder)) == _comparable(self.file.shape) for need in needs)


class Unsuited(ValueError):
    """A file that cannot score. `found` says what it is, for whoever wants an encoder for something other than scores."""

    def __init__(self, found: str, advice: str):
        super().__init__(f"{found}; {advice}.")
        self.found = found


def clip_scorer(name: str, path: str | Path) -> ScorerFile:
    """The CLIP in this file as a scorer. Unsuited, one sentence naming the file `name`, if it cannot score."""
    header = read_header(path)
    file = layouts.identify(header)
    if file is None or file.shape.kind != "clip":
        raise Unsuited(f"{name} is {_what(header, file)}, not a CLIP", f"choose a CLIP file, such as {CLIP_ADVICE}")
    shape = file.shape
    if "class_embedding" not in layouts.converted_shapes(header, file):
        raise Unsuited(f"{name} is a CLIP around a timm tower", "scores cannot use that, so choose another CLIP file")
    if not shape.out:
        raise Unsuited(f"{name} is {describe(file)}", "scores need the projection, so choose another CLIP file")
    head_width = _HEAD_WIDTHS.get(shape.width, 64)
    if shape.width % head_width:
        raise Unsuited(f"{name} is a CLIP of the unusual width {shape.width}", "choose another CLIP file")
    size = shape.patch * isqrt(shape.positions)
    sizes = (shape.width, shape.depth, shape.patch, shape.positions, shape.out)
    openai = _rounded_to_half(header, file) if sizes in _OPENAI else False  # None: cannot be seen
    encoder = ClipConfig(
        model=describe(file).partition(" (")[0],
        width=shape.out,
        vision_cfg={
            "width": shape.width,
            "layers": shape.depth,
            "head_width": head_width,
            "patch_size": shape.patch,
            "image_size": size,
            "mlp_ratio": (shape.mlp + 0.5) / shape.width,  # open_clip rounds down
            "quick_gelu": openai is not False,
        },
    )
    text, no_text = None, ""
    try:
        text = find_text_tower(name, header.shapes, file)
    except ValueError as error:
        no_text = str(error)
    return ScorerFile(
        name,
        Path(path),
        file,
        encoder,
        title=f"{'OpenAI ' if openai else ''}{encoder.model}{'' if size == 224 else f' at {size} px'}",
        standard=sizes == _OPENAI_B32 and openai is not False,
        remark=_CLIP_REMARKS[openai] if sizes in _OPENAI else "",
        resize=size,
        crop=size,
        assumed=openai is None,
        text=text,
        no_text=no_text,
    )


def dino_scorer(name: str, path: str | Path) -> ScorerFile:
    """The DINO (v1) or DINOv2 in this file as a scorer. Unsuited, one sentence naming the file, if it cannot score."""
    header = read_header(path)
    file = layouts.identify(header) or layouts.identify_vit(header)
    choose = f"choose a DINO or DINOv2 file, such as {DINO_ADVICE}"
    if file is None or file.shape.kind != "dino":
        raise Unsuited(f"{name} is {_what(header, file)}, not a DINO", choose)
    shape, tensors = file.shape, layouts.converted_shapes(header, file)
    second = "blocks.0.ls1.gamma" in tensors  # layer scale: DINOv2 has it, DINO does not
    if "cls_token" not in tensors or not shape.positions or not (second or shape.patch in (8, 16)):
        raise Unsuited(f"{name} is {describe(file)}, not a DINO", choose)
    if not second and (extra := _supervised(header, file)):
        raise Unsuited(f"{name} has a {extra}, which DINO's files do not have", choose)
    if shape.width % 64 or _DINO_CROP % shape.patch:
        raise Unsuited(f"{name} is {describe(file)}, an unusual size", choose)
    model = "vit_small_patch16_224.dino"  # any size: args override it
    args = {
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.width // 64,
        "patch_size": shape.patch,
        "mlp_ratio": ((1 + shape.gated) * shape.mlp + 0.5) / shape.width,  # timm rounds down
    }
    if second:
        model = "vit_giant_patch14_dinov2" if shape.gated else "vit_small_patch14_dinov2"
        args |= {"reg_tokens": shape.registers, "no_embed_class": not shape.class_position}
    encoder = DinoConfig(model, shape.width, _DINO_CROP, args)
    family, vit = ("DINOv2" if second else "DINO v1"), describe(file).partition(" (")[0]
    title = f"{family} {vit.removeprefix('DINOv2 ').removeprefix('vision transformer ')}"
    title += f" with {shape.registers} registers" if shape.registers else ""
    standard = not second and (shape.width, shape.depth, shape.mlp, shape.patch) == (384, 12, 1536, 16)
    remark = (
        "" if second else "It is recognised by its shapes and by having no classifier: make sure that it is DINO's."
    )
    return ScorerFile(name, Path(path), file, encoder, title, standard, remark, resize=_DINO_RESIZE, crop=_DINO_CROP)


def by_preference(scorers: Iterable[ScorerFile]) -> list[ScorerFile]:
    """Best first: the encoder of published scores, then a CLIP with its text tower, then the largest; then by name."""

    def rank(scorer: ScorerFile) -> tuple:
        shape = scorer.file.shape
        size = shape.depth * shape.width * (4 * shape.width + (2 + shape.gated) * shape.mlp)  # weights of the blocks
        return (-scorer.standard, scorer.assumed, -(scorer.text is not None), -size, -shape.positions, scorer.name)

    return sorted(scorers, key=rank)


def check(scorer: ScorerFile) -> None:
    """ValueError, one sentence, unless the file holds exactly the tensors of its image tower. Reads no tensor."""
    shapes = layouts.converted_shapes(read_header(scorer.path), scorer.file)
    towers.check_fits(scorer.name, shapes, scorer.encoder, _NEED)


def load_image_tower(scorer: ScorerFile) -> towers.ClipTower | towers.DinoTower:
    """The image tower in float32 (scores are read to three decimals) on the CPU, in eval mode, frozen."""
    check(scorer)
    tensors = read_weights(scorer.path, layouts.tower_keys(read_header(scorer.path).shapes, scorer.file))
    return towers.load_tower(scorer.encoder, layouts.to_tower_layout(tensors, scorer.file))


def embed(tower: towers.ClipTower | towers.DinoTower, pixels: Tensor) -> Tensor:
    """Normalised pixels (b, 3, s, s) -> what is compared (b, d): CLIP's image embedding, DINO's [CLS]."""
    return tower.cls(pixels) if isinstance(tower, towers.DinoTower) else tower(pixels)


def prepare(scorer: ScorerFile, pictures: Tensor) -> Tensor:
    """Pictures (b, h, w, 1 | 3 | 4) in 0..1 -> normalised pixels (b, 3, crop, crop) on the CPU, as the encoder's authors do."""
    squares = torch.stack([crop.prepare(picture, None, "center", scorer.resize) for picture in pictures])
    edge = (scorer.resize - scorer.crop) // 2
    squares = squares[:, edge : edge + scorer.crop, edge : edge + scorer.crop]
    return crop.normalise(squares, *towers.normalisation(scorer.encoder))


def _what(header: Header, file: EncoderFile | None) -> str:
    file = file or layouts.identify_vit(header)
    return describe(file) if file else "no image encoder that FlexIP knows"


def _supervised(header: Header, file: EncoderFile) -> str:
    """The name of a part that only other vision transformers have, or nothing."""
    if any(key in header.shapes for key in (f"{file.prefix}head.weight", "classifier.weight", "head.weight")):
        return "classifier"
    return "pooler" if f"{file.prefix}pooler.dense.weight" in header.shapes else ""


def _rounded_to_half(header: Header, file: EncoderFile) -> bool | None:
    """Whether a linear weight stored in float32 holds nothing but half precision numbers; None if it is stored otherwise."""
    (key,) = layouts.tower_sources(header.shapes, file)["transformer.resblocks.0.mlp.c_fc.weight"]
    if header.dtypes[key] != "float32":
        return None
    weight = read_tensors(header.path, [key])[key]
    return torch.equal(weight.half().float(), weight)


def _comparable(shape: TowerShape) -> tuple:
    """All but the number of DINO positions, which are resampled anyway."""
    positions = shape.positions if shape.kind == "clip" else bool(shape.positions)
    return (shape.kind, shape.width, shape.depth, shape.mlp, shape.patch, positions, shape.registers, shape.gated)
