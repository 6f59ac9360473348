"""A real base: SD1.5 or SDXL from one checkpoint file in ComfyUI's layout, through diffusers and transformers.

Nothing is downloaded: the configs are our own (sd_configs.py), the names are converted by diffusers' own tables, the tokenizer is
the one inside open_clip. Text, VAE and image encoders are read when they are first used, so that a run whose latents, texts and
features were computed before never loads them.

Shape legend: b batch, t text tokens, w text width, h x w pixels, c x h' x w' latent.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..encoders.text_tower import tokenize
from ..encoders.towers import ClipTower, DinoTower, load_tower, pixels_for
from ..files.weights import name_of, read_tensors
from ..network.adapters import ADAPTERS
from ..network.config import ClipConfig, DinoConfig
from .base import Task, Text
from .cached import cached
from .config import TrainConfig, check_task
from .data import Captions
from .dataset import open_store, scan
from .entries import check_place, file_identity
from .image_encoders import encoder_in
from .probe import PictureProbe, choose_cases
from .sd_configs import SIDE, UNET, VAE, Checkpoint, TextEncoder, read_checkpoint
from .sources import make_source

_PARTS = ("text_encoders", "vae", "clip_tower", "dino_tower")
JOIN = ", "  # between the phrases of a caption


class SDBase:
    """flexip_core.training.base.Base for a checkpoint file. Make it with `load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        clip: tuple[ClipConfig, Path],
        dino: tuple[DinoConfig, Path],
        device: torch.device,
        unet: nn.Module,
    ):
        self.checkpoint, self.device, self.unet = checkpoint, device, unet
        self.name = checkpoint.family
        self.text_width = checkpoint.unet["cross_attention_dim"]
        (self.clip, self._clip_file), (self.dino, self._dino_file) = clip, dino
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).float().to(device)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        clip_vision: str | Path,
        dino: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> SDBase:
        """The frozen UNet in `precision` "fp32" or "bf16"; everything else runs in fp32.

        ValueError, one sentence naming the file, for a file that is something else or cannot be trained on.
        """
        about = read_checkpoint(checkpoint)
        encoders = (
            (encoder_in("clip_vision", clip_vision), Path(clip_vision)),
            (encoder_in("dino", dino), Path(dino)),
        )
        unet = load_unet(about, torch.bfloat16 if precision == "bf16" else torch.float32)
        return cls(about, *encoders, torch.device(device), unet.to(device))

    # --- what is read when it is first used

    @functools.cached_property
    def text_encoders(self) -> list[nn.Module]:
        return [load_text_encoder(self.checkpoint, text).to(self.device) for text in self.checkpoint.texts]

    @functools.cached_property
    def vae(self) -> Vae:
        return Vae(self.checkpoint).to(self.device)

    @functools.cached_property
    def clip_tower(self) -> ClipTower:
        return load_tower(self.clip, self._clip_file).to(self.device)

    @functools.cached_property
    def dino_tower(self) -> DinoTower:
        return load_tower(self.dino, self._dino_file).to(self.device)

    def release(self) -> None:
        """Everything but the UNet leaves the memory, until it is used again."""
        for name in _PARTS:
            self.__dict__.pop(name, None)

    # --- Base

    @torch.no_grad()
    def encode_text(self, captions: Captions) -> Text:
        """Captions as texts in phrases; what does not fit into 77 tokens is cut off, as in ComfyUI's first chunk."""
        if isinstance(captions, Tensor):
            raise ValueError(f"{self.name} reads captions that are texts; this source gives numbers of words.")
        prompts = [JOIN.join(phrase for phrase in caption if phrase) for caption in captions]
        last = self.name == "SD1.5"
        found = [
            _encode(module, text, prompts, last) for module, text in zip(self.text_encoders, self.checkpoint.texts)
        ]
        return Text(torch.cat([tokens for tokens, _ in found], -1), found[-1][1])

    def empty_text(self) -> Text:
        return self._empty

    @functools.cached_property
    def _empty(self) -> Text:
        return self.encode_text([()])

    def added_conditions(self, text: Text, latents: Tensor) -> dict[str, Tensor] | None:
        """SDXL's pooled text, and its sizes: the picture as it is trained, neither scaled nor cropped."""
        if text.pooled is None:
            return None
        height, width = (SIDE * side for side in latents.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=torch.float32)
        return {"text_embeds": text.pooled, "time_ids": sizes.expand(len(latents), -1)}

    @torch.no_grad()
    def to_latents(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in -1..1, one by one: the VAE needs about a gigabyte for one of 512 px."""
        rows = [self.vae.encode(picture) for picture in pictures.to(self.device, torch.float32).split(1)]
        return torch.cat(rows) * self.checkpoint.latent_scale

    @torch.no_grad()
    def to_pictures(self, latents: Tensor) -> Tensor:
        rows = (latents.float() / self.checkpoint.latent_scale).split(1)
        return torch.cat([self.vae.decode(row) for row in rows]).clamp(-1, 1)

    @torch.no_grad()
    def features(self, references: Tensor) -> dict[str, Tensor]:
        """References (b, 3, h, w) in -1..1, seen as Encode Reference shows them with crop "center"."""
        references = references.to(self.device, torch.float32)
        return {
            "cls": self.clip_tower(pixels_for(self.clip_tower, references)),
            "patches": self.patches(references),
        }

    @torch.no_grad()
    def patches(self, references: Tensor) -> Tensor:
        """DINO's part of `features` alone."""
        return self.dino_tower(pixels_for(self.dino_tower, references.to(self.device, torch.float32)))

    @torch.no_grad()
    def seen(self, pictures: Tensor) -> dict[str, Tensor]:
        """What a probe compares, of pictures (n, 3, h, w) in -1..1: the features, and "dino" (n, width), its [CLS]."""
        pixels = pixels_for(self.dino_tower, pictures.to(self.device, torch.float32))
        return {"dino": self.dino_tower.cls(pixels), **self.features(pictures)}


def _encode(module: nn.Module, text: TextEncoder, prompts: Sequence[str], last: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens (b, t, w), and the projected text (b, v) if this encoder has a projection."""
    out = module(
        input_ids=token_numbers(text, prompts).to(next(module.parameters()).device), output_hidden_states=not last
    )
    tokens = out.last_hidden_state if last else out.hidden_states[-2]
    return tokens, out.text_embeds if text.projected else None


def token_numbers(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """(b, t): begin, prompt, end, padding."""
    tokens = tokenize(prompts, text.config["max_position_embeddings"])
    end = (tokens == text.config["eos_token_id"]).int().argmax(1, keepdim=True)
    after = torch.arange(tokens.shape[1]) > end
    return tokens.masked_fill(after, text.padding)


# --- files


def load_unet(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Frozen, on the CPU."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**checkpoint.unet)
    tensors = read_tensors(checkpoint.path, checkpoint.keys(UNET))
    return _filled(unet, convert_ldm_unet_checkpoint(tensors, dict(unet.config)), checkpoint, "UNet", dtype)


def load_text_encoder(checkpoint: Checkpoint, text: TextEncoder) -> nn.Module:
    """transformers' CLIPTextModel, with its projection where the file has one; frozen, fp32, on the CPU."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**text.config)
    with torch.device("meta"):
        module = (CLIPTextModelWithProjection if text.projected else CLIPTextModel)(config)
    tensors = read_tensors(checkpoint.path, checkpoint.keys(text.prefix))
    if text.layout == "open_clip":
        named = convert_open_clip_checkpoint(module, tensors, prefix=text.prefix)
    else:
        named = convert_ldm_clip_checkpoint(tensors)
    # old files have no "text_model.", the CLIPTextModel of transformers since 5.6 neither
    start = "text_model." if hasattr(module, "text_model") else ""
    named = {
        key if key.startswith("text_projection.") else start + key.removeprefix("text_model."): value
        for key, value in named.items()
        if not key.endswith("embeddings.position_ids")  # a counter, which is made below
    }
    module = _filled(module, named, checkpoint, "text encoder", torch.float32)
    for part in module.modules():
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
    return module


class Vae(nn.Module):
    """Pictures in -1..1 <-> latents as the VAE makes them (not scaled for the UNet); fp32, for SDXL's overflows in fp16."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        tensors = read_tensors(checkpoint.path, checkpoint.keys(VAE))
        self.scale, self.shift = 1.0, 0.0
        if checkpoint.tiny_vae:  # a TAESD, as ComfyUI's own file of one keeps it
            self.scale, self.shift = (float(tensors.pop(f"{VAE}vae_{name}")) for name in ("scale", "shift"))
        self.model = _tiny(checkpoint, tensors) if checkpoint.tiny_vae else _kl(checkpoint, tensors)
        self.tiny = checkpoint.tiny_vae

    def encode(self, pictures: Tensor) -> Tensor:
        """The mean of what the encoder says."""
        found = self.model.encode(pictures)
        return found.latents / self.scale + self.shift if self.tiny else found.latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode((latents - self.shift) * self.scale).sample


def _kl(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        model = AutoencoderKL(**checkpoint.vae)
    return _filled(model, convert_ldm_vae_checkpoint(tensors, dict(model.config)), checkpoint, "VAE", torch.float32)


def _tiny(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> nn.Module:
    """diffusers counts the layers of the encoder alike, in the decoder it leaves out the first one, which has no weights."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        model = AutoencoderTiny(**checkpoint.vae)
    named = {}
    for key, value in tensors.items():
        part, number, rest = key.removeprefix(f"{VAE}taesd_").split(".", 2)
        named[f"{part}.layers.{int(number) - (part == 'decoder')}.{rest}"] = value
    return _filled(model, named, checkpoint, "VAE", torch.float32)


def _filled(
    module: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint, what: str, dtype: torch.dtype
) -> nn.Module:
    """The module, made on the meta device, with exactly these weights; frozen."""
    wanted = {key: value.shape for key, value in module.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key]]
    if odd := [*missing, *unknown, *wrong]:
        raise ValueError(
            f"{name_of(checkpoint.path)} has a {what} that is not {checkpoint.family}'s ({odd[0]} is missing, unknown or of "
            f"another shape, {len(odd)} in all); choose another checkpoint."
        )
    tensors = {key: tensors[key].to(dtype, copy=True).contiguous() for key in wanted}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# --- the task


def make(
    device: str,
    checkpoint: str,
    clip_vision: str,
    dino: str,
    data: str,
    size: int = 512,
    cache: str | None = None,
    run: TrainConfig | None = None,
    probe_cases: int = 4,
    probe_steps: int = 20,
    probe_cfg: float = 7.0,
    **options: Any,
) -> Task:
    """`[task] make = "flexip_core.training.sd:make"`: base, pictures and probe of real training.

    `data`: a folder or shards (dataset.py); `cache`: a folder that the command `cache` has filled; `options`: the source's.
    `run` is the config that names this task: its precision, and its folder for the previews. The probe shows data from val/,
    without that pictures that are trained on. probe_cases = 0: no probe.
    """
    given = {
        "size": size,
        "cache": cache,
        "probe_cases": probe_cases,
        "probe_steps": probe_steps,
        "probe_cfg": probe_cfg,
    }
    check_task({name: value for name, value in {**given, **options}.items() if value is not None}, ("cache", "options"))
    if cache is not None:
        check_place(cache, data)
    base = SDBase.load(checkpoint, clip_vision, dino, device, run.precision if run else "fp32")
    store = open_store(data)
    pictures = scan(store)
    probe = None
    if probe_cases:
        shown = scan(store, "val")
        if not (shown.subjects or shown.loose):
            logging.info("%s has no val/ folder, so the probe shows pictures that are trained on.", data)
            shown = pictures
        cases = choose_cases(make_source(shown, size), probe_cases)
        probe = PictureProbe(
            base,
            cases,
            clip_vision,
            run.folder if run else None,
            run.train_adapters if run else ADAPTERS,
            probe_steps,
            probe_cfg,
            release=cache is not None,
        )
    if cache is None:
        return Task(base, make_source(pictures, size, **options), probe)
    kept = cached(base, pictures, size, cache, file_identity(checkpoint, clip_vision, dino, cache), **options)
    return Task(*kept, probe)


def fill_cache(cfg: TrainConfig, patches: bool = False, dry_run: bool = False) -> None:
    """What the command `cache` does for a config whose task is `make` with a cache folder. Says before how much it is."""
    from tqdm import tqdm

    from .cache import fill

    task = dict(cfg.task)
    if "cache" not in task or str(task.get("make")) != "flexip_core.training.sd:make":
        raise ValueError(
            'The config\'s [task] must have make = "flexip_core.training.sd:make" and cache = "a folder" to keep things in.'
        )
    check_place(task["cache"], task["data"])
    files = [task[name] for name in ("checkpoint", "clip_vision", "dino")]
    base = SDBase.load(*files, device=cfg.device)
    drops = cfg.dropout.phrase > 0 or any(cfg.dropout.phrases.values())

    def told(about) -> bool:
        logging.info("%s", about.text())
        return not dry_run

    with tqdm(desc="cache", unit="entry", disable=dry_run) as bar:
        fill(
            base,
            task["data"],
            task.get("size", 512),
            task["cache"],
            file_identity(*files, task["cache"]),
            patches=patches,
            drop_phrases=drops,
            on_start=told,
            on_progress=lambda done, total: (setattr(bar, "total", total), bar.update(done - bar.n)),
        )
