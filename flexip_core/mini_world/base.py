"""The base of the mini world: a small SD1.5-class UNet with its text encoder, trained from scratch on pictures and captions.

A latent is `pixel_unshuffle(2)` of the picture (12 x 8 x 8), a lossless stand-in for a VAE. The same weights run in ComfyUI's
UNetModel; nodes/demo.py loads them there.

Shape legend: b batch, t text tokens, w text width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
from safetensors.torch import save
from torch import Tensor

from ..encoders.towers import ClipTower, DinoTower
from ..files.weights import read_header, read_tensors, write_atomically
from ..training.base import Text
from ..training.data import Captions
from ..training.draws import generator
from ..training.losses import add_noise, min_snr_weights, noise_loss, stable_diffusion_schedule
from . import world
from .architecture import TEXT_WIDTH, UNET, to_latents, to_pictures
from .encoders import CLIP, DINO, pixels_for
from .optimizer import learning_rate
from .text import TextEncoder

NAME = "FlexIP mini world"
STEPS, BATCH, RATE, EMA, MIN_SNR = 2500, 64, 3e-3, 0.998, 5.0
# Sampling adds up two errors that the plain loss hardly sees, each one number among many: the mean of a channel (the ground's
# colour), and how strong the noise is (what stays is grain). The UNet's group norms hide both.
MEAN_WEIGHT, STRENGTH_WEIGHT = 3.0, 30.0
NOISY = 0.85  # timesteps are 1000 * u ** NOISY for u drawn evenly: below 1, more of the noisy ones
DROPPED = {"ground": 0.3, "corner": 0.3, "hue": 0.5}  # chance of each word; so that captions are incomplete, as in life
NO_TEXT = 0.1
STATE_KEY = "flexip.mini_world.base"


def make_unet(device: str = "cpu") -> nn.Module:
    from diffusers import UNet2DConditionModel  # not needed for anything that runs in ComfyUI

    with torch.device(device):
        return cast(nn.Module, UNet2DConditionModel(**UNET))


class MiniBase:
    """flexip_core.training.base.Base for the mini world."""

    name = NAME
    text_width = TEXT_WIDTH
    clip, dino = CLIP, DINO

    def __init__(self, unet: nn.Module, text: TextEncoder, clip_tower: ClipTower, dino_tower: DinoTower):
        self.unet, self.text, self.towers = unet, text, (clip_tower, dino_tower)
        for module in (unet, text, *self.towers):
            module.eval().requires_grad_(False)
        self.alphas_cumprod = stable_diffusion_schedule().float()

    def to(self, device: str) -> MiniBase:
        for module in (self.unet, self.text, *self.towers):
            module.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def encode_text(self, captions: Captions) -> Text:
        if not isinstance(captions, Tensor):
            raise ValueError(f"{self.name} reads captions that are numbers of words; this source gives texts.")
        return Text(self.text(captions.to(self.device)))

    def empty_text(self) -> Text:
        return self.encode_text(torch.zeros(1, len(world.SLOTS), dtype=torch.long))

    def added_conditions(self, text: Text, latents: Tensor, sizes: Tensor | None = None) -> None:
        return None

    def to_latents(self, pictures: Tensor) -> Tensor:
        return to_latents(pictures.to(self.device))

    def to_pictures(self, latents: Tensor) -> Tensor:
        return to_pictures(latents)

    def features(self, references: Tensor) -> dict[str, Tensor]:
        clip, dino = self.towers
        pictures = references.to(self.device)
        return {"cls": clip(pixels_for(clip, pictures)), "patches": dino(pixels_for(dino, pictures))}


def base_loss(predicted: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """(b, c, h, w) twice and the weight of each row (b,)"""
    error = predicted - noise
    means = error.mean((2, 3)).square().mean(1)
    strength = (error * noise).mean((1, 2, 3)) / noise.square().mean((1, 2, 3))
    extra = MEAN_WEIGHT * means + STRENGTH_WEIGHT * strength.square()
    return (noise_loss(predicted, noise, weights) + extra * weights).mean()


class BaseRun:
    """The base's training; a step is a function of the weights and (seed, step). `average` holds the moving average."""

    def __init__(self, seed: int, steps: int = STEPS):
        self.seed, self.steps, self.done, self.seconds = seed, steps, 0, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.ModuleDict({"unet": make_unet(), "text": TextEncoder(TEXT_WIDTH)})
        self.parameters = dict(self.model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE, weight_decay=0.01, fused=True)
        self.alphas_cumprod = stable_diffusion_schedule().float()
        self.weights = min_snr_weights(self.alphas_cumprod, MIN_SNR)

    def step(self) -> float:
        g = generator(self.seed, self.done, 0, "base")
        scene = world.draw_subjects(BATCH, g)
        latents = to_latents(world.render(scene, g)[0])
        captions = self._dropped(world.captions(scene), g)
        timesteps = (len(self.weights) * torch.rand(BATCH, generator=g, dtype=torch.float64) ** NOISY).long()
        noise = torch.randn(latents.shape, generator=g)
        noisy = add_noise(latents, noise, self.alphas_cumprod[timesteps])
        text = self.model["text"](captions)
        predicted = self.model["unet"](noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        loss = base_loss(predicted, noise, self.weights[timesteps])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate(RATE, self.done, self.steps)
        self.optimizer.step()
        self.done += 1
        decay = min(EMA, self.done / (9 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return loss.item()

    @staticmethod
    def _dropped(captions: Tensor, g: torch.Generator) -> Tensor:
        rates = torch.tensor([DROPPED.get(slot, 0.0) for slot in world.SLOTS])
        captions = captions.masked_fill(torch.rand(captions.shape, generator=g) < rates, 0)
        return captions.masked_fill(torch.rand(len(captions), 1, generator=g) < NO_TEXT, 0)

    def run(self, state: Path, every: int = 250, until: Callable[[], bool] = lambda: False) -> bool:
        """All steps that are left, from `state` if that file is there; True when done, False when `until` ended it early."""
        if state.exists():
            self.load(state)
        losses = []
        while self.done < self.steps and not until():
            begin = time.perf_counter()
            losses.append(self.step())
            self.seconds += time.perf_counter() - begin
            if self.done % every == 0 or self.done == self.steps:
                logging.info("Base, step %d: loss %.4f, %.0f s.", self.done, sum(losses) / len(losses), self.seconds)
                losses.clear()
                self.save(state)
        return self.done == self.steps

    def save(self, path: Path) -> None:
        tensors = {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach()
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = value
        about = {"seed": self.seed, "steps": self.steps, "done": self.done, "seconds": self.seconds}
        write_atomically(path, save(tensors, metadata={STATE_KEY: json.dumps(about)}))

    def load(self, path: Path) -> None:
        about = json.loads(read_header(path).metadata[STATE_KEY])
        if (about["seed"], about["steps"]) != (self.seed, self.steps):
            raise ValueError(
                f"{path.name} belongs to a run with seed {about['seed']} and {about['steps']} steps, not {self.seed} and "
                f"{self.steps}; choose another folder."
            )
        self.done, self.seconds = about["done"], about["seconds"]
        tensors = read_tensors(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                moments = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"].clone() for moment in moments}
