"""The adapters that a run begins with: from the seed, from the base's own text projections, or from weights that are trained already."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from ..files.checkpoint import is_flexip, load_checkpoint
from ..files.ip_adapter import load_pair
from ..files.weights import name_of, read_header
from ..integrations.diffusers import block_widths, text_projections
from ..network.adapters import ADAPTERS, FlexIPNetwork
from ..network.config import FlexIPConfig
from ..network.ip_projections import PlusProjection
from .base import Base
from .config import TrainConfig


def make_network(cfg: TrainConfig, base: Base) -> FlexIPNetwork:
    """The adapters for this base, from the seed."""
    projections = text_projections(base.unet)
    for address, (to_k, _) in projections.items():
        if to_k.shape[1] != base.text_width:
            raise ValueError(
                f"The base says that its text is {base.text_width} wide, its cross-attention at {address} reads {to_k.shape[1]}; "
                "give the UNet and the text encoder of one model."
            )
    choices = {name: getattr(cfg.network, name) for name in vars(cfg.network)}
    about = FlexIPConfig(base.name, base.text_width, block_widths(base.unet), clip=base.clip, dino=base.dino, **choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        network = FlexIPNetwork(about)
    if cfg.start == "text":
        network.init_from_text(projections)
    elif cfg.start == "zero":
        network.init_no_op()
    return network


def trained_weights(paths: Iterable[str], network: FlexIPNetwork) -> dict[str, torch.Tensor]:
    """What of these files fits the network, under its names: a FlexIP file, or one or two IP-Adapter files (the first becomes
    preservation, the second personalization). It says what was taken. ValueError, one sentence, for a file of which nothing fits."""
    names = list(paths)
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    if len(names) > len(ADAPTERS):
        raise ValueError(f"start_from names {len(names)} files; give one FlexIP file, or one or two IP-Adapter files.")
    flexip = [is_flexip(read_header(path)) for path in names]
    if any(flexip) and len(names) > 1:
        raise ValueError(
            f"start_from: {name_of(names[flexip.index(True)])} is a FlexIP file, which holds both adapters; give it alone."
        )
    taken: dict[str, torch.Tensor] = {}
    for path, adapter in zip(names, ADAPTERS):
        found = load_checkpoint(path).state_dict() if flexip[0] else _of_ip_adapter(path, adapter)
        own = {key: value for key, value in found.items() if wanted.get(key) == value.shape}
        if not any(key.startswith("blocks.") for key in own):
            raise ValueError(
                f"start_from: K and V in {name_of(path)} do not fit these adapters, it is for another base; choose another file, or take "
                "the line out."
            )
        logging.info("%s: %s.", name_of(path), _told(own, found, wanted))
        taken |= own
    return {key: value.float() for key, value in taken.items()}


def _of_ip_adapter(path: str, adapter: str) -> dict[str, torch.Tensor]:
    """K and V of every block, and of a plus file for preservation the detail branch: our own resampler, which there read CLIP's tokens.

    Its projection of those tokens stays behind, because here DINO's come in, and is left out also where the widths agree.
    """
    pair = load_pair(path, None)
    found = {
        f"blocks.{address}.{adapter}.{name}": value
        for address in pair.block_widths
        for name, value in pair.projection(address, ADAPTERS[0]).state_dict().items()
    }
    tokens = pair.parts[ADAPTERS[0]].image_proj
    if adapter == ADAPTERS[0] and isinstance(tokens, PlusProjection):
        found["preservation.queries"] = tokens.latents.detach()
        found |= {
            f"preservation.detail.{name}": value
            for name, value in tokens.resampler.state_dict().items()
            if not name.startswith("context_in.")
        }
    return found


def _told(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size]) -> str:
    parts = {
        "K and V": "blocks.",
        "detail": ("preservation.queries", "preservation.detail."),
        "semantic": ("preservation.cls_in", "preservation.semantic."),
        "personalization": "personalization.",
    }
    counts = {
        name: (sum(key.startswith(begin) for key in own), sum(key.startswith(begin) for key in wanted))
        for name, begin in parts.items()
    }
    told = ", ".join(f"{name} {some} of {all_} tensors" for name, (some, all_) in counts.items())
    left = len(found) - len(own)
    return (
        f"taken are {told}"
        + (f"; {left} tensors of the file fit nothing here" if left else "")
        + "; the rest begins from the seed"
    )
