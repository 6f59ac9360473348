"""A training run's settings: one TOML file, read strictly.

Ranges are written as one number or as [low, high]. Everything but `steps`, `batch`, `seed` and `folder` has a default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.parse import parse_json, parse_toml
from ..network.adapters import ADAPTERS
from ..network.config import GATE_MODES, ResamplerConfig
from ..network.strict import Range, build, is_number

PRECISIONS = ("fp32", "bf16")
STARTS = ("text", "zero", "random")
LOSS_WEIGHTS = ("min_snr", "none")
AVERAGES = ("device", "cpu", "off")


def _require(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, f"one of {', '.join(choices)}", repr(value))


@dataclass(frozen=True)
class GateConfig:
    """γ by kind of data, drawn evenly from a range for every row; a range of one number is no jitter.

    The default is the small world's recipe: every gate from 0 to 1 is trained (docs/small_world.md). The paper says only that the
    gate is high for invariant and low for variant data.
    """

    invariant: Range = (0.5, 1.0)
    variant: Range = (0.0, 0.5)

    def __post_init__(self) -> None:
        for name, (low, high) in (("invariant", self.invariant), ("variant", self.variant)):
            _require(0 <= low <= high <= 1, f"gates.{name}", "a number or a rising pair within 0..1", [low, high])


@dataclass(frozen=True)
class DropoutConfig:
    """Shares of rows that lose their reference only, their text only, or both; and the chance that each phrase is dropped.

    Without dropped phrases the text says everything that may vary, and the gate learns nothing but the subject.
    """

    image: float = 0.05
    text: float = 0.05
    both: float = 0.05
    phrase: float = 0.3  # any phrase
    phrases: dict[str, float] = field(default_factory=dict)  # by what the phrase is about, instead of `phrase`

    def __post_init__(self) -> None:
        for name in ("image", "text", "both", "phrase"):
            _require(0 <= getattr(self, name) <= 1, f"dropout.{name}", "a share within 0..1", getattr(self, name))
        for name, share in self.phrases.items():
            _require(0 <= share <= 1, f"dropout.phrases.{name}", "a share within 0..1", share)
        total = self.image + self.text + self.both
        _require(total <= 1, "dropout.image + text + both", "at most 1", total)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate rises for `warmup` steps, stays, and falls as a cosine from the share `cosine_from` of the steps on."""

    lr: float = 1e-4
    warmup: int = 500
    cosine_from: float = 0.5  # 1: never
    floor: float = 0.05  # where the cosine ends, as a share of lr
    betas: Range = (0.9, 0.999)
    weight_decay: float = 0.01  # of matrices; norms, biases and learned queries have none
    clip: float = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            _require(getattr(self, name) > 0, f"optimizer.{name}", "a number above 0", getattr(self, name))
        for name in ("warmup", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", "a number of at least 0", getattr(self, name))
        for name in ("cosine_from", "floor"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", "a share within 0..1", getattr(self, name))
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", "two numbers in 0..1", self.betas)


@dataclass(frozen=True)
class EmaConfig:
    """Decay of the averaged weights after s steps: 1 - (1 + s)^-power, at most `decay`."""

    decay: float = 0.9999
    power: float = 0.75
    where: str = "device"  # "cpu": takes no memory of the device, a copy per step; "off": the last weights are what is probed and exported

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "ema.decay", "a number in 0..1", self.decay)
        _require(self.power > 0, "ema.power", "a number above 0", self.power)
        _choice("ema.where", self.where, AVERAGES)


@dataclass(frozen=True)
class NetworkConfig:
    """What FlexIPConfig leaves to choose; base, text width, blocks and encoders come from the base."""

    gate_mode: str = "outputs"
    resampler: ResamplerConfig = ResamplerConfig()
    detail_tokens: int = 16
    semantic_tokens: int = 4
    cls_tokens: int = 4

    def __post_init__(self) -> None:
        _choice("network.gate_mode", self.gate_mode, GATE_MODES)
        for name in ("detail_tokens", "semantic_tokens", "cls_tokens"):
            _require(getattr(self, name) >= 1, f"network.{name}", "at least 1", getattr(self, name))
        for name, value in dataclasses.asdict(self.resampler).items():
            _require(value >= 1, f"network.resampler.{name}", "at least 1", value)


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch: int  # rows of one step, of all ranks together: each takes batch / ranks, which must be a whole number
    seed: int
    folder: str  # of the run: log, states, adapters
    accumulate: int = (
        1  # parts in which each rank computes its rows of a step, one after the other: less memory, the same step
    )
    device: str = "cpu"
    recompute: bool = (
        False  # the UNet's activations a second time for the gradient instead of keeping them: slower, far less memory
    )
    precision: str = "fp32"  # of the UNet's and the adapters' arithmetic; the trained weights stay fp32
    start: str = "text"  # to_k, to_v: the UNet's own text projections, zero (the bare model at first), or random
    start_from: tuple[
        str, ...
    ] = ()  # a FlexIP file, or one or two IP-Adapter files: what fits is taken, the rest is as `start` says
    train_adapters: tuple[str, ...] = ADAPTERS  # one alone is an IP-Adapter: the other takes no part
    mix: float = 0.5  # share of variant rows
    loss_weight: str = "min_snr"
    min_snr_gamma: float = 5.0
    log_every: int = 50
    probe_every: int = 500
    validate: int = 64  # rows of val/ of each kind whose loss is told with the probe; 0: none
    checkpoint_every: int = 500
    keep: int = 2  # newest states kept
    half: bool = False  # the adapters that are exported: float16 instead of float32
    license: str = ""  # of the adapters, as their file and its model card say it
    gates: GateConfig = GateConfig()
    dropout: DropoutConfig = DropoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    network: NetworkConfig = NetworkConfig()
    task: dict[str, Any] = field(default_factory=dict)  # make = "module:function", and what else that function takes

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "probe_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, name, "a whole number of at least 1", getattr(self, name))
        for name in ("seed", "validate"):
            _require(getattr(self, name) >= 0, name, "a whole number of at least 0", getattr(self, name))
        _require(0 <= self.mix <= 1, "mix", "a share within 0..1", self.mix)
        _require(
            self.min_snr_gamma > 0, "min_snr_gamma", 'above 0 (loss_weight = "none" turns it off)', self.min_snr_gamma
        )
        _choice("precision", self.precision, PRECISIONS)
        _choice("start", self.start, STARTS)
        _choice("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        for name in self.train_adapters:
            _choice("train_adapters", name, ADAPTERS)
        _require(bool(self.train_adapters), "train_adapters", f"one or both of {', '.join(ADAPTERS)}", [])
        if len(set(self.train_adapters)) == 1 and self.network.gate_mode == "tokens":
            # zero-weighted tokens of the other adapter would share the softmax in ComfyUI, but not while training
            raise ValueError(
                'train_adapters must name both where network.gate_mode is "tokens"; use "outputs" for one alone.'
            )
        for name in self.train_adapters:
            if not any(self._weight(name, kind) for kind in ("invariant", "variant")):
                raise ValueError(
                    f"gates gives the {name} adapter the weight 0 in every row that is drawn, so it would learn nothing; "
                    "choose other gates or take it out of train_adapters."
                )

    def _weight(self, adapter: str, kind: str) -> float:
        """The largest factor that the gate gives an adapter in rows of one kind, times the share of those rows."""
        low, high = getattr(self.gates, kind)
        share = self.mix if kind == "variant" else 1 - self.mix
        return share * (high if adapter == "preservation" else 1 - low)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: tuples are lists."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Strict: unknown or missing settings, wrong types and impossible values raise ValueError naming the setting."""
        return build(cls, data, "")


TASK_NUMBERS = {  # least and most; a whole one is a whole number
    "size": (8, 4096),
    "probe_cases": (0, 64),
    "probe_steps": (1, 1000),
    "probe_cfg": (0.0, 100.0),
    "flip": (0.0, 1.0),
    "workers": (1, 64),
    "memory": (0, 2**40),
    "cuts": (1, 64),
}
"""Numbers that training on pictures (`flexip_core.training.sd:make`) takes in `[task]`, beside its files and `cache`."""


def check_task(task: dict[str, Any], others: Collection[str]) -> None:
    """ValueError for a setting that is neither one of `others` nor a number, and for something that is not a number or is out of range."""
    useless = "flip" if "cache" in task else "cuts"  # nothing is mirrored in a cache, and only a cache has fixed cuts
    known = [*others, *(name for name in TASK_NUMBERS if name != useless)]
    if unknown := sorted(set(task) - set(known)):
        raise ValueError(
            f"unknown setting [task] {unknown[0]}; training {'with' if 'cache' in task else 'without'} a cache has {', '.join(known)}."
        )
    for name in TASK_NUMBERS.keys() & task.keys():
        (least, most), value = TASK_NUMBERS[name], task[name]
        kind, fits = ("number", is_number(value)) if isinstance(least, float) else ("whole number", type(value) is int)
        _require(
            fits and least <= value <= most, f"[task] {name}", f"a {kind} from {least} to {most}", repr(value)[:40]
        )


def read_config(path: str | Path) -> TrainConfig:
    """A TOML file, or a .json with the same contents, as programs write it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the name of the training config.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text file: {error}.") from None
    if path.suffix == ".json":
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path.name} is not a JSON file: {error}.") from None
    else:
        data = parse_toml(text, path.name)
    try:
        return TrainConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
