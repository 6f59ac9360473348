"""The trainer on a GPU: the same numbers as on the CPU, the memory that was promised, and where the time goes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training_fakes as fakes
from tiny_base import make_files, pictures

from flexip_core.files.checkpoint import load_checkpoint, save_checkpoint
from flexip_core.integrations.diffusers import gated, guided
from flexip_core.network.config import ClipConfig, DinoConfig
from flexip_core.training import memory
from flexip_core.training.base import Text
from flexip_core.training.config import NetworkConfig, TrainConfig
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.loop import Trainer
from flexip_core.training.ranks import Ranks
from flexip_core.training.sd import SDBase

PACKAGES = ("torch", "diffusers", "transformers", "timm", "open_clip_torch", "safetensors", "comfy-aimdo")
CLOSE, CLOSE_BF16, CLOSE_MEMORY = 1e-4, 2e-2, 0.10  # relative
CLOSE_RANKS = 1e-3  # after three steps of AdamW, which enlarges what sums in another order differ by


def machine(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    about = {"packages": found, "python": sys.version.split()[0], "cpus": os.cpu_count()}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "gpu_gigabytes": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return about


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Loss and gradient norms of a batch with gates 0, 1 and between: CPU float32 against the device, in both gate modes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    worst: dict[str, float] = {}
    for mode in ("outputs", "tokens"):
        expected = _gradients(options.out / "step", "cpu", mode)
        for name, changes in {
            "float32": {},
            "float32, recompute": {"recompute": True},
            "bf16": {"precision": "bf16"},
            "bf16, recompute": {"precision": "bf16", "recompute": True},
        }.items():
            got = _gradients(options.out / "step", options.device, mode, **changes)
            worst[f"{mode}, {name}"] = max(abs(got[key] / expected[key] - 1) for key in expected)
    passed = all(value < (CLOSE_BF16 if "bf16" in name else CLOSE) for name, value in worst.items())
    return {"passed": passed, "largest_relative_difference": worst}


def _gradients(folder: Path, device: str, mode: str, **changes: Any) -> dict[str, float]:
    trainer = _tiny_trainer(folder, device, mode, **changes)
    batch = trainer.source.batch(torch.tensor([INVARIANT, VARIANT] * 2), fakes.generator(0))
    losses, _ = trainer.losses(batch, (0.0, 1.0, 0.5, 0.6))
    losses.mean().backward()
    adapters = {key.split(".")[0] for key in trainer.parameters}
    norms = {
        name: sum(p.grad.double().square().sum() for key, p in trainer.parameters.items() if key.startswith(name))
        ** 0.5
        for name in adapters
    }
    return {"loss": losses.mean().item(), **{name: float(norm) for name, norm in norms.items()}}


def _tiny_trainer(folder: Path, device: str, mode: str = "outputs", ranks: Ranks = Ranks(), **changes: Any) -> Trainer:
    cfg = fakes.with_network(fakes.config(folder, device=device, **changes), gate_mode=mode)
    return Trainer(cfg, fakes.FakeBase(device), fakes.pairs(), ranks=ranks)


class RandomBase:
    """A UNet of a base's real size with random weights; latents, texts and features are random numbers, as from a cache."""

    def __init__(self, family: str, size: int, device: str, precision: str, small: bool):
        from diffusers import UNet2DConditionModel

        self.unet_config = dict(memory.UNETS[family])
        if small:
            self.unet_config["block_out_channels"] = tuple(w // 5 for w in self.unet_config["block_out_channels"])
            if family == "SDXL":
                self.unet_config |= {"attention_head_dim": (1, 2, 4), "transformer_layers_per_block": (1, 1, 1)}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with torch.device(device):
            self.unet = UNet2DConditionModel(**self.unet_config).to(dtype)
        self.name, self.side, self.device = family, size // memory.SIDE, torch.device(device)
        self.text_width = self.unet_config["cross_attention_dim"]
        self.clip, self.dino = ClipConfig(), DinoConfig()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).to(device)
        self.pooled = family == "SDXL"

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device)

    def encode_text(self, captions: Any) -> Text:
        return Text(
            self._randn(len(captions), 77, self.text_width), self._randn(len(captions), 1280) if self.pooled else None
        )

    def empty_text(self) -> Text:
        return self.encode_text([()])

    def added_conditions(self, text: Text, latents: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if text.pooled is None:
            return None
        return {"text_embeds": text.pooled, "time_ids": self._randn(len(latents), 6)}

    def to_latents(self, targets: torch.Tensor) -> torch.Tensor:
        return self._randn(len(targets), 4, self.side, self.side)

    def features(self, references: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = len(references)
        return {"cls": self._randn(rows, self.clip.width), "patches": self._randn(rows, 256, self.dino.width)}


def _full_trainer(
    options: argparse.Namespace, family: str, size: int, batch: int, **changes: Any
) -> tuple[Trainer, RandomBase]:
    precision = "bf16" if options.device == "cuda" else "fp32"
    size = 64 if options.small else size
    cfg = TrainConfig(
        steps=100, batch=batch, seed=0, folder=str(options.out / "full"), device=options.device, precision=precision, **changes
    )  # fmt: skip
    if options.small:
        cfg = dataclasses.replace(cfg, network=NetworkConfig(resampler=fakes.NETWORK.resampler))
    base = RandomBase(family, size, options.device, precision, options.small)
    return Trainer(cfg, base, fakes.pairs()), base


def memory_cases(small: bool) -> list[tuple[str, int, int, bool]]:
    if small:
        return [("SD1.5", 64, 2, False), ("SD1.5", 64, 2, True)]
    return [("SD1.5", 512, 8, False), ("SD1.5", 512, 8, True), *(("SDXL", 1024, b, True) for b in (1, 4, 8))]


def peak_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a second step against what the command `memory` promises."""
    rows, passed = [], True
    for family, size, batch, again in memory_cases(options.small):
        trainer, base = _full_trainer(options, family, size, batch, recompute=again)
        promised = memory.count(trainer.cfg, base.unet_config, 64 if options.small else size).total
        trainer.step()
        row = {"base": family, "batch": batch, "recompute": again, "promised_megabytes": promised / 1e6}
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.step()
            row["peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
            passed &= abs(row["peak_megabytes"] * 1e6 / promised - 1) < CLOSE_MEMORY
        else:  # there is no count of what a CPU allocates; without the weights and moments, which a step does not make
            from counters import peak_megabytes

            row["peak_of_new_tensors_megabytes"] = peak_megabytes(trainer.step)
            passed &= 0 < row["peak_of_new_tensors_megabytes"] * 1e6 < promised
        rows.append(row)
        del trainer, base
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return {"passed": passed, "rows": rows}


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Twice the same run, once with a stop in the middle: the same bits."""
    steps = 4 if options.small else 20
    parts = {}
    for name, stops in (("whole", ()), ("parts", (steps // 2,))):
        changes = {"steps": steps, "log_every": 100, "probe_every": 100, "checkpoint_every": 100}
        for stop in stops:
            first = _tiny_trainer(options.out / name, options.device, **changes)
            first.run(should_stop=lambda first=first, stop=stop: first.progress.step == stop)
        trainer = _tiny_trainer(options.out / name, options.device, **changes)
        trainer.run(resume=bool(stops))
        parts[name] = {
            **trainer.network.state_dict(),
            **{f"average.{k}": v for k, v in trainer.average.state_dict().items()},
        }
    other = [key for key, value in parts["whole"].items() if not torch.equal(value, parts["parts"][key])]
    return {"passed": not other, "steps": steps, "tensors": len(parts["whole"]), "tensors_that_differ": len(other)}


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Trained adapters as a file, read again, in diffusers' UNet on the CPU and on the device. (`comfyui` runs a file in ComfyUI.)"""
    folder = options.out / "export"
    folder.mkdir(exist_ok=True)
    files = make_files(folder)
    base = SDBase.load(**files, device=options.device)
    cfg = TrainConfig(steps=1, batch=2, seed=0, folder=str(folder), device=options.device, network=fakes.NETWORK)
    trainer = Trainer(cfg, base, _SmallPictures())
    trainer.step()
    save_checkpoint(trainer.average, folder / "adapters.safetensors")
    outputs = {}
    for device in dict.fromkeys(("cpu", options.device)):
        network = load_checkpoint(folder / "adapters.safetensors").to(device)
        here = base if device == options.device else SDBase.load(**files, device=device)
        text, no_text = here.encode_text([("a dog",)]).tokens, here.empty_text().tokens
        features = here.features(pictures(1, 1))
        noisy = torch.randn(2, 4, 8, 8, generator=fakes.generator(3)).to(device)
        with torch.no_grad(), gated(here.unet, guided(network, features, text, no_text, (0.7,))):
            both = torch.cat([no_text, text])
            outputs[device] = here.unet(noisy, 500, encoder_hidden_states=both, return_dict=False)[0].cpu()
        with torch.no_grad():
            bare = here.unet(noisy, 500, encoder_hidden_states=both, return_dict=False)[0].cpu()
    difference = _relative(outputs[options.device], outputs["cpu"])
    effect = _relative(bare, outputs["cpu"])
    return {
        "passed": difference < CLOSE_BF16 and effect > 0,
        "largest_relative_difference": difference,
        "effect": effect,
    }


class _SmallPictures:
    """Pairs of 64 px with captions that are texts."""

    phrases = ("subject", "place")

    def __new__(cls) -> Any:
        from picture_pairs import PicturePairs

        captions = [("a dog", "on a beach"), ("a dog", "at night")] * 2
        return PicturePairs(pictures(0, 4), captions, torch.tensor([0, 0, 1, 1]), cls.phrases)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def step_time(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step's parts, each after the device has finished: conditions and data, forward, backward, the rest."""
    cases = [("SD1.5", 512, 2)] if options.small else [("SD1.5", 512, 16), ("SD1.5", 512, 64), ("SDXL", 1024, 8)]
    return {"rows": [_parts_of_a_step(options, *case) for case in cases], "encoders": _encoder_seconds(options)}


def _parts_of_a_step(options: argparse.Namespace, family: str, size: int, batch: int) -> dict[str, Any]:
    trainer, _ = _full_trainer(options, family, size, batch, recompute=family == "SDXL")
    trainer.step()
    kinds = torch.tensor([INVARIANT, VARIANT] * (batch // 2))
    pairs, data = _timed(options, lambda: trainer.source.batch(kinds, fakes.generator(0)))
    (losses, _), forward = _timed(options, lambda: trainer.losses(pairs, (0.5,) * batch))
    _, backward = _timed(options, lambda: losses.mean().backward())
    _, whole = _timed(options, trainer.step)
    return {
        "base": family,
        "batch": batch,
        "seconds": {"data": data, "forward": forward, "backward": backward, "step": whole},
        "pictures_per_second": batch / whole,
    }


def _encoder_seconds(options: argparse.Namespace) -> dict[str, float]:
    """What a cache saves, for 8 pictures: SD1.5's text encoder and a TAESD. (The image towers here are tiny.)"""
    folder = options.out / "encoders"
    folder.mkdir(exist_ok=True)
    base = SDBase.load(**make_files(folder), device=options.device)
    shown = pictures(2, 8, 64 if options.small else 512)
    parts: dict[str, Callable[[], Any]] = {
        "text": lambda: base.encode_text([("a dog",)] * 8),
        "vae": lambda: base.to_latents(shown),
        "image towers": lambda: base.features(shown),
    }
    for call in parts.values():
        call()  # reads its weights
    return {name: _timed(options, call)[1] for name, call in parts.items()}


def _timed(options: argparse.Namespace, call: Callable[[], Any]) -> tuple[Any, float]:
    def finish() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    finish()
    begin = time.perf_counter()
    result = call()
    finish()
    return result, time.perf_counter() - begin


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Two processes share the device and talk by gloo: the weights of one process after as many steps."""
    folder = options.out / "ranks"
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gpu_checks.rank", str(folder), options.device, str(options.small)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        return {"passed": False, "reason": f"The two processes ended with the codes {codes}."}
    alone = _tiny_trainer(folder / "one", options.device, batch=8)
    for _ in range(3):
        alone.step()
    two = torch.load(folder / "two.pt", weights_only=True)
    expected = alone.network.state_dict()
    difference = max(_relative(two["network"][key], value.cpu()) for key, value in expected.items() if value.any())
    return {
        "passed": difference < CLOSE_RANKS,
        "largest_relative_difference": difference,
        "seconds_of_sums": two["seconds"],
    }


def scores(options: argparse.Namespace) -> dict[str, Any]:
    """Cosines of pictures by CLIP and DINO on the CPU and on the device: equal to the third decimal."""
    from flexip_core.encoders import scorer_files
    from flexip_core.untrained import mini

    mini.make_mini_encoders(options.out)
    shown = (pictures(5, 4 if options.small else 40, 224).movedim(1, -1) + 1) / 2
    found = {}
    for name, make, file in (
        ("clip", scorer_files.clip_scorer, mini.MINI_CLIP_FILE),
        ("dino", scorer_files.dino_scorer, mini.MINI_DINO_FILE),
    ):
        scorer = make(file, options.out / file)
        tower, seen = scorer_files.load_image_tower(scorer), {}
        pixels = scorer_files.prepare(scorer, shown)
        for device in dict.fromkeys(("cpu", options.device)):
            with torch.no_grad():
                embedded = torch.nn.functional.normalize(
                    scorer_files.embed(tower.to(device), pixels.to(device)), dim=-1
                )
            seen[device] = (embedded @ embedded.T).cpu()
        found[name] = (seen["cpu"] - seen[options.device]).abs().max().item()
    return {
        "passed": all(value < 5e-4 for value in found.values()),
        "largest_difference": found,
        "pictures": len(shown),
    }
