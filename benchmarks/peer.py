"""Random IP-Adapter plus files on the same UNet: through our own pair, and through IPAdapter_plus from a checkout that the user has.

Nothing of IPAdapter_plus is in this repository: its package is imported from the folder given on the command line.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from flexip_pack.flexip_core.files import ip_adapter
from flexip_pack.flexip_core.network.adapters import ADAPTERS
from flexip_pack.flexip_core.network.config import ClipConfig
from models import Link, Reference, managed, resting_place, runtime

TOKENS, ENCODER_WIDTH, DEPTH, HEADS_WIDTH = 16, 1280, 4, 64


def ipadapter_pair(bench: Any) -> Any:
    """The same two files as adapters of a gate."""
    return runtime.attach(bench.model, Link(*_pair(bench), _pair_reference(), (0.6,), title="plus + plus"))


def _pair(bench: Any) -> tuple[ip_adapter.IPAdapterPair, Any]:
    if "pair" not in bench._loaded:
        groups = plus_weights(bench)
        tensors = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
        family = next(family for family in ip_adapter.FAMILIES if family.name == "plus")
        base = {"sd15": "SD1.5", "sdxl": "SDXL"}[bench.base]
        blocks = {address: bench.widths[address] for address in file_order(bench.widths)}
        clip = ClipConfig("random", ENCODER_WIDTH)
        about = ip_adapter.IPAdapterFile(family, base, bench.text_width, blocks, clip, ENCODER_WIDTH)
        tensors = {key: value.to(resting_place(), bench.dtype) for key, value in tensors.items()}
        one, two = (ip_adapter.SingleAdapter(about, tensors, comfy.ops.manual_cast) for _ in range(2))
        pair = ip_adapter.IPAdapterPair(one, two).eval().requires_grad_(False)
        bench._loaded["pair"] = pair, managed(pair)
    return bench._loaded["pair"]


def _pair_reference() -> Reference:
    generator = torch.Generator().manual_seed(5)
    features = {name: torch.randn(1, 257, ENCODER_WIDTH, generator=generator) for name in ADAPTERS}
    return Reference(features, {name: torch.zeros_like(value) for name, value in features.items()}, "random")


def file_order(addresses: Iterable[str]) -> list[str]:
    """As a published file counts the blocks: the way down, the way up, the middle."""
    return sorted(addresses, key=lambda address: ("input", "output", "middle").index(address.split(".")[0]))


class Peer:
    def __init__(self, folder: Path, bench: Any):
        name = "ipadapter_plus_peer"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        self.node = sys.modules[name].NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]
        self.bench = bench
        self.weights = plus_weights(bench)
        generator = torch.Generator().manual_seed(5)
        self.embeds = [torch.randn(1, 257, ENCODER_WIDTH, generator=generator) for _ in range(2)]

    def applied(self, adapters: int) -> Any:
        model = self.bench.model
        for _ in range(adapters):
            pipeline = {"ipadapter": {"model": self.weights}, "clipvision": {"model": None}}
            model = self.node().apply_ipadapter(
                model, pipeline, self.embeds[0], 0.6, "linear", 0.0, 1.0, neg_embed=self.embeds[1]
            )[0]
        return model


def plus_weights(bench: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights in the layout of ip-adapter-plus_sd15 or ip-adapter-plus_sdxl_vit-h."""
    generator = torch.Generator().manual_seed(6)
    width = 768 if bench.text_width == 768 else 1280

    def linear(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into, generator=generator) / into**0.5

    proj = {
        "latents": torch.randn(1, TOKENS, width, generator=generator),
        "proj_in.weight": linear(width, ENCODER_WIDTH),
        "proj_in.bias": torch.zeros(width),
        "proj_out.weight": linear(bench.text_width, width),
        "proj_out.bias": torch.zeros(bench.text_width),
        "norm_out.weight": torch.ones(bench.text_width),
        "norm_out.bias": torch.zeros(bench.text_width),
    }
    for layer in range(DEPTH):
        for key, shape in (
            ("0.to_q", (width, width)),
            ("0.to_kv", (2 * width, width)),
            ("0.to_out", (width, width)),
            ("1.1", (4 * width, width)),
            ("1.3", (width, 4 * width)),
        ):
            proj[f"layers.{layer}.{key}.weight"] = linear(*shape)
        for key in ("0.norm1", "0.norm2", "1.0"):
            proj[f"layers.{layer}.{key}.weight"], proj[f"layers.{layer}.{key}.bias"] = (
                torch.ones(width),
                torch.zeros(width),
            )
    pairs = {
        f"{2 * n + 1}.to_{x}_ip.weight": linear(bench.widths[address], bench.text_width)
        for n, address in enumerate(file_order(bench.widths))
        for x in "kv"
    }
    return {"image_proj": proj, "ip_adapter": pairs}
