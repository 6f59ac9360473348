"""Public IP-Adapter files as FlexIP adapters: recognised by keys and shapes, one or two of them behind one gate.

Layouts are those of tencent-ailab/IP-Adapter (ip_adapter/ip_adapter.py and resampler.py), as h94/IP-Adapter publishes them; other
wrappings of the same tensors come under these names by `ip_adapter_layouts`:
`image_proj.*` makes the tokens, `ip_adapter.<1, 3, 5, ...>.to_k_ip.weight` and `to_v_ip.weight` project them per
cross-attention, counted through the input blocks, the output blocks, then the middle block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..network.adapters import ADAPTERS, BlockKV, KVProjection
from ..network.config import ClipConfig, FeatureNeed, ResamplerConfig
from ..network.ip_projections import FullProjection, PlainProjection, PlusProjection
from .ip_adapter_layouts import Shapes, Unsupported, Unwrapped, check_all_used, check_not_empty, foreign, unwrap
from .weights import one_line, read_header, read_weights


@dataclass(frozen=True)
class Family:
    """Files of one layout. `sign` is the key that gives the layout away."""

    name: str
    files: tuple[str, ...]  # the public files of this layout, for people: README's table
    sign: str
    kind: str  # the CLIP feature it reads: "embedding" or "penultimate"
    null: str  # what its unconditional branch reads: "zeros" or "zero pixels" (diffusers' prepare_ip_adapter_image_embeds)


# Source of the layouts: diffusers, loaders/unet.py, _convert_ip_adapter_image_proj_to_diffusers; the files: h94/IP-Adapter,
# ostris/ip-composition-adapter; for NoobAI and Illustrious, civitai.com/models/1121145 and kataragi/Noob_ipadapter: their sizes in bytes
# (1,405,172,056 and 1,396,798,350) are those of plain SDXL files in float32 for CLIP bigG and ViT-H.
FAMILIES = (
    Family(
        "plain",
        (
            "ip-adapter_sd15",
            "ip-adapter_sd15_light",
            "ip-adapter_sd15_light_v11",
            "ip-adapter_sd15_vit-G",
            "ip-adapter_sdxl",
            "ip-adapter_sdxl_vit-h",
            "noobIPAMARK1_mark1",
            "ip_adapter_Noobtest_800000",
        ),
        "proj.weight",
        "embedding",
        "zeros",
    ),
    Family(
        "plus",
        (
            "ip-adapter-plus_sd15",
            "ip-adapter-plus-face_sd15",
            "ip_plus_composition_sd15",
            "ip-adapter-plus_sdxl_vit-h",
            "ip-adapter-plus-face_sdxl_vit-h",
            "ip_plus_composition_sdxl",
        ),
        "latents",
        "penultimate",
        "zero pixels",
    ),
    Family("full face", ("ip-adapter-full-face_sd15",), "proj.3.weight", "penultimate", "zero pixels"),
)
# CLIP image towers by (token width, embedding width), and the one that is meant when a file shows only one of the two.
TOWERS = {(1280, 1024): "ViT-H-14", (1664, 1280): "ViT-bigG-14", (1024, 768): "ViT-L-14-quickgelu"}


def _blocks(*runs: tuple[str, tuple[int, ...], int, int]) -> dict[str, int]:
    return {
        f"{kind}.{number}.{index}": width
        for kind, numbers, layers, width in runs
        for number in numbers
        for index in range(layers)
    }


# Cross-attentions in the order of IP-Adapter's numbers, with their widths.
BASES = {
    "SD1.5": (
        768,
        _blocks(
            ("input", (1, 2), 1, 320),
            ("input", (4, 5), 1, 640),
            ("input", (7, 8), 1, 1280),
            ("output", (3, 4, 5), 1, 1280),
            ("output", (6, 7, 8), 1, 640),
            ("output", (9, 10, 11), 1, 320),
            ("middle", (0,), 1, 1280),
        ),
    ),
    "SDXL": (
        2048,
        _blocks(
            ("input", (4, 5), 2, 640),
            ("input", (7, 8), 10, 1280),
            ("output", (0, 1, 2), 10, 1280),
            ("output", (3, 4, 5), 2, 640),
            ("middle", (0,), 10, 1280),
        ),
    ),
}


@dataclass(frozen=True)
class IPAdapterFile:
    """A recognised file. `blocks` maps ComfyUI's block addresses to widths, in the order of the file's numbers."""

    family: Family
    base: str
    text_width: int
    blocks: dict[str, int]
    clip: ClipConfig
    width: int  # of the CLIP feature it reads
    layout: Unwrapped = Unwrapped({}, "")

    def describe(self) -> str:
        what = f"IP-Adapter {self.family.name} for {self.base}"
        return f"{what}, read from {self.layout.wrapping}" if self.layout.wrapping else what


def recognise(shapes: Shapes) -> IPAdapterFile | None:
    """None if it is not an IP-Adapter; otherwise a sentence without the file's name: Unsupported, or ValueError for a broken file."""
    try:
        return _recognise(shapes)
    except KeyError as error:
        raise ValueError(f"looks like an IP-Adapter, but has no tensor {error.args[0]}; download it again") from None
    except IndexError:
        raise ValueError(
            "looks like an IP-Adapter, but its tensors have too few dimensions; download it again"
        ) from None


