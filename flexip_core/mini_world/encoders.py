"""The two encoders of references: open_clip's and timm's own classes, as small as a 16 px world allows.

They read pictures enlarged to 64 px (each pixel four times as wide and high), the size at which ComfyUI shows the mini world, so
that EncodeReference gives the very features that training saw. The CLIP stand-in is trained on pictures and their captions; the
DINO stand-in is not trained at all: its patch embedding is a fixed rotation of the pixels, and its block does almost nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..encoders import towers
from ..encoders.towers import ClipTower, DinoTower, build_clip_tower, build_dino_tower
from ..network.config import ClipConfig, DinoConfig
from . import world
from .optimizer import warm_cosine
from .text import TextEncoder

ENLARGED = 4  # a pixel of the world, in pixels of ComfyUI
SIDE = world.SIZE * ENLARGED
PATCH = 16  # 4 x 4 pixels of the world

CLIP = ClipConfig(
    model="flexip-mini-world-clip",
    width=64,
    vision_cfg={"width": 64, "layers": 2, "head_width": 16, "patch_size": PATCH, "image_size": SIDE},
)
_PIXEL_DIMS, _PLACE_DIMS, _STEADY_DIMS = 64, 16, 16
DINO = DinoConfig(
    model="vit_small_patch14_dinov2",
    width=_PIXEL_DIMS + _PLACE_DIMS + _STEADY_DIMS,
    image_size=SIDE,
    args={
        "embed_dim": _PIXEL_DIMS + _PLACE_DIMS + _STEADY_DIMS,
        "depth": 1,
        "num_heads": 2,
        "patch_size": PATCH,
        "init_values": 1e-5,
    },
)


def enlarge(pictures: Tensor) -> Tensor:
    """(b, 3, h, w) in -1..1 -> (b, 4 h, 4 w, 3) in 0..1, as ComfyUI passes images around."""
    return _wide(pictures * 0.5 + 0.5).movedim(1, -1)


def shrink(images: Tensor) -> Tensor:
    """(b, 4 h, 4 w, 3) in 0..1 -> (b, 3, h, w) in -1..1, the way back from `enlarge`"""
    return F.avg_pool2d(images.movedim(-1, 1), ENLARGED) * 2 - 1


def pixels_for(tower: ClipTower | DinoTower, pictures: Tensor) -> Tensor:
    """(b, 3, 16, 16) in -1..1 -> what the tower reads, (b, 3, 64, 64)"""
    return towers.pixels_for(tower, _wide(pictures))


def _wide(pictures: Tensor) -> Tensor:
    return pictures.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)


class Contrast(nn.Module):
    """The CLIP stand-in with its text side, which only training and scores need."""

    def __init__(self, tower: ClipTower):
        super().__init__()
        self.tower = tower
        self.text = TextEncoder(CLIP.width)
        self.out = nn.Linear(CLIP.width, CLIP.width)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """(b, 3, 16, 16) -> (b, 64), unit length"""
        return F.normalize(self.tower(pixels_for(self.tower, pictures)), dim=-1)

    def of_captions(self, captions: Tensor) -> Tensor:
        """(b, 4) -> (b, 64), unit length"""
        return F.normalize(self.out(self.text(captions).mean(1)), dim=-1)


def untrained(seed: int) -> Contrast:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Contrast(build_clip_tower(CLIP))


def train_clip(seed: int, steps: int = 1000, batch: int = 64) -> Contrast:
    """Pictures against their captions, whose hue word is missing in three of ten."""
    clip = untrained(seed)
    g = torch.Generator().manual_seed(seed)
    optimizer, schedule = warm_cosine(clip.parameters(), 2e-3, steps)
    right = torch.arange(batch)
    for _ in range(steps):
        scene = world.draw_subjects(batch, g)
        captions = world.captions(scene)
        captions[torch.rand(batch, generator=g) < 0.3, world.HUE] = 0
        alike = (captions[:, None] == captions[None]).all(-1) & ~torch.eye(batch, dtype=torch.bool)
        scores = clip.of_pictures(world.render(scene, g)[0]) @ clip.of_captions(captions).T * clip.scale.exp()
        scores = scores.masked_fill(alike, -1e4)  # the same caption twice: neither is wrong
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def top1(clip: Contrast, n: int, seed: int) -> float:
    """Share of held-out pictures whose own full caption is the nearest of n."""
    g = torch.Generator().manual_seed(seed)
    scene = world.draw_subjects(n, g, held_out=True)
    captions = world.captions(scene)
    scores = clip.of_pictures(world.render(scene, g)[0]) @ clip.of_captions(captions).T
    nearest = captions[scores.argmax(1)]
    return (nearest == captions).all(1).float().mean().item()


def make_dino(seed: int = 7) -> DinoTower:
    """A ViT whose patch tokens are the pixels of the patch, rotated, beside its place.

    The last norm divides by the token's length. Sixteen steady entries make up nearly all of that length, so that the
    division hardly changes what the pixels say; the norm's weights hide them afterwards.
    """
    tower = build_dino_tower(DINO)
    g = torch.Generator().manual_seed(seed)
    per_side = SIDE // PATCH
    model, world_pixels = tower.model, 3 * (PATCH // ENLARGED) ** 2
    rotation = torch.randn(_PIXEL_DIMS, world_pixels, generator=g)
    rotation = torch.linalg.qr(rotation - rotation.mean(0))[0]  # columns of mean 0: the norm's mean stays 0
    kernel = rotation.view(_PIXEL_DIMS, 3, PATCH // ENLARGED, PATCH // ENLARGED)
    kernel = kernel.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3) / ENLARGED**2

    angle = torch.arange(per_side)[:, None] * torch.tensor([0.2, 0.4, 0.8, 1.6])
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (4, 8)
    place = torch.cat([wave[:, None].expand(-1, per_side, -1), wave[None].expand(per_side, -1, -1)], dim=-1)
    steady = 4.0 * torch.ones(_STEADY_DIMS)
    steady[1::2] *= -1
    length = math.sqrt(steady.square().sum() / DINO.width)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * parameter.shape[1] ** -0.5)
        model.patch_embed.proj.weight.zero_()[:_PIXEL_DIMS] = 0.5 * kernel
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()
        model.pos_embed.zero_()[..., -_STEADY_DIMS:] = steady
        model.pos_embed[0, 1:, _PIXEL_DIMS:-_STEADY_DIMS] = place.flatten(0, 1)
        model.norm.weight.fill_(length)[-_STEADY_DIMS:] = 0
        model.norm.bias.zero_()
    return tower.eval().requires_grad_(False)
