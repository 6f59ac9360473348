"""A training run in a process of its own, and what a run's folder tells about it from outside.

A run's folder: config.json, delivered.json (adapters that it wrote elsewhere), output.log (what the process said), log.jsonl, states, previews/, best and final adapters; run.lock is held
while a process writes there, and the file "stop" asks it to save and stop. The process depends on nobody: neither closing the
page nor ending the server stops it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.parse import parse_json, read_json
from ..files.weights import one_line, write_atomically
from .checkpointing import MAY_TURN, changed, config_of, states
from .config import TrainConfig
from .delivery import has_trained, refuse_foreign
from .loop import FINAL, LOG
from .ranks import Ranks, TrainingError

CONFIG, LOCK, STOP, OUTPUT, PREVIEWS = "config.json", "run.lock", "stop", "output.log", "previews"
PROCESS = "process.json"
MOST_NAMES = 20  # of runs, in a sentence
LONGEST_LINE = 2**20  # bytes, of the log
LONGEST_LOG = 2**27  # bytes; read, it takes eight times that
LAST_WORDS = 2**16  # bytes of output.log that are looked at
PATIENCE = 2.0  # seconds: whoever only looks at the run holds the lock for a moment
MOST_NUMBERS = 16  # kinds of data, or scores of a probe, in a line of the log
STOPPED = "Stopped after step"  # what the loop says
PACK = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks = Ranks()) -> Iterator[None]:
    """Only one run at a time writes a folder; its first rank holds the lock. The system releases it if the process dies."""
    from filelock import FileLock, Timeout  # torch brings it

    refuse_links(folder)  # to take a lock would empty the file that it leads to
    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    made = [path for path in (folder, *folder.parents) if not path.exists()] if ranks.first else []
    with ranks.together():
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise TrainingError(
                    f"Another process is training in {folder}; wait for it, stop it, or choose another folder."
                ) from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # something else was put there in the meantime
            if made and set(os.listdir(folder)) <= {LOCK}:  # the run failed before it wrote anything
                (folder / LOCK).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()


def is_running(folder: Path) -> bool:
    return _is_locked(folder) or _is_alive(folder)


def _is_locked(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    if not _is_plain(folder / LOCK):
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def _is_alive(folder: Path) -> bool:
    """The process that `start` began: it needs some seconds until it holds the lock."""
    import psutil  # ComfyUI brings it

    if not _is_plain(folder / PROCESS):
        return False
    try:
        data = read_json(folder / PROCESS)
        process = psutil.Process(data["pid"])
        return process.create_time() == data["created"] and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, KeyError, OverflowError, psutil.Error):
        return False


def refuse(cfg: TrainConfig, export: Path | None = None) -> None:
    """ValueError if a process writes in `cfg.folder`, if another run beside it uses the device, or as `refuse_overwriting`."""
    folder = Path(cfg.folder)
    refuse_links(folder)
    if is_running(folder):
        known = read_config_of(folder)
        other = changed_settings(known, cfg, every=True) if known else ""
        how = f", with other settings ({other})" if other else ""
        raise ValueError(f"The run {folder.name} is already being trained{how}; watch it, or stop it first.")
    refuse_overwriting(cfg, export)
    device = device_of(cfg)
    for other_run in runs(folder.parent):
        if other_run != folder and is_running(other_run):
            there = read_config_of(other_run)
            if there is None or device_of(there) == device:
                raise ValueError(
                    f"The run {other_run.name} is being trained on {device}, and a device has memory for one run at a time; wait "
                    "for it, or stop it with FlexIP Training Status."
                )


def refuse_overwriting(cfg: TrainConfig, export: Path | None = None) -> None:
    """ValueError if the run would overwrite what was trained with other settings, or a file that it did not write."""
    folder = Path(cfg.folder)
    if has_trained(folder):
        known, found = read_config_of(folder), states(folder)
        if known is None and found:
            known = TrainConfig.from_dict(config_of(found[-1]))
        if known is None:
            raise ValueError(
                f"{folder} holds trained adapters, and nothing says which settings they were trained with; choose another folder, or move them away."
            )
        other = changed_settings(known, cfg, every=not found)
        if not other and not found and known.steps != cfg.steps:
            other = f"steps: {known.steps} there, {cfg.steps} now, and no state to go on from"
        if other:
            raise ValueError(
                f"The run {folder.name} was begun with other settings ({other}); set them back, or give the run another name."
            )
    if export is not None:
        refuse_foreign(folder, export)


def runs(root: Path) -> list[Path]:
    """The folders of all runs in a folder, by name."""
    return sorted(path.parent for path in root.glob(f"*/{CONFIG}") if _is_plain(path))


def device_of(cfg: TrainConfig) -> torch.device:
    """ "cuda" and "cuda:0" are the same one. ValueError for a text that does not name a device."""
    try:
        device = torch.device(cfg.device)
    except RuntimeError:
        raise ValueError(f"device must be like cuda:0 or cpu, got {cfg.device[:80]!r}.") from None
    return torch.device(device.type, device.index or 0)


def start(cfg: TrainConfig, export: Path | None = None, allow_code: bool = False) -> None:
    """Starts or resumes the run of `cfg.folder`; `export`: where the adapters go when it is done. Returns at once.

    `allow_code`: whether the task may be a function outside flexip_core.

    ValueError where `refuse` says so.
    """
    refuse(cfg, export)
    folder = Path(cfg.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, json.dumps(cfg.to_dict(), indent=1).encode())
    (folder / STOP).unlink(missing_ok=True)
    command = [sys.executable, "-m", "flexip_core.training", "run", str(folder / CONFIG), "--resume"]
    if export is not None:
        command += ["--export", str(export)]
    if allow_code:
        command.append("--allow-code")
    paths = [str(PACK), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    own = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS} if os.name == "nt" else {}
    )
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PACK,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=os.name != "nt",  # signals to the server's group do not reach it
            **own,
        )
    import psutil

    about = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
    write_atomically(folder / PROCESS, json.dumps(about).encode())


def ask_to_stop(folder: Path) -> None:
    """The run saves its state and ends after the step it is in."""
    if not is_running(folder):
        raise ValueError(f"The run {folder.name} is not being trained, so there is nothing to stop.")
    refuse_links(folder)
    (folder / STOP).touch()


def read_config_of(folder: Path) -> TrainConfig | None:
    path = folder / CONFIG
    if not _is_plain(path):
        return None
    try:
        return TrainConfig.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give the run another name.") from None


def changed_settings(old: TrainConfig, new: TrainConfig, every: bool = False) -> str:
    """What differs but must not within one run, with both values; "" if the run can continue. `every`: also what may from a step on."""
    found = [one for one in changed(old.to_dict(), new.to_dict()) if every or not one[0].startswith(MAY_TURN)]
    if new.steps < old.steps:
        found.append(("steps", old.steps, new.steps))
    return ", ".join(f"{name}: {was} there, {now} now" for name, was, now in found)


@dataclass(frozen=True)
class Status:
    """`state`: "running", "starting", "stopped", "failed" or "finished". `why`: the last words of a run that failed."""

    name: str
    state: str
    step: int
    steps: int
    seconds: float  # of training, without probes
    losses: tuple[dict[str, Any], ...]  # lines of the log, in rising steps
    probes: tuple[dict[str, Any], ...]
    previews: tuple[Path, ...]  # oldest first
    why: str = ""

    def text(self) -> str:
        """The report, a sentence per line."""
        lines = [f"Run {self.name}: {self.state} at step {self.step} of {self.steps}."]
        if self.state in ("running", "starting") and 0 < self.step < self.steps and self.seconds:
            left = self.seconds / self.step * (self.steps - self.step)
            lines.append(f"{self.seconds / self.step:.2f} s per step, about {_duration(left)} left.")
        if self.losses:
            kinds = self.losses[-1]["loss_by_kind"]
            lines.append(
                "Loss: " + ", ".join(f"{kind} {value:.4f}" for kind, value in kinds.items() if value is not None) + "."
            )
        if self.probes:
            last, best = self.probes[-1], next((p for p in reversed(self.probes) if p["best"]), None)
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in last["probe"].items())
            lines.append(f"Probe at step {last['step']}: {numbers}. Best so far: step {best['step'] if best else '-'}.")
        if self.why:
            lines.append(self.why)
        return "\n".join(lines)


def status(folder: Path) -> Status:
    """ValueError if `folder` holds no run."""
    refuse_links(folder)
    cfg = read_config_of(folder)
    if cfg is None:
        there = ", ".join(path.name for path in runs(folder.parent)[:MOST_NAMES]) or "none"
        raise ValueError(
            f"There is no training run {folder.name!r} in {folder.parent}; start one with Train FlexIP. Runs there: {there}."
        )
    alive, lines = (_is_locked(folder), _is_alive(folder)), _log_lines(folder / LOG)
    losses = tuple(line for line in lines if "loss" in line)
    probes = tuple(line for line in lines if "probe" in line)
    said = _output_lines(folder / OUTPUT)
    step = max((line["step"] for line in lines), default=0)
    state, why = _state(*alive, (folder / FINAL).is_file() and step >= cfg.steps, said)
    previews = tuple(sorted(filter(_is_plain, (folder / PREVIEWS).glob("step_*.png"))))
    return Status(
        folder.name, state, step, cfg.steps, losses[-1]["seconds"] if losses else 0.0, losses, probes, previews, why
    )


def _state(writing: bool, alive: bool, finished: bool, said: list[str]) -> tuple[str, str]:
    if writing or alive:
        return "running" if writing else "starting", ""
    if finished:
        return "finished", ""
    last = said[-1] if said else ""
    if STOPPED in last:
        return "stopped", "Its state is saved; start it again to continue."
    if last.startswith(("Step ", "Resumed ")) or not last:
        return "failed", (
            "The process ended without a message: memory ran out, or somebody or the system ended it. Start it again: it "
            "continues from its last state."
        )
    return "failed", last


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the run may be writing one. ValueError for a line that no run has written."""
    found = []
    if path.is_file():
        if path.stat().st_size > LONGEST_LOG:
            raise ValueError(
                f"{path} is longer than {LONGEST_LOG} bytes, and no run writes so many lines; take it away."
            )
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) < LONGEST_LINE and not line.endswith(b"\n"):
                    break
                try:
                    found.append(_checked(parse_json(line)))
                except ValueError as error:
                    raise ValueError(
                        f"line {number} of {path} is damaged ({error}); give the run another name."
                    ) from None
    return found


