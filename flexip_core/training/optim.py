"""Which weights are trained and how: groups, learning rate, gradient norms per adapter, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn as nn

from ..network.adapters import ADAPTERS, FlexIPNetwork
from .config import EmaConfig, OptimizerConfig
from .ranks import Ranks


def adapter_of(key: str) -> str:
    """ "preservation.queries", "blocks.input.1.0.preservation.to_k.weight" -> "preservation"."""
    return next(part for part in key.split(".") if part in ADAPTERS)


def trainable(network: FlexIPNetwork, adapters: Iterable[str]) -> dict[str, nn.Parameter]:
    """Turns on the gradients of `adapters` with their projections, turns off the others', and names the former."""
    adapters = tuple(adapters)
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(adapter_of(key) in adapters)
    return {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: dict[str, nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    decayed = [p for key, p in parameters.items() if decays(key, p)]
    plain = [p for key, p in parameters.items() if not decays(key, p)]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def decays(key: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices, not on norms, biases and learned queries."""
    return parameter.dim() == 2 and not key.endswith("queries")


def lr_at(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """Learning rate of the step with that number (from 0) of a run of `steps`."""
    rise = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    begin = cfg.cosine_from * steps
    if step <= begin:
        return cfg.lr * rise
    fall = 0.5 * (1 + math.cos(math.pi * (step - begin) / (steps - begin)))
    return cfg.lr * rise * (cfg.floor + (1 - cfg.floor) * fall)


def gradient_norms(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adapter -> L2 norm of its gradient, a 0-dim tensor; 0 where no gradient arrived."""
    found: dict[str, list[torch.Tensor]] = {adapter_of(key): [] for key in parameters}
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            found[adapter_of(key)].append(parameter.grad)
    zero = torch.zeros((), device=next(iter(parameters.values())).device)
    return {name: torch.stack(torch._foreach_norm(grads)).norm() if grads else zero for name, grads in found.items()}


def average_gradients(
    parameters: dict[str, nn.Parameter], losses: torch.Tensor, timesteps: torch.Tensor, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every gradient becomes its mean over the ranks; this rank's losses and timesteps (b,) come back for the rows of all ranks.

    One all_reduce of one flat buffer instead of DistributedDataParallel, which cannot follow adapters that run in pieces outside
    any module's forward (integrations.diffusers.branches). The price is that nothing travels during the backward pass: of 100M
    trainables 400 MB, some 5 ms between GPUs of one machine, beside a step of half a second. The buffer then holds the gradients
    themselves, so there are two copies of them only for a moment, when the activations are gone.
    """
    if ranks.count == 1:
        return losses, timesteps
    reached = [p for p in parameters.values() if p.grad is not None]  # the same at every rank: they run the same graph
    rows = losses.new_zeros(2, len(losses) * ranks.count)  # zeros elsewhere: the sum puts the ranks' rows side by side
    rows[:, ranks.rows(rows.shape[1])] = torch.stack([losses, timesteps.to(losses)])
    flat = torch.cat([part.flatten() for part in (*(p.grad for p in reached), rows)])
    for p in reached:
        p.grad = None
    ranks.sum(flat)
    *gradients, rows = flat.split([*(p.numel() for p in reached), rows.numel()])
    for p, gradient in zip(reached, gradients):
        p.grad = gradient.div_(ranks.count).view_as(p)
    losses, timesteps = rows.view(2, -1)
    return losses, timesteps.long()


def ema_decay(step: int, cfg: EmaConfig) -> float:
    """After the update with that number (from 0), as in diffusers' EMAModel: the first one copies."""
    return min(cfg.decay, 1 - (1 + step) ** -cfg.power)


@torch.no_grad()
def update_average(average: list[torch.Tensor], current: list[torch.Tensor], decay: float) -> None:
    """`average` may be on the CPU: then the weights come there one by one."""
    if average[0].device == current[0].device:
        torch._foreach_lerp_(average, current, 1 - decay)
    else:
        for mean, now in zip(average, current):
            mean.lerp_(now.to(mean.device), 1 - decay)
