"""FlexIPTrain: training in a process of its own, started from the graph. training_status.py watches it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
from comfy_api.v0_0_2 import io

from ..flexip_core.files.folders import is_system
from ..flexip_core.files.names import is_device
from ..flexip_core.files.stored import first_parts
from ..flexip_core.network.config import GATE_MODES
from . import files, notices
from .compat import is_within_directory
from .errors import named
from .training_limits import LIMITS, refuse_beyond_limits
from .types import TRAIN_MENU

TRAIN = "FlexIPTrain"
CACHE = "cache"  # of [task]: what the command `cache` filled
RUNS = "flexip_training"  # in ComfyUI's output folder
DATA_PARTS = ("variant", "invariant")
NO_DATA = "no training data in input"  # the choice where there is none: from an empty list the page sends nothing
NAME = re.compile(r"[\w][\w .-]{0,79}")
GOES_ON = (
    "{} is trained in a process of its own: it goes on after you close ComfyUI, until it is done. To end it, queue FlexIP Training "
    "Status twice with this run and action stop"
)


class FlexIPTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        encoders = [files.AUTO, *files.names(files.ENCODER_FOLDER)]
        return io.Schema(
            node_id=TRAIN,
            display_name="Train FlexIP",
            category=TRAIN_MENU,
            description="Trains FlexIP adapters on your pictures. Checks them, frees the GPU, starts the training in a process of its own and returns: closing the page or ComfyUI does not end it. Queue it again to continue a run that was stopped. Needs diffusers (pip install diffusers).",
            search_aliases=["train", "training", "fine-tune", "finetune", "adapter training"],
            is_experimental=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "run",
                    default="my_adapters",
                    tooltip=f"Name of the run, which is kept in output/{RUNS}. When it is done, its adapters are in models/flexip under this name.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=files.names("checkpoints"),
                    tooltip="The base that the adapters are for: a whole SD1.5 or SDXL checkpoint (.safetensors).",
                ),
                io.Combo.Input(
                    "clip_vision",
                    options=encoders,
                    tooltip="The CLIP image encoder that the adapters read. auto: the one in models/clip_vision, found by its contents; ViT-H/14 if it is there.",
                ),
                io.Combo.Input(
                    "dino",
                    options=encoders,
                    tooltip="The DINOv2 image encoder that the adapters read. auto: the one in models/clip_vision, found by its contents; ViT-L/14 if it is there.",
                ),
                io.Combo.Input(
                    "data",
                    options=data_names() or [NO_DATA],
                    tooltip="A folder in ComfyUI's input folder: variant/ with a folder per subject, invariant/ with loose pictures, captions as .txt beside them, val/ for previews.",
                ),
                io.Int.Input(
                    "steps",
                    default=20000,
                    min=LIMITS["steps"][0],
                    max=LIMITS["steps"][1],
                    tooltip="Training steps in all. Raise this to continue a finished run.",
                ),
                io.Int.Input(
                    "batch", default=4, min=LIMITS["batch"][0], max=LIMITS["batch"][1], tooltip="Pictures per step."
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the training pictures in pixels: 512 for SD1.5, 1024 for SDXL.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=LIMITS["optimizer.lr"][0],
                    max=LIMITS["optimizer.lr"][1],
                    step=1e-6,
                    round=1e-8,
                    tooltip="1e-4 from scratch; lower, such as 2e-5, if pictures break up.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=LIMITS["seed"][0],
                    max=LIMITS["seed"][1],
                    control_after_generate=False,
                    tooltip="The same seed and pictures give the same adapters.",
                ),
                io.Combo.Input(
                    "gate_mode",
                    options=list(GATE_MODES),
                    optional=True,
                    advanced=True,
                    tooltip="How the two adapters are mixed; outputs is affine in the gate.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["bf16", "fp32"],
                    optional=True,
                    advanced=True,
                    tooltip="Precision of the frozen base; bf16 needs half the memory.",
                ),
                io.Boolean.Input(
                    "recompute",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Compute the base's activations twice instead of keeping them: slower, far less memory.",
                ),
                io.String.Input(
                    "settings",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="More settings as TOML, such as mix = 0.3 or [dropout] phrase = 0.2; they win over the inputs above. All are in docs/training.md.",
                ),
            ],
            outputs=[
                io.String.Output("run", display_name="run", tooltip="The run's name, for FlexIP Training Status."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was found in the data, and that the training has begun.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, checkpoint: str | None = None, clip_vision: str | None = files.AUTO, dino: str | None = files.AUTO
    ) -> bool | str:
        vision = [files.AUTO, *files.names(files.ENCODER_FOLDER)]
        options = {"checkpoint": files.names("checkpoints"), "clip_vision": vision, "dino": vision}
        return files.check_choices(TRAIN, options, dict(zip(options, (checkpoint, clip_vision, dino))))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return time.time()  # a run that was stopped goes on by the same inputs

    @classmethod
    def execute(
        cls,
        run: str,
        checkpoint: str,
        clip_vision: str,
        dino: str,
        data: str,
        steps: int,
        batch: int,
        size: int,
        learning_rate: float,
        seed: int,
        gate_mode: str = "outputs",
        precision: str = "bf16",
        recompute: bool = True,
        settings: str = "",
    ) -> io.NodeOutput:
        toml = ("tomli",) if settings.strip() and sys.version_info < (3, 11) else ()
        training = trainer("diffusers", *toml)
        folder, pictures, adapters = run_folder(run, TRAIN), data_path(data), adapters_file(run)
        task = {
            "make": "flexip_core.training.sd:make",
            "checkpoint": files.path_of("checkpoints", checkpoint, TRAIN),
            "clip_vision": encoder_path(training, "clip_vision", clip_vision),
            "dino": encoder_path(training, "dino", dino),
            "data": pictures,
            "size": size,
        }
        chosen = {
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "folder": str(folder),
            "device": str(mm.get_torch_device()),
            "precision": precision,
            "recompute": recompute,
            "optimizer": {"lr": learning_rate},
            "network": {"gate_mode": gate_mode},
            "task": task,
        }
        with named(TRAIN):
            more = training.config.parse_toml(settings, "the text in settings") if settings.strip() else {}
            refuse_files_in(more, task)
            cfg = training.config.TrainConfig.from_dict(merged(chosen, more))
            training.config.check_task(cfg.task, (*task, CACHE))
            if CACHE in cfg.task:
                training.entries.check_place(cfg.task[CACHE], pictures)
            refuse_beyond_limits(cfg, training.background.device_of(cfg))
            warnings: tuple[str, ...] = ()
            report = standing(training.background, folder, cfg, adapters)
            if report is None:
                training.background.refuse(cfg, adapters)
                check_files(training, task)
                found = training.check.check(pictures, size, on_progress=_progress())
                if not found.ok:
                    raise ValueError(f"{data} cannot be trained on.\n{found.text()}")
                mm.unload_all_models()
                mm.soft_empty_cache()
                training.background.start(cfg, export=adapters)
                report, warnings = (
                    f"Training of {folder.name} has begun; watch it with FlexIP Training Status.\n{found.text()}",
                    (GOES_ON.format(folder.name),),
                )
        said = dataclasses.replace(notices.Report.of(report), warnings=warnings)
        return io.NodeOutput(run, said.text, ui=notices.said(said, notices.id_of(cls)))


def run_folder(run: str, node: str) -> Path:
    """In ComfyUI's output folder. A run's name is one name, so that it leads nowhere else."""
    name = run.strip()
    if not NAME.fullmatch(name) or name.endswith(".") or is_device(name):
        raise ValueError(
            f"{node}: {files.shown(run)} cannot be the name of a run; use letters, digits, spaces, dots, - and _, and no name of a "
            "device of Windows, such as nul."
        )
    return Path(folder_paths.get_output_directory()) / RUNS / name


def data_names() -> list[str]:
    """Folders in ComfyUI's input folder that hold training data."""
    root = folder_paths.get_input_directory()
    if not os.path.isdir(root):
        return []
    folders = (entry for entry in os.scandir(root) if entry.is_dir() and not is_system(entry.name))
    return sorted(entry.name for entry in folders if _has_data(entry.path))