def _recognise(shapes: Shapes) -> IPAdapterFile | None:
    unwrapped = unwrap(shapes)
    if words := foreign(shapes, unwrapped):
        raise Unsupported(words)
    named = {name: shapes[key] for name, key in unwrapped.names.items()}
    family = next((family for family in FAMILIES if f"image_proj.{family.sign}" in named), None)
    pairs = _projections(named)
    if not pairs:
        if family is not None:
            check_not_empty(unwrapped, shapes)
        return None
    if family is None:
        raise Unsupported(
            "is an IP-Adapter whose image projection FlexIP does not know; FlexIP runs plain, plus and full face ones"
        )
    check_all_used(unwrapped, [name for pair in pairs for name in pair])
    widths = [named[k][0] for k, _ in pairs]
    text_width = named[pairs[0][0]][1]
    for base, (base_text, blocks) in BASES.items():
        if widths == list(blocks.values()) and text_width == base_text:
            width = _feature_width(family, named)
            _check_sizes(named)
            return IPAdapterFile(family, base, text_width, blocks, _tower(family, width), width, unwrapped)
    raise Unsupported(
        f"is an IP-Adapter ({family.name}) with {len(pairs)} cross-attentions and text width {text_width}; FlexIP runs those for "
        "SD1.5 (16, 768) and SDXL (70, 2048)"
    )


def _projections(names: Iterable[str]) -> list[tuple[str, str]]:
    """Published names of to_k and to_v in the order of their numbers."""
    numbers = {
        int(match[1])
        for name in names
        if (match := re.fullmatch(r"ip_adapter\.([0-9]{1,4})\.to_[kv]_ip\.weight", name))
    }
    return [(f"ip_adapter.{n}.to_k_ip.weight", f"ip_adapter.{n}.to_v_ip.weight") for n in sorted(numbers)]


def _check_sizes(shapes: Shapes) -> None:
    """Views let a small pickle show tensors of any size, and a network would be built for them."""
    for key, shape in shapes.items():
        if not all(0 < side <= LARGEST for side in shape):
            raise ValueError(
                f"looks like an IP-Adapter, but its tensor {one_line(key, 80)} has the shape {list(shape)[:8]}, expected numbers "
                f"from 1 to {LARGEST}; download it again"
            )


def _feature_width(family: Family, shapes: Shapes) -> int:
    return shapes[
        {
            "plain": "image_proj.proj.weight",
            "plus": "image_proj.proj_in.weight",
            "full face": "image_proj.proj.0.weight",
        }[family.name]
    ][1]


def _tower(family: Family, width: int) -> ClipConfig:
    for (tokens, embedding), model in TOWERS.items():
        if width == (embedding if family.kind == "embedding" else tokens):
            return ClipConfig(model, embedding)
    known = ", ".join(f"{model} ({tokens}, embedding {embedding})" for (tokens, embedding), model in TOWERS.items())
    raise Unsupported(
        f"is an IP-Adapter ({family.name}) for a CLIP {family.kind} {width} wide, and FlexIP knows no such CLIP; known are {known}"
    )