def _checked(line: Any) -> dict[str, Any]:
    """A line of the log; ValueError unless everything in it that is shown has the right type."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError("it names no step")
    numbers = []
    if "loss" in line:
        kinds = line.get("loss_by_kind")
        numbers += [line["loss"], line.get("seconds")]
        numbers += [number for number in kinds.values() if number is not None] if isinstance(kinds, dict) else [None]
    if "probe" in line:
        numbers += line["probe"].values() if isinstance(line["probe"], dict) else [None]
        if type(line.get("best")) is not bool:
            raise ValueError("its probe is not a set of scores")
    if len(numbers) > MOST_NUMBERS:
        raise ValueError(f"it has more than {MOST_NUMBERS} numbers")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("it has something else where numbers should be")
    return line


def _output_lines(path: Path) -> list[str]:
    """The last ones."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS))
        text = file.read().decode(errors="replace")
    return [one_line(line) for line in text.splitlines() if line.strip()]


def refuse_links(folder: Path) -> None:
    """ValueError for a link in a run's folder, which a run would read or write elsewhere, and for what is neither file nor folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or a device; a run's folder must hold its files themselves.")


def _is_plain(path: Path) -> bool:
    """Whether a run can have made it: it makes no links, and whoever reads a pipe waits for ever."""
    return path.is_file() and not path.is_symlink()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(minutes, 1)} min"
