"""The base of the world: a small UNet that predicts v and its text encoder, trained from nothing on scenes and captions.

Shape legend: n pictures, c x h x w latent.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..training.losses import add_noise, min_snr_weights, prediction_target, stable_diffusion_schedule
from ..training.sampling import ddim
from . import scenes
from .architecture import CHANNELS, GRID, TEXT_WIDTH, UNET
from .codec import Codec
from .drawings import Drawings
from .render import render
from .run import Plan
from .text import TextEncoder
from .words import IDENTITY, SLOTS

PLAN = Plan("base", steps=17000, batch=64, rate=1.2e-3, seed=5)
MIN_SNR, MEAN_WEIGHT = 5.0, 2.0
NO_TEXT, NO_IDENTITY = 0.1, 0.25  # share of captions of which nothing is left, or no identity word
DROPPED = 0.15  # chance of each other word


class Generator(nn.Module):
    """UNet and text encoder. The UNet's weights are those of diffusers' UNet2DConditionModel."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = make_unet(), TextEncoder(TEXT_WIDTH)

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """v (n, c, h, w), float32"""
        return self.unet(latents, timesteps, encoder_hidden_states=tokens, return_dict=False)[0].float()


def make_unet() -> nn.Module:
    """diffusers' class with plain attention: for so few tokens it is twice as fast on a CPU as the fused one."""
    from diffusers import UNet2DConditionModel  # not needed for anything that runs in ComfyUI
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(**UNET)
    unet.set_attn_processor(AttnProcessor())
    return unet


def new_generator(seed: int) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator()


class BaseLoss:
    """Mean square error of v, by min-SNR weights; channels that show more count more.

    The mean of a channel (the ground's colour) is one number among many for the plain loss, so it is counted once more.
    """

    def __init__(self, drawings: Drawings, codec: Codec, batch: int):
        self.drawings, self.codec, self.batch = drawings, codec, batch
        self.alphas_cumprod = stable_diffusion_schedule().float().to(drawings.device)
        self.weights = 2 * min_snr_weights(self.alphas_cumprod, MIN_SNR, "v")

    def __call__(self, model: Generator, g: torch.Generator) -> Tensor:
        device = self.drawings.device
        shown = scenes.stage(scenes.characters(self.batch, g), g)
        captions = dropped(scenes.captions(shown), g).to(device)
        with torch.no_grad():
            latents = self.codec.encode(render(self.drawings, shown))
        timesteps = torch.randint(len(self.weights), (self.batch,), generator=g).to(device)
        noise = torch.randn(latents.shape, generator=g).to(device)
        kept = self.alphas_cumprod[timesteps]
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(add_noise(latents, noise, kept), timesteps, model.text(captions))
        error = predicted - prediction_target("v", latents, noise, kept)
        channels = self.codec.weights
        squares = (error.square().mean((2, 3)) + MEAN_WEIGHT * error.mean((2, 3)).square()) * channels
        return (squares.mean(1) * self.weights[timesteps]).mean()


def dropped(captions: Tensor, g: torch.Generator) -> Tensor:
    """The captions (n, slots) with words missing, as in life."""
    n = len(captions)
    captions = captions.masked_fill(torch.rand(captions.shape, generator=g) < DROPPED, 0)
    identity = torch.tensor([slot in IDENTITY for slot in SLOTS])
    captions = captions.masked_fill((torch.rand(n, 1, generator=g) < NO_IDENTITY) & identity, 0)
    return captions.masked_fill(torch.rand(n, 1, generator=g) < NO_TEXT, 0)


@torch.no_grad()
def draw(model: Generator, codec: Codec, captions: Tensor, noise: Tensor, steps: int = 20, cfg: float = 2.0) -> Tensor:
    """n captions, noise (n, c, h, w) -> pictures in -1..1: the bare base, DDIM and classifier-free guidance."""
    device = codec.mean.device
    tokens = model.text(torch.cat([captions, torch.zeros_like(captions)]).to(device))

    def predicted(latents: Tensor, timestep: Tensor, done: float) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            positive, negative = model(torch.cat([latents, latents]), timestep, tokens).chunk(2)
        return negative + cfg * (positive - negative)

    latents = ddim(predicted, noise.to(device), stable_diffusion_schedule().float().to(device), steps, "v")
    return codec.decode(latents).clamp(-1, 1)


def noise_for(n: int, seed: int) -> Tensor:
    """(n, c, h, w)"""
    return torch.randn(n, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(seed))
