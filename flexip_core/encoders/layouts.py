"""Recognising image encoder files by their keys and shapes, and renaming their tensors for the towers.

Two layouts are the towers' own: open_clip's (`CLIP` towers: `class_embedding`, `transformer.resblocks.N...`, or
`trunk.blocks.N...` where open_clip wraps a timm model) and timm's (`DINO` towers: `blocks.N...`). One table of names
per foreign layout serves both the recognition (on shapes) and the conversion (on tensors).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt

import torch

from ..files.weights import Header

Shape = tuple[int, ...]
MOST_PREFIXES = 16  # before the keys of one layout, in one file: a training checkpoint has two or three
LARGEST = 16384  # of every size of a tower; views let a small pickle show tensors of any size


@dataclass(frozen=True)
class TowerShape:
    """What the tensors of a tower reveal. (The number of heads and the activation are not in them.)"""

    kind: str  # "clip" or "dino"
    width: int  # of a token
    depth: int  # transformer blocks
    mlp: int  # hidden width of the MLP
    patch: int  # pixels
    positions: int  # learned patch positions, without [CLS]; 0 for rotary ones
    out: int  # projected width; 0 if a CLIP file lacks the projection; the token width for dino
    registers: int = 0
    gated: bool = False  # SwiGLU instead of a plain MLP
    class_position: bool = True  # [CLS] has a position of its own


@dataclass(frozen=True)
class EncoderFile:
    """A recognised file: `layout` is open_clip, transformers, timm, meta or one of DINOv3's, `prefix` stands before the tower's keys."""

    layout: str
    shape: TowerShape
    prefix: str


# --- names: what a layout's keys become in the tower's own layout, applied from top to bottom ---

CLIP_BLOCKS_FROM_TRANSFORMERS = (  # of either tower
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2|\1"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_CLIP_FROM_TRANSFORMERS = (
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),  # transformers' own spelling
    (r"^post_layernorm\.", "ln_post."),
    *CLIP_BLOCKS_FROM_TRANSFORMERS,
)
_DINO_FROM_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q)uery\.(weight|bias)$", r".attn.qkv.\2|\1"),
    (r"\.attention\.attention\.(k)ey\.(weight|bias)$", r".attn.qkv.\2|\1"),
    (r"\.attention\.attention\.(v)alue\.(weight|bias)$", r".attn.qkv.\2|\1"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
_VIT_FROM_TRANSFORMERS = (  # ViTModel, in which DINO v1 is published there
    *_DINO_FROM_TRANSFORMERS,
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_DINO_FROM_META = (
    # Blocks saved in chunks: blocks.CHUNK.N, N counting through (facebookresearch/dinov2, models/vision_transformer.py)
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

# DINOv3, whose towers are timm's Eva: rotary positions, so none is stored, and no bias of k. Sources: transformers'
# modeling_dinov3_vit.py; facebookresearch/dinov3, models/vision_transformer.py.
_DINOV3_FROM_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(?:model\.)?layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.weight$", r".attn.qkv.weight|\1"),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_DINOV3_GATED = ((r"\.mlp\.up_proj\.", ".mlp.fc1_x."), *_DINOV3_FROM_TRANSFORMERS)
_DINOV3_FROM_META = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

# Keys that together give a layout away. No set is found in a file of another layout.
_SIGNS = (
    ("clip", "open_clip", ("class_embedding", "positional_embedding", "conv1.weight", "ln_post.weight")),
    ("clip", "open_clip", ("trunk.patch_embed.proj.weight", "trunk.blocks.0.norm1.weight")),
    (
        "clip",
        "transformers",
        (
            "embeddings.class_embedding",
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "pre_layrnorm.weight",
        ),
    ),
    (
        "dino",
        "transformers",
        (
            "embeddings.cls_token",
            "embeddings.patch_embeddings.projection.weight",
            "embeddings.position_embeddings",
            "encoder.layer.0.layer_scale1.lambda1",
        ),
    ),
    ("dino", "meta", ("cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")),
    ("dino", "meta", ("cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.0.norm1.weight")),
    *(
        (
            "dino",
            "transformers dinov3",
            (
                "embeddings.cls_token",
                "embeddings.register_tokens",
                "embeddings.patch_embeddings.weight",
                f"{place}layer.0.norm1.weight",
            ),
        )
        for place in ("", "model.")
    ),
    ("dino", "meta dinov3", ("storage_tokens", "cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight")),
    ("dino", "timm", ("patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")),
)
# No adapter reads such a ViT, so it is only found by `identify_vit`.
_VIT_SIGNS = (
    (
        "dino",
        "transformers vit",
        (
            "embeddings.cls_token",
            "embeddings.patch_embeddings.projection.weight",
            "embeddings.position_embeddings",
            "encoder.layer.0.layernorm_before.weight",
        ),
    ),
)
_RULES = {
    ("clip", "transformers"): _CLIP_FROM_TRANSFORMERS,
    ("dino", "transformers"): _DINO_FROM_TRANSFORMERS,
    ("dino", "transformers vit"): _VIT_FROM_TRANSFORMERS,
    ("dino", "meta"): _DINO_FROM_META,
    ("dino", "transformers dinov3"): _DINOV3_FROM_TRANSFORMERS,
    ("dino", "meta dinov3"): _DINOV3_FROM_META,
}
# Not part of a tower: transformers' position counter, what only DINO's training uses, a classifier, what the rotary positions
# are made of, and the mask by which DINOv3 holds the bias of k at zero.
_DROPPED = re.compile(
    r"(^|\.)position_ids$|(^|\.)mask_token$|^head\.(weight|bias)$|^rope_embed\.periods$|\.bias_mask$|^local_cls_norm\."
)


def identify(header: Header | Mapping[str, Shape]) -> EncoderFile | None:
    """Recognises an image encoder by keys and shapes, alone or inside a larger file; None if there is none.

    If a training checkpoint holds several towers, the teacher's is taken (it is the one that DINO publishes), otherwise
    the one with the shortest prefix.
    """
    return _identify(header, _SIGNS)


def identify_vit(header: Header | Mapping[str, Shape]) -> EncoderFile | None:
    """As `identify`, but for the plain vision transformers of transformers (ViTModel), which only scores use."""
    return _identify(header, _VIT_SIGNS)


def _identify(header: Header | Mapping[str, Shape], table: tuple) -> EncoderFile | None:
    shapes = header.shapes if isinstance(header, Header) else header
    for kind, layout, signs in table:
        prefixes = [key[: -len(signs[0])] for key in shapes if key.endswith(signs[0])]
        prefixes = [p for p in prefixes if p[-1:] in ("", ".") and all(p + sign in shapes for sign in signs)]
        # each prefix costs a look at all names; a file with this many was made to be slow
        for prefix in sorted(prefixes, key=lambda p: ("teacher" not in p, len(p), p))[:MOST_PREFIXES]:
            try:
                shape = tower_shape(kind, _convert_shapes(shapes, kind, layout, prefix))
            except (KeyError, IndexError, ValueError):  # names as expected, shapes not: not a tower after all
                continue
            return EncoderFile(layout, shape, prefix)
    return None


def tower_keys(keys: Iterable[str], file: EncoderFile) -> list[str]:
    """The keys of a file that belong to the recognised tower, so that a text tower need not be read."""
    return [key for sources in tower_sources(keys, file).values() for key in sources]


def tower_sources(keys: Iterable[str], file: EncoderFile) -> dict[str, list[str]]:
    """The tower's key -> the file's keys that make it: one, or those of q, k and v in this order."""
    return _sources(keys, file.shape.kind, file.layout, file.prefix)


def to_tower_layout(tensors: Mapping[str, torch.Tensor], file: EncoderFile) -> dict[str, torch.Tensor]:
    """Renames a file's tensors to open_clip's (clip) or timm's (dino) names and drops everything that is not part of the tower.

    Tensors are shared with `tensors` except fused q, k and v. DINO positions keep the file's number.
    """
    kind, result = file.shape.kind, {}
    for name, sources in tower_sources(tensors, file).items():
        parts = [tensors[key] for key in sources]
        result[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if kind == "clip" and file.layout == "transformers" and "proj" in result:
        result["proj"] = result["proj"].t()
    if file.layout == "meta dinov3":
        for name in [name for name in result if name.endswith(".attn.qkv.bias")]:
            q, _, v = result.pop(name).chunk(3)  # of k it is held at zero
            result[name.replace("qkv.bias", "q_bias")], result[name.replace("qkv.bias", "v_bias")] = q, v
    if "register_tokens" in result:  # timm keeps patch positions only and adds the first position to [CLS] for good
        result["reg_token"] = result.pop("register_tokens")
        result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
        result["pos_embed"] = result["pos_embed"][:, 1:]
    return result


def _sources(keys: Iterable[str], kind: str, layout: str, prefix: str) -> dict[str, list[str]]:
    """Tower key -> the file's keys that make it: one, or the three of q, k and v in this order."""
    own = [key for key in keys if key.startswith(prefix) and not _DROPPED.search(key[len(prefix) :])]
    rules = _RULES.get((kind, layout), ())
    if rules is _DINOV3_FROM_TRANSFORMERS and any(".mlp.gate_proj." in key for key in own):
        rules = _DINOV3_GATED
    found = renamed(own, prefix, rules)
    if kind == "clip" and layout == "transformers":
        projection = prefix.removesuffix("vision_model.") + "visual_projection.weight"
        found.pop("visual_projection.weight", None)  # a prefix of "" has it among the tower's own keys
        if projection in set(keys):
            found["proj"] = [projection]
    return found


