"""What one batch costs: targets noised, the frozen UNet with the gated adapters beside its text, and the loss of each row.

Shape legend: b batch, c x h x w latent, t text tokens, w text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..integrations.diffusers import branches, gated
from ..network.adapters import FlexIPNetwork
from ..network.gate import Numbers
from .base import Base, Text, prediction_of
from .config import DropoutConfig, TrainConfig
from .data import Batch, drop_phrases
from .draws import draw_dropout
from .losses import add_noise, min_snr_weights, noise_loss, prediction_target

Draw = Callable[[str], torch.Generator]
"""Purpose -> its generator of this step, which is the same at all ranks."""


@dataclass(frozen=True)
class Forward:
    """`phrases`: the source's. Every draw is one for `total` rows, of which `rows` are here."""

    cfg: TrainConfig
    base: Base
    phrases: tuple[str, ...]
    timestep_weights: torch.Tensor  # (timesteps,)

    @classmethod
    def of(cls, cfg: TrainConfig, base: Base, phrases: tuple[str, ...]) -> Forward:
        weights = torch.ones_like(base.alphas_cumprod)
        if cfg.loss_weight == "min_snr":
            weights = min_snr_weights(base.alphas_cumprod, cfg.min_snr_gamma, prediction_of(base))
        return cls(cfg, base, phrases, weights)

    def losses(
        self,
        network: FlexIPNetwork,
        batch: Batch,
        gates: Numbers,
        draw: Draw,
        total: int,
        rows: slice,
        dropout: DropoutConfig | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each row (b,), and the rows' timesteps (b,). `dropout`: instead of the config's."""
        cfg, base = self.cfg, self.base
        device = base.alphas_cumprod.device
        g = draw("noise")
        with torch.no_grad():
            latents = base.to_latents(batch.targets)
            text, features = self.conditions(batch, draw, total, rows, dropout)
            timesteps = torch.randint(len(self.timestep_weights), (total,), generator=g)[rows].to(device)
            # the whole batch's noise at every rank: 64 SDXL latents of 1024 px take about 70 ms
            noise = torch.randn(total, *latents.shape[1:], generator=g)[rows].to(device)
            a = base.alphas_cumprod[timesteps]
            noisy = add_noise(latents, noise, a)
            wanted = prediction_target(prediction_of(base), latents, noise, a)
            sizes = {} if batch.sizes is None else {"sizes": batch.sizes}
            added_conditions = base.added_conditions(text, noisy, **sizes)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            added = branches(network, features, text.tokens, gates, adapters=cfg.train_adapters)
            with gated(base.unet, added):
                predicted = base.unet(
                    noisy,
                    timesteps,
                    encoder_hidden_states=text.tokens,
                    added_cond_kwargs=added_conditions,
                    return_dict=False,
                )[0]
        return noise_loss(predicted, wanted, self.timestep_weights[timesteps]), timesteps

    def conditions(
        self, batch: Batch, draw: Draw, total: int, rows: slice, dropout: DropoutConfig | None = None
    ) -> tuple[Text, dict[str, torch.Tensor]]:
        """Texts and features of the references, with what this step drops."""
        cfg, base = dropout or self.cfg.dropout, self.base
        g = draw("dropout")
        no_reference, no_text = (dropped[rows] for dropped in draw_dropout(total, cfg, g))
        text = base.encode_text(drop_phrases(batch.captions, self.phrases, cfg, g, total, rows))
        text = text.replaced(no_text, base.empty_text())
        gone = no_reference.to(base.alphas_cumprod.device)
        features = {
            name: value.masked_fill(gone.view(-1, *[1] * (value.dim() - 1)), 0.0)
            for name, value in base.features(batch.references).items()
        }
        return text, features
