"""The training loop: one step is a function of the weights, the config and (seed, step), however many ranks share it.

Shape legend: b batch.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.checkpoint import save_checkpoint
from ..files.parse import parse_json
from ..files.weights import write_atomically
from ..network.adapters import FlexIPNetwork
from ..network.gate import Numbers
from .ahead import Ahead
from .base import Base, Probe, Text
from .checkpointing import (
    Progress,
    check_room,
    load_into,
    read_state,
    remove_leftovers,
    save_state,
    state_tensors,
    states,
)
from .config import TrainConfig
from .data import Batch, PairSource, check_source
from .draws import draw_gates, draw_kinds, generator
from .forward import Forward
from .losses import Meter
from .optim import average_gradients, ema_decay, gradient_norms, lr_at, make_optimizer, trainable, update_average
from .ranks import Ranks, TrainingError
from .recompute import set_recompute
from .start import make_network, trained_weights
from .stopping import asked_to_stop
from .validation import validation_losses

LOG, BEST, FINAL = "log.jsonl", "best.safetensors", "final.safetensors"


@dataclass(frozen=True)
class Step:
    """What one step did."""

    number: int  # from 0
    loss: float
    gradient_norms: dict[str, float]  # adapter -> before clipping
    lr: float
    seconds: float  # of this rank
    waited: float  # of them, for the batch


class Trainer:
    """Trains FlexIP adapters on a frozen base. `network` holds the weights, `average` their moving average.

    Of several ranks each has a Trainer of its own; they stay bit for bit alike.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        base: Base,
        source: PairSource,
        probe: Probe | None = None,
        validation: PairSource | None = None,
        ranks: Ranks = Ranks(),
    ):
        check_source(source, cfg)
        if cfg.batch % ranks.count:
            raise ValueError(
                f"batch = {cfg.batch} rows cannot be shared evenly by {ranks.count} ranks; choose a multiple of {ranks.count}."
            )
        share = cfg.batch // ranks.count
        if share % cfg.accumulate:
            raise ValueError(
                f"accumulate = {cfg.accumulate} parts cannot share the {share} rows of a rank evenly; choose a divisor of {share}."
            )
        self.cfg, self.base, self.source, self.probe, self.ranks = (cfg, base, source, probe, ranks)
        self.validation = validation
        self.device = base.alphas_cumprod.device
        base.unet.requires_grad_(False).eval()
        set_recompute(base.unet, cfg.recompute)
        self.network = make_network(cfg, base).to(self.device)
        self.average = None
        if cfg.ema.where != "off":
            where = self.device if cfg.ema.where == "device" else "cpu"
            self.average = copy.deepcopy(self.network).to(where).requires_grad_(False).eval()
        self.parameters = trainable(self.network, cfg.train_adapters)
        self.optimizer = make_optimizer(self.parameters, cfg.optimizer)
        self.forward = Forward.of(cfg, base, source.phrases)
        self.timestep_weights = self.forward.timestep_weights
        mine = ranks.rows(cfg.batch)
        part = share // cfg.accumulate
        self.parts = [slice(begin, begin + part) for begin in range(mine.start, mine.stop, part)]
        self.ahead = Ahead(self._make_batch, self.device)
        self.meter = Meter(self.device)
        self.progress = Progress()
        self._saved = 0  # the newest state's step
        self._whole_step = True  # False while weights, moments and average are of two steps
        self._averaged = [self.average.get_parameter(key) for key in self.parameters] if self.average else []

    def run(
        self,
        resume: bool = False,
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> bool:
        """All steps that are left; True when done, False when a signal or `should_stop` ended it after saving the state."""
        self.start(resume)
        with asked_to_stop() as asked:
            while self.progress.step < self.cfg.steps:
                with self._kept_on_error():
                    on_step(self.advance())
                unfinished = self.progress.step < self.cfg.steps
                stop = unfinished and (asked.is_set() or (should_stop is not None and should_stop()))
                if self.ranks.any(stop):
                    with self.ranks.together():
                        self.save()
                    logging.info("Stopped after step %d; the state is saved.", self.progress.step)
                    return False
        with self.ranks.together():
            if self.ranks.first:
                self._save_adapters(FINAL)
        return True

    @contextmanager
    def _kept_on_error(self) -> Iterator[None]:
        """Whatever goes wrong in a step, the steps before it are saved; the error itself goes on, also where that fails."""
        try:
            yield
        except Exception:
            if self.ranks.first and self._whole_step and self.progress.step > self._saved:
                try:
                    self.save()
                    logging.info("The state after step %d is saved.", self.progress.step)
                except (OSError, TrainingError) as error:
                    logging.error("The state after step %d could not be saved: %s", self.progress.step, error)
            raise

    @property
    def folder(self) -> Path:
        return Path(self.cfg.folder)

    def advance(self) -> Step:
        """One step, and what is due after it: a log line, the probe, a checkpoint."""
        cfg, begin = self.cfg, time.perf_counter()
        step = self.step()
        self.progress.seconds += time.perf_counter() - begin
        done, last = self.progress.step, self.progress.step == cfg.steps
        log, probe, state = (
            last or done % often == 0 for often in (cfg.log_every, cfg.probe_every, cfg.checkpoint_every)
        )
        if log or probe or state:
            with self.ranks.together():  # the others wait here for rank 0
                if log:
                    self._log_losses(step)
                if probe and self.ranks.first:
                    if self.validation is not None and cfg.validate:
                        self._validate()
                    if self.probe is not None:
                        self._run_probe()
                if state:
                    self.save()
        return step

    def step(self) -> Step:
        cfg, number = self.cfg, self.progress.step
        kinds = draw_kinds(cfg.batch, cfg.mix, self._generator("kinds"))
        gates = draw_gates(kinds, cfg.gates, self._generator("gates"))
        self.optimizer.zero_grad(set_to_none=True)
        begin, waited = time.perf_counter(), self.ahead.waited
        found = []
        with self.ranks.together(), _memory_said(number + 1):
            for index, rows in enumerate(self.parts):
                batch = self.ahead.get((number, index), self._following(number, index))
                losses, timesteps = self.losses(batch, gates[rows], rows)
                loss = losses.mean() / len(self.parts)
                if loss.requires_grad:  # otherwise the norms are 0, and _check says what that means
                    loss.backward()
                found.append((losses.detach(), timesteps))
        losses, timesteps = map(torch.cat, zip(*found))
        losses, timesteps = average_gradients(self.parameters, losses, timesteps, self.ranks)  # of all rows
        norms = gradient_norms(self.parameters)
        values = torch.stack([losses.mean(), *norms.values()]).tolist()  # the only wait for the device
        norms = dict(zip(norms, values[1:]))
        self._check(values[0], norms, gates)
        lr = lr_at(number, cfg.steps, cfg.optimizer)
        self._whole_step = False
        self._update(lr, math.hypot(*norms.values()))
        self.meter.add(losses, kinds.to(self.device), timesteps, len(self.timestep_weights))
        self.progress.step += 1
        self._whole_step = True
        return Step(number, values[0], norms, lr, time.perf_counter() - begin, self.ahead.waited - waited)

    def _make_batch(self, key: tuple[int, int]) -> Batch:
        """A part of a step's rows of this rank, by the numbers of step and part."""
        cfg, (number, index) = self.cfg, key
        kinds = draw_kinds(cfg.batch, cfg.mix, generator(cfg.seed, number, 0, "kinds"))
        return self.source.batch(kinds, generator(cfg.seed, number, 0, "pairs"), self.parts[index])

    def _following(self, number: int, index: int) -> tuple[int, int] | None:
        if index + 1 < len(self.parts):
            return number, index + 1
        return (number + 1, 0) if number + 1 < self.cfg.steps else None

    def losses(self, batch: Batch, gates: Numbers, rows: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each row (b,), and the rows' timesteps (b,). `batch` and `gates` are `rows` of the step, or this rank's of any batch."""
        total, rows = (self.cfg.batch, rows) if rows else self._whole(len(gates))
        return self.forward.losses(self.network, batch, gates, self._generator, total, rows)

    def conditions(self, batch: Batch) -> tuple[Text, dict[str, torch.Tensor]]:
        """Texts and features of the references, with what this step drops."""
        return self.forward.conditions(batch, self._generator, *self._whole(len(batch.kinds)))

    def _whole(self, rows: int) -> tuple[int, slice]:
        """How many rows all ranks have where this one has `rows`, and which of them are this rank's."""
        total = rows * self.ranks.count
        return total, self.ranks.rows(total)

    def save(self) -> None:
        """Rank 0 writes; the others hold the same."""
        if not self.ranks.first:
            return
        tensors = state_tensors(self.network, self.average, self.parameters, self.optimizer, self.meter.sums)
        save_state(self.folder, tensors, self.progress, self.cfg.to_dict(), self.network.cfg, self.cfg.keep)
        self._saved = self.progress.step

    def _save_adapters(self, name: str) -> None:
        weights = "average" if self.average is not None else "weights"
        network = self.network if self.average is None else self.average
        save_checkpoint(network, self.folder / name, about={"steps": self.progress.step, "weights": weights})

    def _shown(self) -> FlexIPNetwork:
        """What is probed and exported, on the device."""
        if self.average is None:
            return self.network
        return self.average if self.cfg.ema.where == "device" else copy.deepcopy(self.average).to(self.device)

    def _state_size(self) -> int:
        """Bytes, but for some numbers: the network, its average, and two moments of what is trained."""
        network = sum(value.nbytes for value in self.network.state_dict().values())
        return network * (1 + (self.average is not None)) + 2 * sum(p.nbytes for p in self.parameters.values())

    def resume(self, path: Path | None) -> None:
        """Continues from the state that rank 0 gives; its path does not matter on the others."""
        progress, tensors = Progress(), {}
        with self.ranks.together():
            if self.ranks.first:
                progress, tensors, told = read_state(path, self.cfg.to_dict(), self.network.cfg)
                for setting, old, new in told:
                    logging.info("From step %d on %s is %s; it was %s.", progress.step + 1, setting, new, old)
        (path, progress), tensors = self.ranks.send((path, progress), tensors)
        with self.ranks.together():
            load_into(path, tensors, self.network, self.average, self.parameters, self.optimizer, self.meter.sums)
        self.progress, self._saved = progress, progress.step

    def start(self, resume: bool = False) -> None:
        """Makes the run's folder ready and, if asked, goes back to its newest state."""
        self.ranks.agree("training", self._identity())
        found: list[Path] = []
        with self.ranks.together():
            if self.ranks.first:
                found = states(self.folder)
                if found and not resume:
                    raise ValueError(
                        f"{self.folder} already holds a run ({found[-1].name}); "
                        "resume it with --resume or choose another folder."
                    )
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder)
                more = self.cfg.keep + 1 - len(found)  # the oldest goes after the newest has come
                check_room(self.folder, self._state_size() * max(more, 1))
        if self.ranks.count > 1:
            sent = 4 * sum(p.numel() for p in self.parameters.values()) / 1e6
            share = self.cfg.batch // self.ranks.count
            logging.info("%d ranks, %d rows each; %.0f MB of gradients per step.", self.ranks.count, share, sent)
        numbers = sum(p.numel() for p in self.parameters.values()) / 1e6
        logging.info(
            "Training %.1f M numbers for %s: %d steps of %d rows on %s in %s, into %s.",
            *(numbers, self.base.name, self.cfg.steps, self.cfg.batch, self.device, self.cfg.precision, self.folder),
        )
        if self.ranks.any(bool(found)):
            self.resume(found[-1] if found else None)
            logging.info("Resumed at step %d.", self.progress.step)
        elif self.cfg.start_from:
            self._take_over()
        with self.ranks.together():
            if self.ranks.first:
                keep_log_up_to(self.folder / LOG, self.progress.step)

    def _take_over(self) -> None:
        """Weights that are trained already, which rank 0 reads for all."""
        tensors: dict[str, torch.Tensor] = {}
        with self.ranks.together():
            if self.ranks.first:
                tensors = trained_weights(self.cfg.start_from, self.network)
        _, tensors = self.ranks.send(None, tensors)
        for network in filter(None, (self.network, self.average)):
            network.load_state_dict(tensors, strict=False)

    def _identity(self) -> str:
        """What must be the same at all ranks, so that they stay identical: settings, first weights, base, and how much data."""
        if self.ranks.count == 1:
            return ""
        settings = {k: v for k, v in self.cfg.to_dict().items() if k not in ("device", "folder", "task", "start_from")}
        weights = [*self.network.state_dict().values(), next(self.base.unet.parameters())]
        sums = [value.double().sum().item() for value in weights]
        return json.dumps([settings, sums, self.source.pictures(), dict(self.source.views())], sort_keys=True)

    def _generator(self, purpose: str) -> torch.Generator:
        """All ranks draw the same, for the whole batch, and take their rows: so their number changes nothing."""
        return generator(self.cfg.seed, self.progress.step, 0, purpose)

    def _check(self, loss: float, norms: dict[str, float], gates: Numbers) -> None:
        number = self.progress.step + 1
        for what, value in (("loss", loss), *((f"gradient of the {name} adapter", norms[name]) for name in norms)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"Step {number}: the {what} is {value}; nothing of this step was kept. Resume with a lower optimizer.lr, "
                    'precision = "fp32" or another batch (with the same settings the same step comes again), and look for pictures with '
                    "damaged values."
                )
        for name, norm in norms.items():
            weighed = any(gate if name == "preservation" else 1 - gate for gate in gates)
            if norm == 0 and weighed:
                raise TrainingError(
                    f"Step {number}: the {name} adapter got no gradient, so it would never learn; its K and V do not reach the loss. "
                    "Check that the base lets gradients through its cross-attentions."
                )

    def _update(self, lr: float, norm: float) -> None:
        current = list(self.parameters.values())
        if norm > self.cfg.optimizer.clip:
            torch._foreach_mul_([p.grad for p in current if p.grad is not None], self.cfg.optimizer.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average is not None:
            update_average(self._averaged, current, ema_decay(self.progress.step, self.cfg.ema))

    def _log_losses(self, step: Step) -> None:
        line = {
            "step": self.progress.step,
            **self.meter.report(),
            "gradient_norm": step.gradient_norms,
            "lr": step.lr,
            "seconds": round(self.progress.seconds, 3),
        }
        self.meter.reset()
        if self.ranks.first:
            self._write(line)
        norms = ", ".join(f"{name} {norm:.3f}" for name, norm in step.gradient_norms.items())
        logging.info("Step %d: loss %.4f, gradient %s.", line["step"], line["loss"], norms)

    def _validate(self) -> None:
        found = validation_losses(self._shown(), self.forward, self.validation, self.cfg)
        self._write({"step": self.progress.step, "validation": found})
        kinds = ", ".join(f"{kind} {loss:.4f}" for kind, loss in found["loss_by_kind"].items() if loss is not None)
        logging.info("Step %d: loss on pictures that are not trained on: %s.", self.progress.step, kinds)

    def _run_probe(self) -> None:
        with torch.no_grad():
            scores = {name: float(value) for name, value in self.probe(self._shown(), self.progress.step).items()}
        score = scores.get("score", math.nan)
        if not math.isfinite(score):
            raise TrainingError(f"The probe's 'score' is {score}; a probe must return one finite number of that name.")
        best = self.progress.best_score is None or score > self.progress.best_score
        if best:
            self.progress.best_score, self.progress.best_step = (score, self.progress.step)
            self._save_adapters(BEST)
        self._write({"step": self.progress.step, "probe": scores, "best": best})

    def _write(self, line: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def keep_log_up_to(path: Path, step: int) -> None:
    """Lines of steps that a resumed run will do again are taken out."""
    if path.exists():
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and parse_json(line)["step"] <= step]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged; remove it to continue without it.") from None
        write_atomically(path, "".join(kept).encode())


@contextmanager
def _memory_said(number: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Step {number}: the device has too little memory ({str(error).splitlines()[0]}). Resume with recompute = true, precision = "
            '"bf16", a smaller batch, or a cache; the command `memory` counts what each takes.'
        ) from error
