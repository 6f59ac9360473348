"""A training that goes on where it stopped: counted in steps, a step a function of the weights and (seed, step).

Judge, CLIP stand-in and base differ only in model and loss. FlexIP's adapters have the pack's own trainer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save
from torch import Tensor

from ..files.weights import read_header, read_tensors, write_atomically
from ..training.loop import generator

STATE_KEY = "flexip.characters.run"


@dataclass(frozen=True)
class Plan:
    """How a model is trained. The rate rises over `warm` steps, stays, and falls to a fiftieth over the last `falling` share."""

    name: str
    steps: int
    batch: int
    rate: float
    seed: int
    decay: float = 0.999  # of the moving average
    warm: int = 100
    falling: float = 0.33
    weight_decay: float = 0.01

    def rate_at(self, step: int) -> float:
        left = (self.steps - step) / max(1, self.falling * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm) * min(1.0, max(0.02, left))


class Run:
    """`model`, and the moving `average` of its parameters. `loss(model, generator)` draws its batch from the generator."""

    def __init__(self, plan: Plan, model: nn.Module, loss: Callable[[nn.Module, torch.Generator], Tensor]):
        self.plan, self.model, self.loss = plan, model, loss
        self.done, self.seconds = 0, 0.0
        self.parameters = dict(model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
        )

    def step(self) -> float:
        loss = self.loss(self.model, generator(self.plan.seed, self.done, 0, self.plan.name))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.plan.rate_at(self.done)
        self.optimizer.step()
        self.done += 1
        decay = min(self.plan.decay, self.done / (9 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return loss.item()

    def until_done(self, state: Path, log_every: int = 50, save_every: int = 100) -> Iterator[int]:
        """All steps that are left, from `state` if that file is there; yields the number of steps done whenever it has saved."""
        if state.exists():
            self.load(state)
        losses: list[float] = []
        while self.done < self.plan.steps:
            begin = time.process_time()
            losses.append(self.step())
            self.seconds += time.process_time() - begin
            last = self.done == self.plan.steps
            if last or self.done % log_every == 0:
                mean, hours = sum(losses) / len(losses), self.seconds / 3600
                logging.info("%s, step %d: loss %.4f, %.3f hours of CPU.", self.plan.name, self.done, mean, hours)
                losses.clear()
            if last or self.done % save_every == 0:
                self.save(state)
                yield self.done

    def save(self, path: Path) -> None:
        tensors = {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach()
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = value
        about = {"plan": vars(self.plan), "done": self.done, "seconds": self.seconds}
        write_atomically(path, save(tensors, metadata={STATE_KEY: json.dumps(about)}))

    def load(self, path: Path) -> None:
        """ValueError if the state belongs to another plan."""
        about = state_of(path)
        if about["plan"] != vars(self.plan):
            raise ValueError(
                f"{path} belongs to another training, {about['plan']}; move it away or choose another folder."
            )
        self.done, self.seconds = about["done"], about["seconds"]
        tensors = read_tensors(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"].clone() for moment in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}


def state_of(path: Path) -> dict[str, Any]:
    """Of a saved training: "plan", steps "done", "seconds" of CPU."""
    return json.loads(read_header(path).metadata[STATE_KEY])


def average_of(path: Path) -> dict[str, Tensor]:
    """The moving average in a saved training, as a state dict."""
    tensors = read_tensors(path)
    return {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}