_PLUS_NAMES = (
    (r"^latents$", "latents"),
    (r"^proj_in\.", "resampler.context_in."),
    (r"^proj_out\.", "resampler.out."),
    (r"^norm_out\.", "resampler.norm_out."),
    (r"^layers\.(\d+)\.0\.norm1\.", r"resampler.layers.\1.norm_context."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"resampler.layers.\1.norm_latents."),
    (r"^layers\.(\d+)\.0\.(to_q|to_k|to_v|to_kv|to_out)\.", r"resampler.layers.\1.\2."),
    (r"^layers\.(\d+)\.1\.0\.", r"resampler.layers.\1.norm_ff."),
    (r"^layers\.(\d+)\.1\.1\.", r"resampler.layers.\1.ff_in."),
    (r"^layers\.(\d+)\.1\.3\.", r"resampler.layers.\1.ff_out."),
)
_FULL_NAMES = ((r"^proj\.0\.", "proj_in."), (r"^proj\.2\.", "proj_out."), (r"^proj\.3\.", "norm."))
LARGEST = 65536  # of all dimensions; the public files stay below 11,000
DIM_HEAD = 64  # of the plus family's resampler, in all public files; not visible in the shapes


class SingleAdapter(nn.Module):
    """One IP-Adapter file: image projection, and to_k, to_v per block."""

    def __init__(
        self, file: IPAdapterFile, tensors: Mapping[str, torch.Tensor], operations: Any = nn, name: str = "a file"
    ):
        """`tensors` under the published names."""
        super().__init__()
        self.file, self.name = file, name
        proj = {
            key.removeprefix("image_proj."): value for key, value in tensors.items() if key.startswith("image_proj.")
        }
        with torch.device("meta"):
            self.image_proj = _image_projection(file, proj, operations)
            self.kv = nn.ModuleList(KVProjection(file.text_width, width, operations) for width in file.blocks.values())
            # the shapes of torch's own layers: those of ComfyUI may have no weights before they are loaded
            plain = _image_projection(file, proj, nn)
            plain_kv = [KVProjection(file.text_width, width) for width in file.blocks.values()]
        _fill(self.image_proj, plain, _renamed(file.family, proj))
        for kv, plain_one, (to_k, to_v) in zip(self.kv, plain_kv, _projections(tensors)):
            _fill(kv, plain_one, {"to_k.weight": tensors[to_k], "to_v.weight": tensors[to_v]})


class _Misfit(ValueError):
    """Tensors that do not fit together, in words."""


