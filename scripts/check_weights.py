#!/usr/bin/env python3
"""Says what the weight files in a folder are, and whether FlexIP can use them. Run it with ComfyUI's Python:

    python scripts/check_weights.py ComfyUI/models

Every file is recognised by its contents, loaded, and its image projection compared with diffusers' where diffusers is
installed. Needs no GPU. The exit code is 1 if a file that should load does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flexip_core
from flexip_core.encoders import layouts, towers
from flexip_core.files import ip_adapter
from flexip_core.files.checkpoint import is_flexip, load_checkpoint
from flexip_core.files.folders import any_system
from flexip_core.files.stored import first_parts
from flexip_core.files.weights import Header, read_header
from flexip_core.network.config import ClipConfig, DinoConfig

SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
TOLERANCE = 1e-3  # of an image projection against diffusers', in float32; its tokens are layer-normed
Encoder = ClipConfig | DinoConfig


@dataclass
class Row:
    file: str
    what: str
    wants: str = "-"
    loads: str = "-"  # yes, NO, or - where nothing is to be loaded
    diffusers: str = "-"


def check_folder(folder: Path) -> Iterator[Row]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    names = [str(path.relative_to(folder)) for path in found]
    paths = [folder / name for name in first_parts([name for name in names if not any_system(name)])]
    wanted: list[Encoder] = [ClipConfig(model, width) for (_, width), model in ip_adapter.TOWERS.items()] + [
        DinoConfig()
    ]
    for path in paths:
        wanted += _wanted_by_flexip(path)
    for path in paths:
        row = Row(str(path.relative_to(folder)), "")
        try:
            _check(path, row, wanted)
        except ValueError as error:
            row.what, row.loads = f"{row.what}: {error}".removeprefix(": "), "NO"
        yield row


def _wanted_by_flexip(path: Path) -> list[Encoder]:
    try:
        if is_flexip(read_header(path)):
            cfg = load_checkpoint(path).cfg
            return [cfg.clip, cfg.dino]
    except ValueError:
        pass  # said in this file's own row
    return []


def _check(path: Path, row: Row, wanted: list[Encoder]) -> None:
    try:
        header = read_header(path)
    except ValueError as error:
        row.what = f"not readable here: {error}"
        # what another program wrote in its own way is not an error; a file that did not arrive whole is
        row.loads = "NO" if "download" in str(error) else "-"
        return
    if is_flexip(header):
        row.what = "FlexIP checkpoint"
        cfg = load_checkpoint(path).cfg
        row.what, row.loads = f"FlexIP checkpoint for {cfg.base}", "yes"
        row.wants = " and ".join(towers.describe_model(need) for need in (cfg.clip, cfg.dino))
        return
    try:
        adapter = ip_adapter.recognise(header.shapes)
    except ip_adapter.Unsupported as error:
        row.what = str(error)
        return
    if adapter is not None:
        row.what, row.wants = adapter.describe(), towers.describe_model(adapter.clip)
        _check_adapter(path, row, adapter)
    elif encoder := layouts.identify(header):
        row.what = layouts.describe(encoder)
        _check_encoder(path, row, header, wanted)
    else:
        row.what = "nothing of FlexIP's, such as a checkpoint or a LoRA; not checked"


def _check_adapter(path: Path, row: Row, adapter: ip_adapter.IPAdapterFile) -> None:
    projection = ip_adapter.load_pair(path, None).parts["preservation"].image_proj.float()
    shape = (1, adapter.width) if adapter.family.kind == "embedding" else (1, 257, adapter.width)
    feature = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = projection(feature)
        if not tokens.isfinite().all():
            raise ValueError("it loads, but gives numbers that are not finite; download it again")
        row.loads = "yes"
        try:
            from diffusers.loaders.unet import UNet2DConditionLoadersMixin
        except ImportError:
            row.diffusers = "not installed"
            return
        except Exception as error:  # noqa: BLE001 - diffusers' lazy imports fail in many ways beside another transformers
            row.diffusers = f"not compared ({type(error).__name__})"
            return
        tensors = {
            name.removeprefix("image_proj."): value
            for name, value in _as_published(ip_adapter.read_published(path, adapter)).items()
            if name.startswith("image_proj.")
        }
        try:  # a private function of diffusers: another version may have it otherwise
            convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
            theirs = convert(tensors, low_cpu_mem_usage=False).float()
        except (AttributeError, TypeError) as error:
            row.diffusers = f"not compared ({type(error).__name__})"
            return
        difference = (tokens - theirs(feature)).abs().max().item()
    row.diffusers = f"{difference:.1e}"
    if not difference < TOLERANCE:
        raise ValueError(f"its image projection differs from diffusers' by {difference:.1e}; please report this")


def _as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With to_k and to_v of the image projection as one tensor, where the file has them apart."""
    for name in [name for name in tensors if name.startswith("image_proj.layers.") and name.endswith(".to_k.weight")]:
        parts = tensors.pop(name), tensors.pop(name.replace("to_k", "to_v"))
        tensors[name.replace("to_k", "to_kv")] = torch.cat(parts)
    return tensors


def _check_encoder(path: Path, row: Row, header: Header, wanted: list[Encoder]) -> None:
    cfg = next((cfg for cfg in wanted if towers.fits_shapes(header.shapes, cfg)), None)
    if cfg is None:
        row.what += ", which no adapter here wants"
        return
    towers.load_tower(cfg, path, torch.float16)
    row.loads = "yes"


def print_table(rows: list[Row]) -> None:
    titles = Row("file", "what it is", "wants", "loads", "difference to diffusers")
    order = ("file", "loads", "diffusers", "wants", "what")  # the longest last
    cells = [[getattr(row, name) for name in order] for row in (titles, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="searched with all its sub-folders")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    rows = list(check_folder(folder))
    if not rows:
        print(f"No weight files in {folder} ({', '.join(sorted(SUFFIXES))}).")
        return 0
    print_table(rows)
    return 1 if any(row.loads == "NO" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
