"""The embedded mini models: the whole pack in a few megabytes, made on the spot, for the demo and the tests.

They have the architecture of the real ones and random weights. They are UNTRAINED: what they draw is coloured noise,
and only shows that everything runs and that the gate acts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..files.weights import write_atomically
from ..network.config import ClipConfig, DinoConfig, FlexIPConfig, ResamplerConfig
from .mini_checkpoints import block_widths, make_base

MINI_BASE = "flexip_mini_sd15.ckpt"
MINI_FLEXIP = "flexip_mini.safetensors"
MINI_CLIP_FILE = "flexip_mini_clip.safetensors"
MINI_DINO_FILE = "flexip_mini_dino.safetensors"

MINI_LAYOUT = "sd15_min"
MINI_CLIP = ClipConfig(
    model="flexip-mini-clip",
    width=32,
    vision_cfg={"width": 64, "layers": 2, "head_width": 32, "patch_size": 14, "image_size": 224},
)
MINI_DINO = DinoConfig(
    model="vit_small_patch14_dinov2",
    width=64,
    image_size=224,
    # DINOv2 starts its layer scale at 1e-5; untrained, the blocks would then do nothing
    args={"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1.0},
)
MINI_CONFIG = FlexIPConfig(
    base="FlexIP mini SD1.5",
    text_width=768,
    blocks=block_widths(MINI_LAYOUT),
    clip=MINI_CLIP,
    dino=MINI_DINO,
    resampler=ResamplerConfig(width=64, depth=1, heads=2, dim_head=32, ff_mult=2),
)


def make_mini_models(models: str | Path, seed: int = 0) -> None:
    """Everything, in the folders of a ComfyUI `models` folder."""
    make_mini_base(Path(models) / "checkpoints" / MINI_BASE, seed)
    make_mini_encoders(Path(models) / "clip_vision", seed)
    make_mini_flexip(Path(models) / "flexip" / MINI_FLEXIP, seed)


def make_mini_base(path: str | Path, seed: int = 0) -> None:
    """An SD1.5-class checkpoint for the stock CheckpointLoaderSimple: UNet, CLIP-L, VAE."""
    make_base(path, MINI_LAYOUT, seed)


def make_mini_encoders(folder: str | Path, seed: int = 0) -> None:
    """A CLIP as open_clip saves it and a DINOv2 as timm saves it."""
    image = {f"visual.{name}": value for name, value in _clip(seed).items()}
    _save(Path(folder) / MINI_CLIP_FILE, {**image, **_clip_text(seed)})
    _save(Path(folder) / MINI_DINO_FILE, _dino(seed))


def make_mini_flexip(path: str | Path, seed: int = 0) -> None:
    """A FlexIP checkpoint for the mini base and encoders."""
    from ..files.checkpoint import save_checkpoint
    from ..network.adapters import FlexIPNetwork

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _seeded(seed):
        network = FlexIPNetwork(MINI_CONFIG)
    save_checkpoint(network, path, torch.float16)


def _clip(seed: int) -> dict[str, Tensor]:
    from open_clip.model import _build_vision_tower  # slow to import, needed here only

    with _seeded(seed):
        return _build_vision_tower(MINI_CLIP.width, MINI_CLIP.vision_cfg).state_dict()


def _clip_text(seed: int) -> dict[str, Tensor]:
    """A text tower beside it, so that CLIP-T can be scored. In half precision: the vocabulary alone is 49408 words."""
    from ..encoders.text_tower import TextShape, build_text_tower

    with _seeded(seed):
        tower = build_text_tower(
            TextShape(width=64, depth=1, mlp=64, context=77, out=MINI_CLIP.width), quick_gelu=False
        )
        return {name: value.half() for name, value in tower.state_dict().items() if name != "attn_mask"}


def _dino(seed: int) -> dict[str, Tensor]:
    import timm

    with _seeded(seed):
        model = timm.create_model(MINI_DINO.model, img_size=MINI_DINO.image_size, num_classes=0, **MINI_DINO.args)
        return model.state_dict()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """open_clip and timm draw from the global generator; it is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    import safetensors.torch

    write_atomically(path, safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}))