def _fill(module: nn.Module, plain: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """`plain`: the same module of torch's own layers."""
    wanted = {key: list(value.shape) for key, value in plain.state_dict().items()}
    for key in (*wanted, *tensors):
        if key not in tensors:
            raise KeyError(key)
        if key not in wanted:
            raise _Misfit(f"it has an unknown tensor {one_line(key, 80)}")
        if list(tensors[key].shape) != wanted[key]:
            raise _Misfit(f"{key} has the shape {list(tensors[key].shape)[:8]}, expected {wanted[key]}")
    module.load_state_dict(tensors, strict=True, assign=True)


def _image_projection(file: IPAdapterFile, proj: Mapping[str, torch.Tensor], operations: Any) -> nn.Module:
    out = file.text_width
    if file.family.name == "plain":
        return PlainProjection(file.width, out, proj["proj.weight"].shape[0] // out, operations)
    if file.family.name == "full face":
        return FullProjection(file.width, out, operations)
    depth = len({key.split(".")[1] for key in proj if key.startswith("layers.")})
    width = proj["latents"].shape[2]
    cfg = ResamplerConfig(
        width,
        depth,
        proj["layers.0.0.to_q.weight"].shape[0] // DIM_HEAD,
        DIM_HEAD,
        proj["layers.0.1.1.weight"].shape[0] // width,
    )
    return PlusProjection(cfg, file.width, out, proj["latents"].shape[1], operations)


def _renamed(family: Family, proj: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rules = {"plain": (), "plus": _PLUS_NAMES, "full face": _FULL_NAMES}[family.name]
    out = {}
    for key, value in proj.items():
        for pattern, replacement in rules:
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        if key.endswith(".to_kv.weight"):
            if value.ndim != 2 or value.shape[0] % 2:
                raise _Misfit(f"{key} has the shape {list(value.shape)[:8]}, expected two halves")
            out[key.replace("to_kv", "to_k")], out[key.replace("to_kv", "to_v")] = value.chunk(2)
        else:
            out[key] = value
    return out


def load_pair(
    preservation: str | os.PathLike, personalization: str | os.PathLike | None, operations: Any = nn
) -> IPAdapterPair:
    """One or two IP-Adapter files (safetensors, or pickles read with weights_only); ValueError in one sentence for anything else."""
    parts = [path and _load_single(path, operations) for path in (preservation, personalization)]
    pair = IPAdapterPair(*parts)
    return pair.eval().requires_grad_(False)


def _load_single(path: str | os.PathLike, operations: Any) -> SingleAdapter:
    header = read_header(path)
    name = one_line(Path(path).name, 300)
    try:
        file = recognise(header.shapes)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from None
    if file is None:
        keys = ", ".join(one_line(key, 80) for key in list(header.shapes)[:3])
        raise ValueError(
            f"{name} is neither a FlexIP checkpoint nor an IP-Adapter ({len(header.shapes)} tensors, {keys} ...). "
            "Choose a file that is one of them."
        )
    tensors = read_published(path, file)
    try:
        return SingleAdapter(file, tensors, operations, name)
    except KeyError as error:
        raise ValueError(
            f"{name} looks like an {file.describe()}, but has no tensor {error.args[0]}. Download it again."
        ) from None
    except (_Misfit, IndexError) as error:
        reason = "some have too few dimensions" if isinstance(error, IndexError) else error
        raise ValueError(
            f"{name} looks like an {file.describe()}, but its tensors do not fit together ({reason}). Download it again."
        ) from None


def read_published(path: str | os.PathLike, file: IPAdapterFile) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the published names."""
    tensors = read_weights(path, file.layout.names.values())
    return {name: tensors[key] for name, key in file.layout.names.items()}


class IPAdapterPair(nn.Module):
    """One or two IP-Adapters with FlexIP's network interface: preservation weighted by the gate, personalization by 1 - gate."""

    gate_mode = "outputs"

    def __init__(self, preservation: SingleAdapter | None, personalization: SingleAdapter | None):
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: part for name, part in zip(ADAPTERS, (preservation, personalization)) if part is not None}
        )
        file = next(iter(self.parts.values())).file
        self.base, self.text_width, self.block_widths = file.base, file.text_width, file.blocks
        if any(part.file.base != file.base for part in self.parts.values()):
            names = " but ".join(f"{part.name} is an {part.file.describe()}" for part in self.parts.values())
            raise ValueError(f"{names}. Choose two files for the same base.")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(part.file.describe() for part in self.parts.values())

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @staticmethod
    def reads_text(adapter: str) -> bool:
        return False

    def needs(self) -> tuple[FeatureNeed, ...]:
        return tuple(
            FeatureNeed(name, part.file.clip, part.file.family.kind, part.file.width, part.file.family.null)
            for name, part in self.parts.items()
        )

    def tokens(
        self, adapter: str, features: Mapping[str, torch.Tensor], text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(1, r * tokens, w): the references side by side."""
        return self.parts[adapter].image_proj(features[adapter]).flatten(0, 1).unsqueeze(0)

    def token_groups(self, adapter: str, count: int) -> dict[str, list[int]]:
        return {adapter: list(range(count))}

    def project(self, adapter: str, tokens: torch.Tensor) -> BlockKV:
        return {
            address: (kv.to_k(tokens), kv.to_v(tokens))
            for address, kv in zip(self.block_widths, self.parts[adapter].kv)
        }

    def projection(self, address: str, adapter: str) -> KVProjection:
        return self.parts[adapter].kv[list(self.block_widths).index(address)]
