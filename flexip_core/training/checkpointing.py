"""The state of a training run in one safetensors file per checkpoint, no pickle, and the adapters that come out of it.

Tensors: `weights.<key>` and, unless it is off, `average.<key>` of the whole network, `moment1.<key>`, `moment2.<key>` and `count.<key>` of AdamW for
what is trained, `meter` (losses since the last log line). Metadata: `flexip.training` = JSON. Randomness needs no state: it is a
function of (seed, step), and the number of ranks changes nothing, so a run may go on with more or fewer. The learning rate is one of the step.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

from ..files.checkpoint import save_checkpoint
from ..files.parse import parse_json
from ..files.weights import name_of, read_header, read_tensors, write_atomically
from ..network.adapters import FlexIPNetwork
from ..network.config import FlexIPConfig
from .config import TrainConfig
from .ranks import TrainingError

FORMAT = "1"
STATE_KEY = "flexip.training"
_NAME = re.compile(r"state_(\d{8})\.safetensors")
MAY_CHANGE = {
    *("steps", "folder", "device", "recompute", "log_every", "probe_every", "checkpoint_every", "keep"),
    *("half", "license", "accumulate", "start_from", "validate"),
    *(f"task.{name}" for name in ("cache", "workers", "memory", "probe_cases", "probe_steps", "probe_cfg")),
}
"""Settings that a resumed run may have different: they change no step done so far, or (a cache) nothing that matters."""

MAY_TURN = ("precision", "batch", "mix", "loss_weight", "min_snr_gamma", "gates.", "dropout.", "optimizer.", "ema.")
"""Settings, and beginnings of such, that a resumed run may have different from its next step on; it says so."""

Change = tuple[str, Any, Any]  # a setting's name, such as "task.dino", and both values
_LEFTOVER = re.compile(r".+\.\d+\.tmp")  # of files.weights.write_atomically


_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(TrainConfig) if isinstance(f.default, (bool, int, float, str, tuple))
}


@dataclass
class Progress:
    """What a run knows apart from its tensors."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent on them
    best_score: float | None = None
    best_step: int | None = None


def state_tensors(
    network: FlexIPNetwork,
    average: FlexIPNetwork | None,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    meter: torch.Tensor,
) -> dict[str, torch.Tensor]:
    tensors = {f"weights.{key}": value for key, value in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{key}": value for key, value in average.state_dict().items()}
    for key, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"moment1.{key}"] = moments["exp_avg"]
        tensors[f"moment2.{key}"] = moments["exp_avg_sq"]
        tensors[f"count.{key}"] = moments["step"]
    return tensors | {"meter": meter}


def save_state(
    folder: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    progress: Progress,
    config: dict[str, Any],
    network: FlexIPConfig,
    keep: int,
) -> Path:
    """Written whole or not at all; older states beyond the `keep` newest go only once the new one is on the disk."""
    path = Path(folder) / f"state_{progress.step:08d}.safetensors"
    about = {"format": FORMAT, "progress": vars(progress), "config": config, "network": network.to_dict()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    check_room(path.parent, sum(value.nbytes for value in tensors.values()))
    try:
        write_atomically(path, save(tensors, metadata={STATE_KEY: json.dumps(about, sort_keys=True)}))
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error}); the states before it are whole. Make room, then go on from the last one."
        ) from error
    for old in states(folder)[:-keep]:
        old.unlink()
    return path


