"""The mini world as a training task: `[task] make = "flexip_core.mini_world.task:make"` with the `folder` of its base and encoders."""

from __future__ import annotations

from pathlib import Path

from ..encoders.towers import load_tower
from ..files.weights import read_tensors
from ..network.adapters import FlexIPNetwork
from ..training.base import Probe, Task
from . import files
from .base import MiniBase, make_unet
from .encoders import CLIP, DINO, Contrast, untrained
from .judge import Judge
from .measure import Instruments, Setup, gate_sweep
from .pairs import WorldPairs

PROBE = Setup(cases=32, test_seed=4242, gates=(0.0, 0.5, 1.0))


def make(device: str, folder: str) -> Task:
    tools = load_instruments(folder)
    base = load_world(folder).to(device)
    return Task(base, WorldPairs(), probe(base, tools))


def load_world(folder: str | Path) -> MiniBase:
    """The base with both encoders, from a folder that scripts/mini_world.py filled."""
    folder = Path(folder)
    tensors, text = files.read_base(folder / files.BASE)
    unet = make_unet()
    unet.load_state_dict(tensors)
    return MiniBase(unet, text, load_tower(CLIP, folder / files.CLIP_FILE), load_tower(DINO, folder / files.DINO_FILE))


def load_instruments(folder: str | Path) -> Instruments:
    """What scores pictures."""
    folder = Path(folder)
    clip = untrained(0)
    clip.tower.model.load_state_dict(files.part(read_tensors(folder / files.CLIP_FILE), "visual."))
    for name, module in (("text", clip.text), ("out", clip.out)):
        module.load_state_dict(files.part(read_tensors(folder / files.CLIP_TEXT), f"{name}."))
    judge = Judge()
    judge.load_state_dict(read_tensors(folder / files.JUDGE))
    for module in (clip, judge):
        module.eval().requires_grad_(False)
    return Instruments(judge, clip, load_tower(DINO, folder / files.DINO_FILE))


def save_clip(clip: Contrast, folder: Path) -> None:
    files.save(
        {f"visual.{key}": value for key, value in clip.tower.model.state_dict().items()}, folder / files.CLIP_FILE
    )
    text = {key: value for key, value in clip.state_dict().items() if key.startswith(("text.", "out."))}
    files.save(text, folder / files.CLIP_TEXT)


def probe(base: MiniBase, tools: Instruments) -> Probe:
    """Identity and obedience at three gates, texts that name another place than the reference's; few cases, always the same."""

    def scores(network: FlexIPNetwork, step: int = 0) -> dict[str, float]:
        result = gate_sweep(base, network, "conflict", tools, PROBE)
        identity = {f"identity_{gate:g}": result.at("identity", gate) for gate in PROBE.gates}
        obeyed = {
            f"text_{gate:g}": (result.at("ground_text", gate) + result.at("corner_text", gate)) / 2
            for gate in PROBE.gates
        }
        return {"score": identity["identity_1"] + obeyed["text_0"], **identity, **obeyed}

    return scores
