"""The image towers: open_clip's and timm's own classes, built from a config and filled from a weight file.

Nothing is ever downloaded, and open_clip and timm are imported only on first use. Towers are built on the meta device
and take over the file's tensors, so a ViT-H costs the memory of its weights once and no initialisation.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.stored import quantised
from ..files.weights import name_of, one_line, read_header, read_weights
from ..network.config import ClipConfig, DinoConfig
from ..pictures import crop
from . import layouts
from .layouts import EncoderFile, TowerShape, describe

_TIMM_VITS = {"vision_transformer", "eva", "beit", "deit"}  # timm's modules whose models are plain ViTs
# A config comes out of a downloaded file: only sizes may be set by it, never files, addresses or Python objects.
_TIMM_ARGS = {
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "patch_size",
    "init_values",
    "reg_tokens",
    "no_embed_class",
    "qkv_bias",
    "qk_norm",
    "pos_embed",
}
_BIGGEST_NUMBER = 16384  # in a config; keeps a hostile one from building for hours
# open_clip's OPENAI_DATASET_MEAN and _STD (open_clip/constants.py)
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipTower(nn.Module):
    """An open_clip image tower. `mean`, `std`, `image_size` say how pixels must be prepared."""

    kind = "clip"

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std
        height, width = model.image_size
        if height != width:
            raise ValueError(f"CLIP towers for {width} x {height} px images are not supported, only square ones.")
        self.image_size: int = height

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, s, s) -> projected [CLS] embedding (b, out), not scaled to unit length."""
        return self.model(pixels.to(_reference(self.model)))

    def penultimate(self, pixels: Tensor) -> Tensor:
        """`features` of that one kind; the last block is not run."""
        return self.features(pixels, {"penultimate"})["penultimate"]

    def features(self, pixels: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """All `kinds` of normalised pixels (b, 3, s, s) by one forward pass, which ends where the last of them is known.

        "embedding": what `forward` returns (b, out). "penultimate": all tokens, [CLS] first, after the last block but one
        (b, 1 + n, width), without the final norm: transformers' `hidden_states[-2]`, ComfyUI's `penultimate_hidden_states`.
        """
        if "penultimate" not in kinds:
            return {"embedding": self(pixels)}
        blocks = self.model.trunk.blocks if hasattr(self.model, "trunk") else self.model.transformer.resblocks
        if len(blocks) < 2:
            raise ValueError("This CLIP tower has a single layer, so there is none before the last one.")
        alone = "embedding" not in kinds
        found = self.model.forward_intermediates(
            pixels.to(_reference(self.model)),
            indices=[len(blocks) - 2],
            stop_early=alone,
            intermediates_only=alone,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = found["image_intermediates"] + found.get("image_intermediates_prefix", [])
        features = {"penultimate": torch.cat(tokens[::-1], dim=1)}  # [CLS] comes second, if there is one
        return features if alone else {**features, "embedding": found["image_features"]}


class DinoTower(nn.Module):
    """A timm ViT. `mean`, `std`, `image_size` say how pixels must be prepared."""

    kind = "dino"

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = tuple(model.default_cfg["mean"]), tuple(model.default_cfg["std"])
        self.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, s, s) -> normed patch tokens (b, n, width), without [CLS] and registers."""
        tokens = self.model.forward_features(pixels.to(_reference(self.model)))
        return tokens[:, self.model.num_prefix_tokens :]

    def features(self, pixels: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """A DINO tower is asked for "patches" alone: what `forward` returns."""
        return {"patches": self(pixels)}

    def cls(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, s, s) -> normed [CLS] (b, width)."""
        return self.model.forward_features(pixels.to(_reference(self.model)))[:, 0]


def _reference(model: nn.Module) -> Tensor:
    """A parameter whose device and dtype the pixels must share."""
    return next(model.parameters())


def build_clip_tower(cfg: ClipConfig, device: str = "cpu") -> ClipTower:
    """The image tower of `cfg`, not yet filled, on "cpu" or "meta". ValueError if there is no such ViT."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower  # create_model cannot build on the meta device

    if cfg.vision_cfg is not None:
        model_cfg: dict[str, Any] = {"embed_dim": cfg.width}
        vision_cfg = dict(cfg.vision_cfg)
        quick_gelu = bool(vision_cfg.pop("quick_gelu", False))  # open_clip keeps it one level up
        _check_args(
            vision_cfg, {f.name for f in dataclasses.fields(CLIPVisionCfg)} - {"timm_model_pretrained"}, "vision_cfg"
        )
        tags = []
    else:
        _check_known(cfg.model, open_clip.list_models(), "open_clip")
        model_cfg = open_clip.get_model_config(cfg.model)
        vision_cfg, quick_gelu = model_cfg["vision_cfg"], model_cfg.get("quick_gelu", False)
        tags = open_clip.list_pretrained_tags_by_model(cfg.model)
    timm_name = vision_cfg.get("timm_model_name")
    if isinstance(vision_cfg.get("layers"), (list, tuple)) or (timm_name and not _is_timm_vit(timm_name)):
        names = [n for n in open_clip.list_models() if n.startswith("ViT-")]
        raise ValueError(
            f"The CLIP model {cfg.model!r} is not a plain vision transformer; FlexIP needs one, "
            f"for example {_nearest(cfg.model, names)}."
        )
    if model_cfg["embed_dim"] != cfg.width:
        raise ValueError(
            f"The CLIP model {cfg.model!r} makes embeddings of width {model_cfg['embed_dim']}, but the "
            f"FlexIP checkpoint says {cfg.width}."
        )
    vision_cfg = {**vision_cfg, "timm_model_pretrained": False, "output_tokens": False}

    def build() -> nn.Module:
        return _build_vision_tower(model_cfg["embed_dim"], vision_cfg, quick_gelu)

    statistics = {
        (c.get("mean", _OPENAI_MEAN), c.get("std", _OPENAI_STD))
        for c in (open_clip.get_pretrained_cfg(cfg.model, tag) for tag in tags)
    }
    mean, std = statistics.pop() if len(statistics) == 1 else (_OPENAI_MEAN, _OPENAI_STD)
    return ClipTower(_build(build, device, f"The CLIP model {cfg.model!r}"), mean, std)


def build_dino_tower(cfg: DinoConfig, device: str = "cpu") -> DinoTower:
    """The ViT of `cfg`, not yet filled, on "cpu" or "meta". ValueError if there is no such ViT."""
    import timm

    if not _is_timm_vit(cfg.model):
        _check_known(cfg.model, timm.list_models("*vit*"), "timm")
        raise ValueError(
            f"The image encoder {cfg.model!r} is not a plain vision transformer; FlexIP needs one, for "
            f"example {_nearest(cfg.model, timm.list_models('vit*dino*'))}."
        )
    _check_args(cfg.args, _TIMM_ARGS, "args")

    def build() -> nn.Module:
        return timm.create_model(
            cfg.model, pretrained=False, num_classes=0, global_pool="", img_size=cfg.image_size, **cfg.args
        )

    model = _build(build, device, f"The image encoder {cfg.model!r}")
    if model.num_features != cfg.width:
        raise ValueError(
            f"The image encoder {cfg.model!r} makes tokens of width {model.num_features}, but the FlexIP "
            f"checkpoint says {cfg.width}."
        )
    return DinoTower(model, cfg.image_size)


def wanted_shape(cfg: ClipConfig | DinoConfig) -> TowerShape:
    """The sizes of the tower that `cfg` asks for, without allocating it."""
    return _blueprint(cfg).shape


def image_size(cfg: ClipConfig | DinoConfig) -> int:
    """The side in pixels of the square pictures that the tower of `cfg` reads."""
    return _blueprint(cfg).image_size


def normalisation(cfg: ClipConfig | DinoConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel by which the pixels for the tower of `cfg` are normalised."""
    return _blueprint(cfg).mean, _blueprint(cfg).std


def pixels_for(tower: ClipTower | DinoTower, pictures: Tensor) -> Tensor:
    """(b, 3, h, w) in -1..1 -> normalised pixels (b, 3, s, s), as crop.prepare and crop.normalise make them, on any device."""
    size = tower.image_size
    height, width = pictures.shape[2:]
    scale = size / min(height, width)
    shape = round(scale * height), round(scale * width)
    seen = (pictures + 1) / 2
    if shape != (height, width):
        seen = nn.functional.interpolate(seen, size=shape, mode="bicubic", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    squares = seen[:, :, top : top + size, left : left + size]
    return crop.normalise(squares.clamp(0, 1).movedim(1, -1), tower.mean, tower.std)


def describe_model(cfg: ClipConfig | DinoConfig) -> str:
    """For people: what encoder a checkpoint wants, "CLIP ViT-H/14 (1280 wide, ...)"."""
    return describe(wanted_shape(cfg))


def check_fits(
    name: str, shapes: Mapping[str, tuple[int, ...]], cfg: ClipConfig | DinoConfig, need: str | None = None
) -> EncoderFile:
    """Recognises a file or state dict by its shapes; ValueError, naming it `name`, unless it fills the tower of `cfg`.

    DINO positions may differ in number, because they are resampled. `need` ends the message if it is not for adapters.
    """
    need = need or f"these adapters need {describe(wanted_shape(cfg))}; choose the file for {cfg.model}"
    if why := why_not(shapes, cfg):
        raise ValueError(f"{name} {why}{';' if ' but ' in why else ', but'} {need}.")
    return layouts.identify(shapes)


def why_not(shapes: Mapping[str, tuple[int, ...]], cfg: ClipConfig | DinoConfig) -> str:
    """Why tensors of these shapes cannot fill the tower of `cfg`, to be read after their name; "" if they can."""
    wanted, file = _blueprint(cfg), layouts.identify(shapes)
    if file is None:
        return "is no image encoder that FlexIP knows"
    found = file.shape
    if found.kind == "dino" and found.positions and wanted.shape.positions:
        found = dataclasses.replace(found, positions=wanted.shape.positions)
    if found != wanted.shape:
        return f"is {describe(file)}"
    converted = layouts.converted_shapes(shapes, file)
    missing, extra = sorted(wanted.tensors.keys() - converted.keys()), sorted(converted.keys() - wanted.tensors.keys())
    if any(quantised(key) for key in extra):
        key = next(key for key in extra if quantised(key))
        return f"is the right encoder but quantised in a way that FlexIP does not read ({one_line(key, 80)})"
    if missing or extra:
        what = f"lacks {len(missing)} tensors ({missing[0]})" if missing else f"has extra tensors ({extra[0]})"
        return f"looks like the right encoder but {what}"
    for key, shape in converted.items():
        if shape != wanted.tensors[key] and not (file.shape.kind == "dino" and key == "pos_embed"):
            return f"looks like the right encoder but its {key} has the shape {shape} instead of {wanted.tensors[key]}"
    return ""


@dataclasses.dataclass(frozen=True)
class _Blueprint:
    """What a tower built on the meta device tells."""

    shape: TowerShape
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tensors: dict[str, tuple[int, ...]]


_blueprints: dict[str, _Blueprint] = {}  # by the config's text: a config holds dicts, so it cannot be a key itself


def _blueprint(cfg: ClipConfig | DinoConfig) -> _Blueprint:
    key = repr(cfg)
    if key not in _blueprints:
        tower = _build_tower(cfg, "meta")
        tensors = {name: tuple(t.shape) for name, t in tower.model.state_dict().items()}
        try:
            shape = layouts.tower_shape(tower.kind, tensors)
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"{cfg.model!r} is not a plain vision transformer; FlexIP needs one.") from None
        _blueprints[key] = _Blueprint(shape, tower.image_size, tower.mean, tower.std, tensors)
    return _blueprints[key]


def fits_shapes(shapes: Mapping[str, tuple[int, ...]], cfg: ClipConfig | DinoConfig) -> bool:
    """Whether a file (or a connected encoder) with these tensors can fill the tower of `cfg`."""
    return not why_not(shapes, cfg)


def load_tower(
    cfg: ClipConfig | DinoConfig, source: str | Path | Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> ClipTower | DinoTower:
    """The tower of `cfg` with the weights of a file (or of a dict of tensors), on the CPU, in eval mode, frozen.

    Loading is strict. Where dtype and layout already agree the tensors are shared with `source`. DINO positions are
    resampled to `cfg.image_size` by timm's rule. ValueError if the file is damaged or another encoder.
    """
    if isinstance(source, (str, Path)):
        name, shapes = name_of(source), read_header(source).shapes
    else:
        name, shapes = "The connected image encoder", {key: tuple(t.shape) for key, t in source.items()}
    file = check_fits(name, shapes, cfg)
    tower = _build_tower(cfg, "meta")

    if isinstance(source, (str, Path)):
        source = read_weights(source, layouts.tower_keys(shapes, file))
    state = {key: t.to(device="cpu", dtype=dtype) for key, t in layouts.to_tower_layout(source, file).items()}
    if isinstance(cfg, DinoConfig):
        state = _timm_filter(tower.model)(state, tower.model)
    if _has_unsaved_buffers(tower.model):  # rotary tables and the like, which no file holds
        tower = _build_tower(cfg, "cpu").to(dtype)
    tower.model.load_state_dict(state, strict=True, assign=True)
    left = [key for key, t in (*tower.named_parameters(), *tower.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(
            f"{cfg.model} was loaded without a value for {', '.join(left[:3])}; please report this "
            "together with your versions of torch, timm and open_clip."
        )
    return tower.eval().requires_grad_(False)


def _build_tower(cfg: ClipConfig | DinoConfig, device: str) -> ClipTower | DinoTower:
    return build_clip_tower(cfg, device) if isinstance(cfg, ClipConfig) else build_dino_tower(cfg, device)


def _build(build: Any, device: str, subject: str) -> nn.Module:
    try:
        with torch.device(device):
            return build()
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{subject} cannot be built with the settings of this FlexIP checkpoint: {reason}.") from error


def _timm_filter(model: nn.Module) -> Any:
    """timm's own conversion for the model's family; on timm names it resamples the positions."""
    return importlib.import_module(type(model).__module__).checkpoint_filter_fn


def _has_unsaved_buffers(model: nn.Module) -> bool:
    saved = model.state_dict().keys()
    return any(key not in saved for key, _ in model.named_buffers())


def _is_timm_vit(name: str) -> bool:
    from timm.models import is_model, is_model_in_modules

    return isinstance(name, str) and is_model(name) and is_model_in_modules(name, _TIMM_VITS)


def _check_known(name: str, known: list[str], library: str) -> None:
    if name not in known:
        raise ValueError(
            f"{library} knows no image encoder called {name!r}; similar names are {_nearest(name, known)}."
        )


def _nearest(name: str, known: list[str]) -> str:
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.3)
    return ", ".join(by_lower[k] for k in found) or ", ".join(known[:3])


def _check_args(args: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key, value in args.items():
        if key not in allowed:
            raise ValueError(
                f"The FlexIP checkpoint sets {key!r} in the {where} of an image encoder, which is unknown "
                f"or not allowed there; {_nearest(key, sorted(allowed))} are."
            )
        if isinstance(value, (int, float)) and not 0 <= value <= _BIGGEST_NUMBER:
            raise ValueError(
                f"The FlexIP checkpoint sets {key!r} of an image encoder to {value}; it must lie between "
                f"0 and {_BIGGEST_NUMBER}."
            )
