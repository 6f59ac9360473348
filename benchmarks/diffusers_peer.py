"""diffusers' own UNet and IP-Adapter with the same random plus files, called as its pipelines call it in every step."""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management as mm
import torch
from counters import Cost, count
from flexip_pack.flexip_core.training.memory import UNETS
from models import random_weights
from peer import ENCODER_WIDTH, plus_weights

NAMES = {"sd15": "SD1.5", "sdxl": "SDXL"}


class DiffusersPeer:
    """One batch with classifier-free guidance: twice as many rows."""

    def __init__(self, bench: Any, batch: int):
        self.bench, self.rows, self.device = bench, 2 * batch, mm.get_torch_device()
        generator = torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=bench.dtype)

        self.inputs = {
            "sample": randn(self.rows, 4, bench.latent, bench.latent),
            "timestep": torch.full((self.rows,), 500, device=self.device),
            "encoder_hidden_states": randn(self.rows, 77, bench.text_width),
        }
        self.added = {}
        if bench.base == "sdxl":
            self.added = {"text_embeds": randn(self.rows, 1280), "time_ids": randn(self.rows, 6)}
        self.embeds = randn(self.rows, 1, 257, ENCODER_WIDTH)
        self.unet = self._unet(generator)
        self.weights = {
            group: {key: value.to(self.device, bench.dtype) for key, value in values.items()}
            for group, values in plus_weights(bench).items()
        }
        self.bare = self._cost()

    def _unet(self, generator: torch.Generator) -> Any:
        from diffusers import UNet2DConditionModel

        config = dict(UNETS[NAMES[self.bench.base]])
        full = config["block_out_channels"]
        config["block_out_channels"] = tuple(width * self.bench.channels // full[0] for width in full)
        if self.bench.base == "sdxl":  # heads of 64 channels, as ComfyUI's
            config["attention_head_dim"] = tuple(width // 64 for width in config["block_out_channels"])
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        shapes = {key: value.shape for key, value in unet.state_dict().items()}
        weights = random_weights(shapes, self.bench.dtype, generator)
        unet.load_state_dict({key: value.to(self.device) for key, value in weights.items()}, strict=True, assign=True)
        return unet.eval().requires_grad_(False)

    def measured(self, adapters: int) -> tuple[Cost, Cost, int]:
        """The bare call's cost, the cost with `adapters` of them, and at how many blocks they act."""
        self.unet._load_ip_adapter_weights([self.weights] * adapters, low_cpu_mem_usage=False)
        torch.nn.Module.to(self.unet, self.device, self.bench.dtype)  # diffusers' own `to` warns of a mixture of dtypes
        acting = sum("IPAdapter" in type(processor).__name__ for processor in self.unet.attn_processors.values())
        cost = self._cost(image_embeds=[self.embeds] * adapters)
        print(f"measured: diffusers, {adapters} adapters, {self.rows} rows", file=sys.stderr)
        return self.bare, cost, acting

    @torch.no_grad()
    def _cost(self, **added: Any) -> Cost:
        def call() -> None:
            self.unet(**self.inputs, added_cond_kwargs={**self.added, **added}, return_dict=False)

        call()
        return count(call)