def remove_leftovers(folder: Path) -> None:
    """What a killed process left half written in the run's folder; only for who holds its lock."""
    for path in folder.glob("*.tmp"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink()


def check_room(folder: Path, size: int) -> None:
    """TrainingError unless a state of `size` bytes fits on the folder's disk and leaves as much again for everything else."""
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise TrainingError(
            f"The disk of {folder} has {free / 1e9:.1f} GB left, and a state takes {size / 1e9:.1f} GB; the states before it are kept. "
            "Make room, or lower keep, then continue from the last one."
        )


def states(folder: str | os.PathLike) -> list[Path]:
    """The run's states, oldest first."""
    return sorted(path for path in Path(folder).glob("state_*.safetensors") if _NAME.fullmatch(path.name))


def read_state(
    path: str | os.PathLike, config: dict[str, Any], network: FlexIPConfig
) -> tuple[Progress, dict[str, torch.Tensor], list[Change]]:
    """Besides what the state holds, which settings the run now has different from it.

    Refused in one sentence: a file that is no state, of another format, or of a run with settings that must stay.
    """
    about = _about(path)
    changes = changed(about["config"], config)
    for setting, old, new in changes:
        if setting.startswith(MAY_TURN):
            continue
        raise ValueError(
            f"{name_of(path)} was written with {setting} = {old!r}, the config now says {new!r}; "
            "put it back, or start a new run in another folder."
        )
    if about["network"] != json.loads(json.dumps(network.to_dict())):
        raise ValueError(
            f"{name_of(path)} belongs to another base or other encoders than the config's task gives; "
            "use the task it was started with, or start a new run in another folder."
        )
    progress = about["progress"]
    if not _is_progress(progress):
        raise ValueError(f"{name_of(path)} is damaged: its progress is not readable; resume from an older state.")
    return Progress(**progress), read_tensors(path), changes


def _is_progress(found: Any) -> bool:
    if not isinstance(found, dict) or set(found) != set(vars(Progress())):
        return False
    number, none = (int, float), type(None)
    kinds = {"step": (int,), "seconds": number, "best_score": (*number, none), "best_step": (int, none)}
    return all(type(found[name]) in kind for name, kind in kinds.items())


def config_of(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that a state was written with."""
    return _about(path)["config"]


def _about(path: str | os.PathLike) -> dict[str, Any]:
    text = read_header(path).metadata.get(STATE_KEY)
    if text is None:
        raise ValueError(f"{name_of(path)} is not the state of a training run; choose a state_*.safetensors.")
    try:
        about = parse_json(text)
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{name_of(path)} is damaged: its description is unreadable; resume from an older state.")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{name_of(path)} has state format {about.get('format')!r}, this version reads {FORMAT!r}; "
            "resume with the version that wrote it."
        )
    if set(about) != {"format", "progress", "config", "network"} or not isinstance(about["config"], dict):
        raise ValueError(f"{name_of(path)} is damaged: its description is incomplete; resume from an older state.")
    return about


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Settings of two configs that differ and matter. Those of MAY_TURN may in one run, others must not.

    A setting that `old` does not know, because an older version wrote it, was as its default.
    """
    before, after = {**_flat(_DEFAULTS), **_flat(old)}, _flat(new)
    told = bool(old.get("task") and new.get("task"))  # not where a program gives base and data itself
    found = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was == now or name in MAY_CHANGE:
            continue
        if name.startswith("task.") and (not told or _same_file(was, now)):
            continue
        found.append((name, was, now))
    return found


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in data.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _same_file(old: Any, new: Any) -> bool:
    """Whether two paths may be one file or folder, which was moved or copied: it keeps its name, and a file its bytes.

    A folder may have got more pictures meanwhile. Of a file that is not there any more only the name is known.
    """
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    was, now = (PureWindowsPath(path).name for path in (old, new))  # knows both kinds of slashes
    if not was or was != now:
        return False
    return not (os.path.isfile(old) and os.path.isfile(new)) or filecmp.cmp(old, new, shallow=False)


def load_into(
    path: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    network: FlexIPNetwork,
    average: FlexIPNetwork | None,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    meter: torch.Tensor,
) -> None:
    """Everything back in place, bit by bit; every expected tensor and no other must be there.

    But for the average: it may be turned off, and begins with the weights where it is turned on.
    """
    averaged = {key: value for key, value in tensors.items() if key.startswith("average.")}
    tensors = {key: value for key, value in tensors.items() if key not in averaged}
    if average is not None:
        begin = {
            f"average.{key.removeprefix('weights.')}": value
            for key, value in tensors.items()
            if key.startswith("weights.")
        }
        tensors |= averaged or begin
    parts = {"weights": network} if average is None else {"weights": network, "average": average}
    wanted = {f"{part}.{key}": value.shape for part in parts for key, value in network.state_dict().items()}
    for key, parameter in parameters.items():
        wanted |= {f"moment1.{key}": parameter.shape, f"moment2.{key}": parameter.shape, f"count.{key}": torch.Size(())}
    wanted["meter"] = meter.shape
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        example = (missing or unknown)[0]
        raise ValueError(
            f"{name_of(path)} does not fit this run: {len(missing)} tensors are missing and {len(unknown)} unknown "
            f"(such as {example}); resume from an older state."
        )
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{name_of(path)}: {key} has shape {list(tensors[key].shape)}, this run needs {list(shape)}; "
                "resume from an older state."
            )
    for part, module in parts.items():
        module.load_state_dict({key: tensors[f"{part}.{key}"] for key in module.state_dict()}, strict=True)
    names = {id(parameter): key for key, parameter in parameters.items()}
    state = optimizer.state_dict()
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        number: {
            "step": tensors[f"count.{key}"].clone(),
            "exp_avg": tensors[f"moment1.{key}"].clone(),
            "exp_avg_sq": tensors[f"moment2.{key}"].clone(),
        }
        for number, key in enumerate(ordered)
    }
    optimizer.load_state_dict(state)
    meter.copy_(tensors["meter"])


def export(state: str | os.PathLike, path: str | os.PathLike, part: str = "average") -> None:
    """A FlexIP checkpoint for ComfyUI from a training state: its averaged weights, or the last ones (`part` "weights")."""
    known = _about(state)
    config = FlexIPConfig.from_dict(known["network"])
    found = read_tensors(state)
    if not any(key.startswith("average.") for key in found):
        part = "weights"  # ema.where = "off"
    prefix = f"{part}."
    tensors = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    with torch.device("meta"):
        network = FlexIPNetwork(config)
    network.load_state_dict(tensors, strict=True, assign=True)
    save_checkpoint(network, path, about={"steps": known["progress"]["step"], "weights": part})
