"""The world as a training task for the pack's trainer: `[task] make = "flexip_core.characters.task:make"` with its `home` folder.

Shape legend: n pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from ..encoders.towers import ClipTower, DinoTower, load_tower
from ..training.base import Task, Text
from ..training.data import ALL, VARIANT, Batch
from ..training.losses import stable_diffusion_schedule
from . import base, drawings, files, scenes
from .architecture import TEXT_WIDTH
from .codec import Codec
from .drawings import Drawings
from .encoders import CLIP, DINO, Contrast, pixels_for, untrained
from .judge import Judge
from .render import render
from .scores import Instruments
from .text import TextEncoder
from .words import SLOTS

NAME = "FlexIP characters"
REFERENCES_IN_OWN_STYLE = 0.8  # a reference in ink tells no colours


def make(device: str, home: str) -> Task:
    world = load_world(Path(home)).to(device)
    return Task(world, CharacterPairs(drawings.load(Path(home) / files.DRAWINGS).to(device)))


class CharacterBase:
    """flexip_core.training.base.Base for the world: the frozen base and the encoders of references."""

    name = NAME
    prediction = "v"
    text_width = TEXT_WIDTH
    clip, dino = CLIP, DINO

    def __init__(self, unet: nn.Module, text: TextEncoder, codec: Codec, clip_tower: ClipTower, dino_tower: DinoTower):
        self.unet, self.text, self.codec, self.towers = unet, text, codec, (clip_tower, dino_tower)
        for module in self._modules():
            module.eval().requires_grad_(False)
        self.alphas_cumprod = stable_diffusion_schedule().float()

    def _modules(self) -> tuple[nn.Module, ...]:
        return (self.unet, self.text, self.codec, *self.towers)

    def to(self, device: str) -> CharacterBase:
        for module in self._modules():
            module.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def encode_text(self, captions: Tensor) -> Text:
        return Text(self.text(captions.to(self.device)))

    def empty_text(self) -> Text:
        return self.encode_text(torch.zeros(1, len(SLOTS), dtype=torch.long))

    def added_conditions(self, text: Text, latents: Tensor, sizes: Tensor | None = None) -> None:
        return None

    def to_latents(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(pictures.to(self.device))

    def to_pictures(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents).clamp(-1, 1)

    def features(self, references: Tensor) -> dict[str, Tensor]:
        clip, dino = self.towers
        pictures = references.to(self.device)
        return {"cls": clip(pixels_for(clip, pictures)), "patches": dino(pixels_for(dino, pictures))}


class CharacterPairs:
    """Endless training pairs; no held-out character, no held-out hair.

    Variant rows: the character staged anew. Invariant rows: the target itself.
    """

    phrases = SLOTS

    def __init__(self, drawings: Drawings):
        self.drawings = drawings

    def views(self) -> dict[str, int]:
        return {"every character": 2}

    def pictures(self) -> int:
        return 1_000_000_000  # without end

    def batch(self, kinds: Tensor, generator: torch.Generator, rows: slice = ALL) -> Batch:
        people = scenes.characters(len(kinds), generator)
        shown = scenes.stage(people, generator)
        elsewhere = scenes.stage(people, generator, own_style=REFERENCES_IN_OWN_STYLE)
        targets = render(self.drawings, shown.rows(rows))
        anew = render(self.drawings, elsewhere.rows(rows))
        variant = (kinds[rows] == VARIANT).view(-1, 1, 1, 1).to(targets.device)
        return Batch(targets, torch.where(variant, anew, targets), scenes.captions(shown)[rows], kinds[rows])


def load_world(home: Path) -> CharacterBase:
    """From a folder that scripts/characters.py filled."""
    generator = files.load(base.new_generator(0), home / files.BASE)
    codec = files.load(Codec(), home / files.CODEC)
    clip, dino = load_tower(CLIP, home / files.CLIP_FILE), load_tower(DINO, home / files.DINO_FILE)
    return CharacterBase(generator.unet, generator.text, codec, clip, dino)


def load_contrast(home: Path) -> Contrast:
    """The CLIP stand-in with its text side, for scores."""
    clip = untrained(0)
    tensors = {
        **{
            f"tower.model.{key.removeprefix('visual.')}": value
            for key, value in files.read(home / files.CLIP_FILE).items()
        },
        **files.read(home / files.CLIP_TEXT),
    }
    return files.with_weights(clip, {"scale": clip.scale.detach(), **tensors})


def load_instruments(home: Path, device: str) -> Instruments:
    """What scores pictures."""
    layers = drawings.load(home / files.DRAWINGS).to(device)
    critic = files.load(Judge(), home / files.JUDGE).to(device)
    return Instruments(layers, critic, load_contrast(home).to(device))


def save_contrast(state: dict[str, Tensor], home: Path) -> None:
    """`state` of a Contrast; the tower as open_clip saves one, so that ComfyUI's side recognises it."""
    tower = {key.replace("tower.model.", "visual."): value for key, value in state.items() if key.startswith("tower.")}
    files.save(tower, home / files.CLIP_FILE)
    files.save(
        {key: value for key, value in state.items() if key.startswith(("text.", "out."))}, home / files.CLIP_TEXT
    )