def data_path(name: str) -> str:
    names, root = data_names(), folder_paths.get_input_directory()
    if name not in names:
        what = "no training data" if name == NO_DATA else f"no training data {files.shown(name)}"
        found = f"Found: {files.listed(names)}." if names else "Make one, then press R on the page and choose it."
        raise ValueError(
            f"{TRAIN}: there is {what} in {root}. A folder there with {' or '.join(f'{part}/' for part in DATA_PARTS)} in it is "
            f"training data. {found}"
        )
    return os.path.join(root, name)


def encoder_path(training: Any, role: str, choice: str) -> str:
    if choice != files.AUTO:
        return files.path_of(files.ENCODER_FOLDER, choice, TRAIN)
    paths = {}
    for name in first_parts(files.names(files.ENCODER_FOLDER)):
        with suppress(ValueError):  # a link that leads nowhere; choosing it by its name says so
            paths[name] = files.path_of(files.ENCODER_FOLDER, name, TRAIN)
    with named(TRAIN):
        return training.image_encoders.choose(role, paths, files.searched(files.ENCODER_FOLDER))


def check_files(training: Any, task: dict[str, Any]) -> None:
    """ValueError for a file that the training would refuse, raised here and not in a process that nobody watches."""
    training.sd_configs.read_checkpoint(task["checkpoint"])
    for role in training.image_encoders.NEEDED:
        training.image_encoders.encoder_in(role, task[role])