def renamed(keys: Iterable[str], prefix: str, rules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """New name -> the keys (which begin with `prefix`) that make it: one, or the three of q, k and v in this order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        name = key[len(prefix) :]
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        name, _, part = name.partition("|")
        found.setdefault(name, []).append(("qkv".find(part), key))
    return {name: [key for _, key in sorted(parts)] for name, parts in found.items()}


def converted_shapes(header: Header | Mapping[str, Shape], file: EncoderFile) -> dict[str, Shape]:
    """The shapes that `to_tower_layout` will give, known before any tensor is read."""
    shapes = header.shapes if isinstance(header, Header) else header
    return _convert_shapes(shapes, file.shape.kind, file.layout, file.prefix)


def _convert_shapes(shapes: Mapping[str, Shape], kind: str, layout: str, prefix: str) -> dict[str, Shape]:
    result = {}
    for name, sources in _sources(shapes, kind, layout, prefix).items():
        first = shapes[sources[0]]
        if any(shapes[key][1:] != first[1:] for key in sources):
            raise ValueError(f"{sources[0]} and the tensors beside it differ in shape.")
        result[name] = first if len(sources) == 1 else (sum(shapes[key][0] for key in sources), *first[1:])
    if kind == "clip" and layout == "transformers" and "proj" in result:
        result["proj"] = result["proj"][::-1]
    if layout == "meta dinov3":
        for name in [name for name in result if name.endswith(".attn.qkv.bias")]:
            third = (result.pop(name)[0] // 3,)
            result[name.replace("qkv.bias", "q_bias")] = result[name.replace("qkv.bias", "v_bias")] = third
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        result["pos_embed"] = (1, result["pos_embed"][1] - 1, result["pos_embed"][2])
    return result


# --- shapes: what a tower's own layout reveals ---


def tower_shape(kind: str, shapes: Mapping[str, Shape]) -> TowerShape:
    """Reads the sizes from shapes in the tower's own layout. KeyError, IndexError or ValueError if it is not a ViT."""
    shape = _read_shape(kind, shapes)
    if not all(0 < size <= LARGEST for size in (shape.width, shape.depth, shape.mlp, shape.patch)) or not all(
        0 <= size <= LARGEST for size in (shape.positions, shape.out, shape.registers)
    ):
        raise ValueError("No vision transformer has such sizes.")
    return shape


def _read_shape(kind: str, shapes: Mapping[str, Shape]) -> TowerShape:
    if kind == "clip" and "class_embedding" in shapes:
        hidden = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
        return TowerShape(
            kind,
            shapes["class_embedding"][0],
            _count(shapes, "transformer.resblocks."),
            hidden,
            shapes["conv1.weight"][3],
            shapes["positional_embedding"][0] - 1,
            shapes["proj"][1] if "proj" in shapes else 0,
        )
    trunk = "trunk." if kind == "clip" else ""
    width, _, _, patch = shapes[trunk + "patch_embed.proj.weight"][:4]
    registers = shapes[trunk + "reg_token"][1] if trunk + "reg_token" in shapes else 0
    mlp = trunk + "blocks.0.mlp."
    if mlp + "fc1.weight" in shapes:
        hidden = shapes[mlp + "fc2.weight"][1]
        gated = shapes[mlp + "fc1.weight"][0] == 2 * hidden
    else:  # timm's unpacked SwiGLU, EVA's for example
        hidden, gated = shapes[mlp + "fc2.weight"][1], True
    positions, class_position = _positions(shapes.get(trunk + "pos_embed", (1, 0, width))[1], registers)
    out = width if kind == "dino" else _trunk_out(shapes, width)
    return TowerShape(
        kind, width, _count(shapes, trunk + "blocks."), hidden, patch, positions, out, registers, gated, class_position
    )


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


def _positions(number: int, registers: int) -> tuple[int, bool]:
    """Patches form a square, so the number of positions tells whether [CLS] (and registers) have one, too."""
    for prefixed in (1, 0, 1 + registers):
        patches = number - prefixed
        if patches > 0 and isqrt(patches) ** 2 == patches:
            return patches, prefixed > 0
    return max(number, 0), False


def _trunk_out(shapes: Mapping[str, Shape], width: int) -> int:
    for key in ("head.proj.weight", "head.mlp.fc2.weight", "trunk.head.weight"):
        if key in shapes:
            return shapes[key][0]
    return width


# --- words ---

_SIZES = {
    (192, 12): "Ti",
    (384, 12): "S",
    (768, 12): "B",
    (1024, 24): "L",
    (1280, 32): "H",
    (1408, 40): "g",
    (1536, 40): "g",
    (1664, 48): "bigG",
    (1152, 27): "SO400M",
}


def describe(file: EncoderFile | TowerShape) -> str:
    """For people: "CLIP ViT-H/14 (1280 wide, 32 layers, 224 px, embedding 1024)"."""
    shape = file.shape if isinstance(file, EncoderFile) else file
    size = _SIZES.get((shape.width, shape.depth))
    vit = f"ViT-{size}/{shape.patch}" if size else f"ViT with {shape.patch} px patches"
    facts = [f"{shape.width} wide", f"{shape.depth} layers"]
    if shape.mlp != 4 * shape.width and not (shape.gated and size):
        facts.append(f"MLP {shape.mlp}")
    if shape.kind == "clip":
        facts.append(f"{shape.patch * isqrt(shape.positions)} px" if shape.positions else "rotary positions")
        facts.append(f"embedding {shape.out}" if shape.out else "no projection to an embedding")
        return f"CLIP {vit} ({', '.join(facts)})"
    if shape.registers:
        facts.append(f"{shape.registers} registers")
    family = "DINOv2" if shape.patch == 14 and shape.positions else "vision transformer"
    if shape.patch == 16 and not shape.positions and shape.registers:
        family = "DINOv3"
    return f"{family} {vit} ({', '.join(facts)})"
