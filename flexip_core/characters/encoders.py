"""The two encoders of references: open_clip's and timm's own classes, as small as a world of 64 px allows.

They read pictures enlarged to 128 px (each pixel twice as wide and high), the size at which ComfyUI shows the world, so that
EncodeReference gives the very features that training saw. The CLIP stand-in is trained on pictures and their captions. The DINO
stand-in is not trained: a patch token is the principal components of the patch's pixels beside its place.

Shape legend: n pictures (n, 3, SIZE, SIZE) in -1..1.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..encoders.towers import ClipTower, DinoTower, build_clip_tower, build_dino_tower
from ..network.config import ClipConfig, DinoConfig
from ..pictures import crop
from . import scenes
from .drawings import Drawings
from .render import SIZE, render
from .run import Plan
from .text import TextEncoder

ENLARGED = 2  # a pixel of the world, in pixels of ComfyUI
SIDE = SIZE * ENLARGED
PATCH = 16  # 8 x 8 pixels of the world

CLIP_WIDTH = 128
CLIP = ClipConfig(
    model="flexip-characters-clip",
    width=CLIP_WIDTH,
    vision_cfg={"width": 128, "layers": 3, "head_width": 32, "patch_size": PATCH, "image_size": SIDE},
)
PLAN = Plan("clip", steps=2500, batch=96, rate=1.5e-3, seed=11, falling=0.8)
DROPPED = 0.25  # chance of each word of a caption

_COMPONENTS, _PLACE_DIMS, _STEADY_DIMS = 96, 16, 16
_STEADY = 6.0  # against components of about 0.7 and places below 1
_EVENING = 0.6  # power of its deviation that a component is divided by
DINO = DinoConfig(
    model="vit_small_patch14_dinov2",
    width=_COMPONENTS + _PLACE_DIMS + _STEADY_DIMS,
    image_size=SIDE,
    args={
        "embed_dim": _COMPONENTS + _PLACE_DIMS + _STEADY_DIMS,
        "depth": 1,
        "num_heads": 2,
        "patch_size": PATCH,
        "init_values": 1e-5,
    },
)


def enlarge(pictures: Tensor) -> Tensor:
    """n pictures -> (n, SIDE, SIDE, 3) in 0..1, as ComfyUI passes images around"""
    return _wide(pictures * 0.5 + 0.5).movedim(1, -1)


def shrink(shown: Tensor) -> Tensor:
    """(n, h, w, 3) in 0..1 -> (n, 3, h / 2, w / 2) in -1..1, the way back from `enlarge`"""
    return F.avg_pool2d(shown.movedim(-1, 1), ENLARGED) * 2 - 1


def pixels_for(tower: ClipTower | DinoTower, pictures: Tensor) -> Tensor:
    """n pictures -> what the tower reads, (n, 3, SIDE, SIDE): enlarged last, which is the same and cheaper"""
    return _wide(_normalised(tower, pictures))


def _normalised(tower: ClipTower | DinoTower, pictures: Tensor) -> Tensor:
    return crop.normalise((pictures * 0.5 + 0.5).movedim(1, -1), tower.mean, tower.std)


def _wide(pictures: Tensor) -> Tensor:
    return pictures.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)


class Contrast(nn.Module):
    """The CLIP stand-in with its text side, which only training and scores need."""

    def __init__(self, tower: ClipTower):
        super().__init__()
        self.tower = tower
        self.text = TextEncoder(CLIP_WIDTH, layers=1)
        self.out = nn.Linear(CLIP_WIDTH, CLIP_WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """n pictures -> (n, 128), unit length"""
        return F.normalize(self.tower(pixels_for(self.tower, pictures)).float(), dim=-1)

    def of_captions(self, captions: Tensor) -> Tensor:
        """(n, slots) -> (n, 128), unit length"""
        return F.normalize(self.out(self.text(captions).mean(1)).float(), dim=-1)


def untrained(seed: int) -> Contrast:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Contrast(build_clip_tower(CLIP))


class ContrastLoss:
    """Pictures against their captions, from which words are missing."""

    def __init__(self, drawings: Drawings, batch: int):
        self.drawings, self.batch = drawings, batch

    def __call__(self, clip: Contrast, g: torch.Generator) -> Tensor:
        device = self.drawings.device
        shown = scenes.stage(scenes.characters(self.batch, g), g)
        captions = scenes.captions(shown)
        captions = captions.masked_fill(torch.rand(captions.shape, generator=g) < DROPPED, 0).to(device)
        pictures = render(self.drawings, shown)
        with torch.autocast(device.type, torch.bfloat16):
            seen, said = clip.of_pictures(pictures), clip.of_captions(captions)
        scores = seen @ said.T * clip.scale.exp()
        right = torch.arange(self.batch, device=device)
        return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@torch.no_grad()
def top1(clip: Contrast, drawings: Drawings, n: int, seed: int) -> float:
    """Share of held-out pictures whose own full caption is the nearest of n."""
    g = torch.Generator().manual_seed(seed)
    shown = scenes.stage(scenes.characters(n, g, "test"), g)
    captions = scenes.captions(shown).to(drawings.device)
    nearest = (clip.of_pictures(render(drawings, shown)) @ clip.of_captions(captions).T).argmax(1)
    return (nearest == torch.arange(n, device=nearest.device)).float().mean().item()


def make_dino(pictures: Tensor, seed: int = 7) -> DinoTower:
    """A ViT whose patch tokens are the principal components of the patch (learned from n `pictures`) beside its place.

    The last norm divides by the token's length. Sixteen steady entries make up nearly all of that length, so that the division
    hardly changes what the pixels say; the norm's weights hide them afterwards.
    """
    tower = build_dino_tower(DINO)
    model, per_side, inner = tower.model, SIDE // PATCH, PATCH // ENLARGED
    rows = F.unfold(_normalised(tower, pictures), inner, stride=inner).movedim(1, 2).flatten(0, 1)
    mean = rows.mean(0)
    variance, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    deviations = variance.flip(0)[:_COMPONENTS].clamp(min=1e-8).sqrt()
    scale = deviations**_EVENING * deviations[0] ** (1 - _EVENING) / 2  # the first has a deviation of 2
    filters = directions.flip(1)[:, :_COMPONENTS].T / scale.unsqueeze(1)
    kernel = filters.view(_COMPONENTS, 3, inner, inner)
    kernel = kernel.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3) / ENLARGED**2

    angle = torch.arange(per_side)[:, None] * torch.tensor([0.2, 0.4, 0.8, 1.6])
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (8, 8)
    place = torch.cat([wave[:, None].expand(-1, per_side, -1), wave[None].expand(per_side, -1, -1)], dim=-1)
    steady = _STEADY * torch.ones(_STEADY_DIMS)
    steady[1::2] *= -1
    length = math.sqrt(steady.square().sum() / DINO.width)
    g = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * parameter.shape[1] ** -0.5)
        model.patch_embed.proj.weight.zero_()[:_COMPONENTS] = kernel
        model.patch_embed.proj.bias.zero_()[:_COMPONENTS] = -(filters @ mean)
        model.cls_token.zero_()
        model.pos_embed.zero_()[..., -_STEADY_DIMS:] = steady
        model.pos_embed[0, 1:, _COMPONENTS:-_STEADY_DIMS] = place.flatten(0, 1)
        model.norm.weight.fill_(length)[-_STEADY_DIMS:] = 0
        model.norm.bias.zero_()
    return tower.eval().requires_grad_(False)