def _has_data(path: str) -> bool:
    return any(os.path.isdir(os.path.join(path, part)) for part in DATA_PARTS)


def adapters_file(run: str) -> Path:
    return Path(folder_paths.get_folder_paths("flexip")[0]) / f"{run.strip()}.safetensors"


def standing(background: Any, folder: Path, cfg: Any, adapters: Path) -> str | None:
    """What to say of a run that is being trained with these settings or has nothing left to do; None where it must be started.

    So the node can stand in one graph with FlexIP Training Status, which is queued again and again.
    """
    known = background.read_config_of(folder)
    if known is None:
        return None
    found = background.status(folder)
    if known.steps != cfg.steps or background.changed_settings(known, cfg, every=True):
        return None
    if found.state in ("starting", "running"):
        return f"{folder.name} is being trained; watch it with FlexIP Training Status.\n{found.text()}"
    if found.state == "finished" and adapters.exists():
        return f"{folder.name} is finished, its adapters are in {adapters}. Raise steps to go on.\n{found.text()}"
    return None


def refuse_files_in(more: dict[str, Any], task: dict[str, Any]) -> None:
    """Settings of a workflow from elsewhere choose neither where the run writes nor which code it runs or files it reads.

    But for a cache, in ComfyUI's input folder as the data are; its path becomes absolute.
    """
    inner = more["task"] if isinstance(more.get("task"), dict) else {}
    names: list[str] = [name for name in ("folder", "start_from") if name in more]
    names += [
        f"[task] {name}"
        for name, value in inner.items()
        if name in task or not isinstance(value, (bool, int, float)) and name != CACHE  # a file or a function is a text
    ]
    if names:
        raise ValueError(f"settings must not hold {', '.join(names)}; in a graph only the node's inputs choose files.")
    if CACHE in inner:
        root = folder_paths.get_input_directory()
        inner[CACHE] = os.path.join(root, str(inner[CACHE]))
        if not is_within_directory(root, inner[CACHE]):
            raise ValueError(f"settings: [task] cache must be a folder in ComfyUI's input folder, {root}.")


def merged(chosen: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    out = dict(chosen)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


def _progress() -> Any:
    """For a check of the data, which takes minutes where there is a lot: shown on the node, and ended by ComfyUI's cancel."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return show


def trainer(*packages: str) -> Any:
    """The trainer, which is not imported with the pack because it takes seconds. RuntimeError, a sentence, without `packages`."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise RuntimeError(
                f"{TRAIN}: training needs the package {name}, which does not come with ComfyUI: run pip install {name} with ComfyUI's Python."
            )
    from ..flexip_core import training
    from ..flexip_core.training import background, check, config, entries, image_encoders, sd_configs  # noqa: F401 - its attributes

    return training
