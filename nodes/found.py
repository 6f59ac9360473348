"""Which adapter files fit a model, and which of them a preset of FlexIPStart means: by their headers, and names only among equals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..flexip_core.files.checkpoint import is_flexip, read_config
from ..flexip_core.files.ip_adapter import BASES, recognise
from ..flexip_core.files.weights import read_header
from ..flexip_core.network.blocks import block_widths
from . import files

FLEXIP = "FlexIP"
SOURCE = "huggingface.co/h94/IP-Adapter"
# What to ask for where nothing fits: (family, whether faces, base) -> the public file and its folder there.
PUBLIC = {
    ("plain", False, "SD1.5"): "models/ip-adapter_sd15.safetensors",
    ("plus", False, "SD1.5"): "models/ip-adapter-plus_sd15.safetensors",
    ("plus", True, "SD1.5"): "models/ip-adapter-plus-face_sd15.safetensors",
    ("plain", False, "SDXL"): "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
    ("plus", False, "SDXL"): "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
    ("plus", True, "SDXL"): "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
}


@dataclass(frozen=True)
class Wanted:
    """An IP-Adapter file that a preset reads. The headers of "plus" files for faces, for compositions and for everything else are alike,
    so among those the name tells."""

    family: str
    face: bool = False

    def meant(self, file: Found) -> bool:
        if self.face and file.family == "full face":
            return True
        name = file.name.lower()
        return file.family == self.family and ("face" in name) == self.face and "composition" not in name


@dataclass(frozen=True)
class Found:
    name: str
    family: str  # FLEXIP, or that of an IP-Adapter
    clip: str = ""  # the encoder that an IP-Adapter reads


def base_of(model: Any) -> str | None:
    """ "SD1.5", "SDXL", or None for everything that public files are not made for."""
    widths, text_width = block_widths(model.model.diffusion_model)
    return next((base for base, (text, blocks) in BASES.items() if (widths, text_width) == (blocks, text)), None)


def fitting(model: Any, node: str) -> list[Found]:
    """Every adapter file that is made for blocks like the model's, in the order of the folders. Others are left out silently:
    choosing one by its name says what is wrong with it."""
    wanted = block_widths(model.model.diffusion_model)
    out = []
    for name in files.adapter_names():
        try:
            header = read_header(files.adapter_path(name, node))
            if is_flexip(header):
                config = read_config(header)
                found, blocks, text = Found(name, FLEXIP), config.blocks, config.text_width
            elif file := recognise(header.shapes):
                found = Found(name, file.family.name, file.clip.model)
                blocks, text = file.blocks, file.text_width
            else:
                continue
        except ValueError:
            continue
        if (blocks, text) == wanted:
            out.append(found)
    return out


def first_fitting(model: Any, node: str) -> str:
    """The first file that fits the model, whatever its kind."""
    if model is None:
        raise ValueError(
            f"{node}: preservation is {files.AUTO}, which looks for a file that fits the model. Wire the model into it, or choose a file."
        )
    if found := fitting(model, node):
        return found[0].name
    where = " or ".join(map(files.searched, files.ADAPTER_FOLDERS))
    raise ValueError(
        f"{node}: no adapter file in {where} is made for this model. Files found there: {files.listed(files.adapter_names())}. "
        f"For SD1.5 and SDXL there are some at {SOURCE}."
    )


def choose(wanted: Wanted, found: list[Found], base: str, node: str, clip: str = "") -> Found:
    """The file that is meant, one for the encoder `clip` if there is any; ValueError names the public one that is missing."""
    meant = [file for file in found if wanted.meant(file)]
    if meant:
        return next((file for file in meant if file.clip == clip), meant[0])
    folder, _, name = PUBLIC[wanted.family, wanted.face, base].rpartition("/")
    where = files.searched("ipadapter")
    raise ValueError(f"{node}: {name} is missing. Download it from {SOURCE} ({folder}) into {where}, and press R.")
