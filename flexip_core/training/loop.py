"""The training loop: one step is a function of the weights, the config and (seed, step), however many ranks share it.

Shape legend: b batch, c x h x w latent, t text tokens, w text width.
"""

from __future__ import annotations

import copy
import hashlib
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
from ..integrations.diffusers import block_widths, branches, gated, text_projections
from ..network.adapters import FlexIPNetwork
from ..network.config import FlexIPConfig
from ..network.gate import Numbers
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
from .config import DropoutConfig, GateConfig, TrainConfig
from .data import INVARIANT, VARIANT, Batch, PairSource, check_source, drop_phrases
from .losses import Meter, add_noise, min_snr_weights, noise_loss
from .optim import (
    average_gradients,
    ema_decay,
    gradient_norms,
    lr_at,
    make_optimizer,
    trainable,
    update_average,
)
from .ranks import Ranks, TrainingError
from .recompute import set_recompute
from .stopping import asked_to_stop

LOG, BEST, FINAL = "log.jsonl", "best.safetensors", "final.safetensors"


@dataclass(frozen=True)
class Step:
    """What one step did."""

    number: int  # from 0
    loss: float
    gradient_norms: dict[str, float]  # adapter -> before clipping
    lr: float


def generator(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """Each purpose has draws of its own, so that a source that draws more changes neither noise nor gates."""
    digest = hashlib.blake2b(f"{seed} {step} {rank} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_kinds(batch: int, mix: float, g: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(batch, generator=g) < mix, VARIANT, INVARIANT)


def draw_gates(kinds: torch.Tensor, cfg: GateConfig, g: torch.Generator) -> Numbers:
    """γ of each row, evenly from the range of its kind."""
    low, high = torch.tensor([cfg.invariant, cfg.variant], dtype=torch.float64)[kinds].T
    return tuple((low + (high - low) * torch.rand(len(kinds), generator=g, dtype=torch.float64)).tolist())


def draw_dropout(batch: int, cfg: DropoutConfig, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(b,) rows without reference, (b,) rows without text: one draw, so that the three shares exclude each other."""
    draw = torch.rand(batch, generator=g)
    image = draw < cfg.image
    text = ~image & (draw < cfg.image + cfg.text)
    both = ~image & ~text & (draw < cfg.image + cfg.text + cfg.both)
    return image | both, text | both


class Trainer:
    """Trains FlexIP adapters on a frozen base. `network` holds the weights, `average` their moving average.

    Of several ranks each has a Trainer of its own; they stay bit for bit alike.
    """

    def __init__(
        self, cfg: TrainConfig, base: Base, source: PairSource, probe: Probe | None = None, ranks: Ranks = Ranks()
    ):
        check_source(source, cfg)
        if cfg.batch % ranks.count:
            raise ValueError(
                f"batch = {cfg.batch} rows cannot be shared evenly by {ranks.count} ranks; choose a multiple of {ranks.count}."
            )
        self.cfg, self.base, self.source, self.probe, self.ranks = cfg, base, source, probe, ranks
        self.device = base.alphas_cumprod.device
        base.unet.requires_grad_(False).eval()
        set_recompute(base.unet, cfg.recompute)
        self.network = make_network(cfg, base).to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.parameters = trainable(self.network, cfg.train_adapters)
        self.optimizer = make_optimizer(self.parameters, cfg.optimizer)
        self.timestep_weights = torch.ones_like(base.alphas_cumprod)
        if cfg.loss_weight == "min_snr":
            self.timestep_weights = min_snr_weights(base.alphas_cumprod, cfg.min_snr_gamma)
        self.meter = Meter(self.device)
        self.progress = Progress()
        self._saved = 0  # the newest state's step
        self._whole_step = True  # False while weights, moments and average are of two steps
        average = self.average.get_parameter
        self._pairs = [average(key) for key in self.parameters], list(self.parameters.values())

    def run(self, resume: bool = False, should_stop: Callable[[], bool] | None = None) -> bool:
        """All steps that are left; True when done, False when a signal or `should_stop` ended it after saving the state."""
        self.start(resume)
        with asked_to_stop() as asked:
            while self.progress.step < self.cfg.steps:
                with self._kept_on_error():
                    self.advance()
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
                if probe and self.probe is not None and self.ranks.first:
                    self._run_probe()
                if state:
                    self.save()
        return step

    def step(self) -> Step:
        cfg, number, rows = self.cfg, self.progress.step, self.ranks.rows(self.cfg.batch)
        kinds = draw_kinds(cfg.batch, cfg.mix, self._generator("kinds"))
        gates = draw_gates(kinds, cfg.gates, self._generator("gates"))
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.together(), _memory_said(number + 1):
            batch = self.source.batch(kinds, self._generator("pairs"), rows)
            losses, timesteps = self.losses(batch, gates[rows])
            loss = losses.mean()
            if loss.requires_grad:  # otherwise the norms are 0, and _check says what that means
                loss.backward()
        losses, timesteps = average_gradients(self.parameters, losses.detach(), timesteps, self.ranks)  # of all rows
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
        return Step(number, values[0], norms, lr)

    def losses(self, batch: Batch, gates: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each row (b,), and the rows' timesteps (b,). `batch` and `gates` are this rank's rows."""
        cfg, base = self.cfg, self.base
        total, rows = self._whole(len(gates))
        g = self._generator("noise")
        with torch.no_grad():
            latents = base.to_latents(batch.targets)
            text, features = self.conditions(batch)
            timesteps = torch.randint(len(self.timestep_weights), (total,), generator=g)[rows].to(self.device)
            # the whole batch's noise at every rank: 64 SDXL latents of 1024 px take about 70 ms
            noise = torch.randn(total, *latents.shape[1:], generator=g)[rows].to(self.device)
            noisy = add_noise(latents, noise, base.alphas_cumprod[timesteps])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            added = branches(self.network, features, text.tokens, gates, adapters=cfg.train_adapters)
            with gated(base.unet, added):
                predicted = base.unet(
                    noisy,
                    timesteps,
                    encoder_hidden_states=text.tokens,
                    added_cond_kwargs=base.added_conditions(text, noisy),
                    return_dict=False,
                )[0]
        return noise_loss(predicted, noise, self.timestep_weights[timesteps]), timesteps

    def conditions(self, batch: Batch) -> tuple[Text, dict[str, torch.Tensor]]:
        """Texts and features of the references, with what this step drops."""
        cfg, base = self.cfg.dropout, self.base
        g = self._generator("dropout")
        total, rows = self._whole(len(batch.kinds))
        no_reference, no_text = (dropped[rows] for dropped in draw_dropout(total, cfg, g))
        text = base.encode_text(drop_phrases(batch.captions, self.source.phrases, cfg, g, total, rows))
        text = text.replaced(no_text, base.empty_text())
        gone = no_reference.to(self.device)
        features = {
            name: value.masked_fill(gone.view(-1, *[1] * (value.dim() - 1)), 0.0)
            for name, value in base.features(batch.references).items()
        }
        return text, features

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
        save_checkpoint(self.average, self.folder / name, about={"steps": self.progress.step, "weights": "average"})

    def _state_size(self) -> int:
        """Bytes, but for some numbers: the network, its average, and two moments of what is trained."""
        network = sum(value.nbytes for value in self.network.state_dict().values())
        return 2 * (network + sum(p.nbytes for p in self.parameters.values()))

    def resume(self, path: Path | None) -> None:
        """Goes on from the state that rank 0 gives; its path does not matter at the others."""
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
        if self.ranks.any(bool(found)):
            self.resume(found[-1] if found else None)
            logging.info("Resumed at step %d.", self.progress.step)
        with self.ranks.together():
            if self.ranks.first:
                keep_log_up_to(self.folder / LOG, self.progress.step)

    def _identity(self) -> str:
        """What must be the same at all ranks, so that they stay alike: settings, first weights, base, and how much data."""
        if self.ranks.count == 1:
            return ""
        settings = {k: v for k, v in self.cfg.to_dict().items() if k not in ("device", "folder", "task")}
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
        average, current = self._pairs
        if norm > self.cfg.optimizer.clip:
            torch._foreach_mul_([p.grad for p in current if p.grad is not None], self.cfg.optimizer.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        update_average(average, current, ema_decay(self.progress.step, self.cfg.ema))

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

    def _run_probe(self) -> None:
        with torch.no_grad():
            scores = {name: float(value) for name, value in self.probe(self.average, self.progress.step).items()}
        score = scores.get("score", math.nan)
        if not math.isfinite(score):
            raise TrainingError(f"The probe's 'score' is {score}; a probe must return one finite number of that name.")
        best = self.progress.best_score is None or score > self.progress.best_score
        if best:
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self._save_adapters(BEST)
        self._write({"step": self.progress.step, "probe": scores, "best": best})

    def _write(self, line: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def make_network(cfg: TrainConfig, base: Base) -> FlexIPNetwork:
    """The adapters for this base, from the seed."""
    projections = text_projections(base.unet)
    for address, (to_k, _) in projections.items():
        if to_k.shape[1] != base.text_width:
            raise ValueError(
                f"The base says that its text is {base.text_width} wide, its cross-attention at {address} reads {to_k.shape[1]}; "
                "give the UNet and the text encoder of one model."
            )
    choices = {name: getattr(cfg.network, name) for name in vars(cfg.network)}
    about = FlexIPConfig(base.name, base.text_width, block_widths(base.unet), clip=base.clip, dino=base.dino, **choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        network = FlexIPNetwork(about)
    if cfg.start == "text":
        network.init_from_text(projections)
    elif cfg.start == "zero":
        network.init_no_op()
    return network


def keep_log_up_to(path: Path, step: int) -> None:
    """Lines of steps that a resumed run will do again are taken out."""
    if path.exists():
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and parse_json(line)["step"] <= step]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged; take it away to go on without it.") from None
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
