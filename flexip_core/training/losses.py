"""The loss: the base's own prediction (of noise, or of v), weighted so that easy timesteps do not dominate.

Shape legend: b batch, c x h x w latent.
"""

from __future__ import annotations

import torch

from .data import KINDS

QUARTILES = 4


def stable_diffusion_schedule() -> torch.Tensor:
    """Stable Diffusion's alphas_cumprod (1000,), float64: betas whose roots grow in a line from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float, prediction: str = "epsilon") -> torch.Tensor:
    """min(SNR, gamma) per timestep over SNR for a model that predicts the noise ("epsilon"), over SNR + 1 for one that predicts the
    velocity ("v") (Hang et al. 2023, arXiv:2303.09556)."""
    if not gamma > 0:
        raise ValueError(f"min_snr_gamma must be above 0, got {gamma}: 0 would make the loss zero.")
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (gamma / snr).clamp(max=1.0) if prediction == "epsilon" else snr.clamp(max=gamma) / (snr + 1)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise, with each row's own a (b,)."""
    a = alphas_cumprod.view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def prediction_target(
    prediction: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """What the base is to predict: the noise, or v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022, arXiv:2202.00512)."""
    if prediction == "epsilon":
        return noise
    a = alphas_cumprod.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def noise_loss(predicted: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(b, c, h, w) twice and the weight of each row (b,) -> the loss of each row (b,), in float32."""
    return (predicted.float() - wanted).square().mean((1, 2, 3)) * weights


class Meter:
    """Sum and count of the rows' losses by kind of data and quartile of the timestep (0: the least noise)."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(2, len(KINDS), QUARTILES, device=device)  # losses, rows

    def add(self, losses: torch.Tensor, kinds: torch.Tensor, timesteps: torch.Tensor, total: int) -> None:
        """losses, kinds, timesteps (b,) of a schedule with `total` timesteps."""
        cell = kinds * QUARTILES + timesteps * QUARTILES // total
        losses = losses.detach()
        values = torch.stack([losses, torch.ones_like(losses)])
        self.sums.view(2, -1).index_add_(1, cell, values)

    def reset(self) -> None:
        self.sums.zero_()

    def report(self) -> dict[str, object]:
        """Means; None where no row fell."""
        losses, rows = self.sums.cpu().double()
        table = {kind: [_mean(losses[i, j], rows[i, j]) for j in range(QUARTILES)] for i, kind in enumerate(KINDS)}
        return {
            "loss": _mean(losses.sum(), rows.sum()),
            "loss_by_kind": {kind: _mean(losses[i].sum(), rows[i].sum()) for i, kind in enumerate(KINDS)},
            "loss_by_quartile": [_mean(losses[:, j].sum(), rows[:, j].sum()) for j in range(QUARTILES)],
            "loss_by_kind_and_quartile": table,
            "rows_by_kind": {kind: int(rows[i].sum()) for i, kind in enumerate(KINDS)},
        }


def _mean(total: torch.Tensor, count: torch.Tensor) -> float | None:
    return float(total / count) if count > 0 else None
