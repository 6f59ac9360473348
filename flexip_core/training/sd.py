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
from .cache import MOST_TEXTS, fill
from .cached import cached
from .config import TrainConfig, check_task
from .data import Captions
from .dataset import open_store, scan
from .entries import check_place, file_identity
from .image_encoders import encoder_in
from .losses import stable_diffusion_schedule
from .probe import PictureProbe, choose_cases
from .sd_configs import SIDE, UNET, VAE, Checkpoint, TextEncoder, read_checkpoint
from .sources import make_source

_PARTS = ("text_encoders", "vae", "clip_tower", "dino_tower")
JOIN = ", "  # between the phrases of a caption
OTHERS = ("cache", "options", "prediction")  # that `make` takes beside numbers
VAE_BYTES = 4096  # per pixel, while it encodes: a gigabyte for one picture of 512 px


class SDBase:
    """flexip_core.training.base.Base for a checkpoint file. Make it with `load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        clip: tuple[ClipConfig, Path],
        dino: tuple[DinoConfig, Path],
        device: torch.device,
        unet: nn.Module,
        encoders: torch.dtype = torch.float32,
        prediction: str | None = None,
    ):
        self.checkpoint, self.device, self.unet, self.dtype = checkpoint, device, unet, encoders
        self.prediction = prediction or checkpoint.prediction
        self.name = checkpoint.family
        self.text_width = checkpoint.unet["cross_attention_dim"]
        (self.clip, self._clip_file), (self.dino, self._dino_file) = clip, dino
        alphas = stable_diffusion_schedule()
        self.alphas_cumprod = (zero_snr(alphas) if checkpoint.zero_snr else alphas).float().to(device)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        clip_vision: str | Path,
        dino: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        unet: bool = True,
        prediction: str | None = None,
    ) -> SDBase:
        """The frozen UNet in `precision` "fp32" or "bf16", and the encoders of text and references in bf16 on a GPU that computes in it.
        The VAE runs in fp32: its latents are what the loss is made of.

        `unet` False: without it, for who only encodes. `prediction`: "epsilon" or "v", for a checkpoint that does not say so itself.
        ValueError, one sentence naming the file, for a file that is something else or cannot be trained on.
        """
        if prediction not in (None, "epsilon", "v"):
            raise ValueError(f'[task] prediction must be "epsilon" or "v", got {prediction!r}.')
        about = read_checkpoint(checkpoint)
        encoders = (
            (encoder_in("clip_vision", clip_vision), Path(clip_vision)),
            (encoder_in("dino", dino), Path(dino)),
        )
        half, place = precision == "bf16", torch.device(device)
        module = load_unet(about, torch.bfloat16 if half else torch.float32).to(place) if unet else nn.Module()
        fast = half and place.type == "cuda" and torch.cuda.is_bf16_supported()
        return cls(about, *encoders, place, module, torch.bfloat16 if fast else torch.float32, prediction)

    # --- what is read when it is first used

    @functools.cached_property
    def text_encoders(self) -> list[nn.Module]:
        return [load_text_encoder(self.checkpoint, text).to(self.device, self.dtype) for text in self.checkpoint.texts]

    @functools.cached_property
    def vae(self) -> Vae:
        return Vae(self.checkpoint).to(self.device)

    @functools.cached_property
    def clip_tower(self) -> ClipTower:
        return load_tower(self.clip, self._clip_file).to(self.device, self.dtype)

    @functools.cached_property
    def dino_tower(self) -> DinoTower:
        return load_tower(self.dino, self._dino_file).to(self.device, self.dtype)

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
        pooled = found[-1][1]
        return Text(torch.cat([tokens for tokens, _ in found], -1).float(), None if pooled is None else pooled.float())

    def empty_text(self) -> Text:
        return self._empty

    @functools.cached_property
    def _empty(self) -> Text:
        return self.encode_text([()])

    def added_conditions(self, text: Text, latents: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor] | None:
        """SDXL's pooled text, and its sizes: of the whole picture, where the target was cut out of it, and of the target.

        So small or cut-off pictures do not teach that all are. Without `sizes` the picture is as it was asked for, whole.
        """
        if text.pooled is None:
            return None
        target = torch.tensor([SIDE * side for side in latents.shape[2:]], dtype=torch.float32)
        target = target.expand(len(latents), -1)
        whole = torch.cat([target, torch.zeros_like(target)], 1) if sizes is None else sizes.float().cpu()
        return {"text_embeds": text.pooled, "time_ids": torch.cat([whole, target], 1).to(latents.device)}

    @torch.no_grad()
    def to_latents(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in -1..1, as many at once as the device has room for."""
        pictures = pictures.to(self.device, torch.float32)
        rows = [self.vae.encode(some) for some in pictures.split(self.at_once(pictures))]
        return torch.cat(rows) * self.checkpoint.latent_scale

    def at_once(self, pictures: Tensor) -> int:
        """How many the VAE encodes together: on a GPU what takes half of the memory that is free, elsewhere one."""
        if self.device.type != "cuda":
            return 1
        free = torch.cuda.mem_get_info(self.device)[0]
        return max(1, min(len(pictures), int(free / 2 // (VAE_BYTES * pictures[0, 0].numel()))))

    @torch.no_grad()
    def to_pictures(self, latents: Tensor) -> Tensor:
        rows = (latents.float() / self.checkpoint.latent_scale).split(1)
        return torch.cat([self.vae.decode(row) for row in rows]).clamp(-1, 1)

    @torch.no_grad()
    def features(self, references: Tensor) -> dict[str, Tensor]:
        """References (b, 3, h, w) in -1..1, seen as Encode Reference shows them with crop "center"."""
        references = references.to(self.device, torch.float32)
        return {
            "cls": self._seen_by(self.clip_tower, references),
            "patches": self.patches(references),
        }

    @torch.no_grad()
    def patches(self, references: Tensor) -> Tensor:
        """DINO's part of `features` alone."""
        return self._seen_by(self.dino_tower, references.to(self.device, torch.float32))

    def _seen_by(self, tower: ClipTower | DinoTower, references: Tensor) -> Tensor:
        return tower(pixels_for(tower, references).to(self.dtype)).float()

    @torch.no_grad()
    def seen(self, pictures: Tensor) -> dict[str, Tensor]:
        """What a probe compares, of pictures (n, 3, h, w) in -1..1: the features, and "dino" (n, width), its [CLS]."""
        pixels = pixels_for(self.dino_tower, pictures.to(self.device, torch.float32))
        return {"dino": self.dino_tower.cls(pixels.to(self.dtype)).float(), **self.features(pictures)}


def _encode(module: nn.Module, text: TextEncoder, prompts: Sequence[str], last: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens (b, t, w), and the projected text (b, v) if this encoder has a projection."""
    out = module(
        input_ids=token_numbers(text, prompts).to(next(module.parameters()).device), output_hidden_states=not last
    )
    tokens = out.last_hidden_state if last else out.hidden_states[-2]
    return tokens, out.text_embeds if text.projected else None


def zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule shifted and scaled so that the last timestep is pure noise (Lin et al. 2023, arXiv:2305.08891), as ComfyUI does it
    for checkpoints with "ztsnr": all but a last rest, so that nothing is divided by 0."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return torch.cat([root[:-1] ** 2, root.new_tensor([4.8973451890853435e-08])])


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
    # old files have no "text_model.", nor has the CLIPTextModel of transformers since 5.6
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
        """The mean of what the encoder gives."""
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
    """diffusers counts the encoder's layers in the same way; in the decoder it leaves out the first one, which has no weights."""
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
    prediction: str | None = None,
    **options: Any,
) -> Task:
    """`[task] make = "flexip_core.training.sd:make"`: base, pictures and probe of real training.

    `data`: a folder or shards (dataset.py); `cache`: a folder that the command `cache` has filled; `options`: the source's.
    `run` is the config that names this task: its precision, and its folder for the previews. The probe shows data from val/,
    without that pictures that are trained on. probe_cases = 0: no probe. `prediction`: as for SDBase.load.
    """
    given = {
        "size": size,
        "cache": cache,
        "probe_cases": probe_cases,
        "probe_steps": probe_steps,
        "probe_cfg": probe_cfg,
    }
    check_task({name: value for name, value in {**given, **options}.items() if value is not None}, OTHERS)
    if cache is not None:
        check_place(cache, data)
    base = SDBase.load(checkpoint, clip_vision, dino, device, run.precision if run else "fp32", prediction=prediction)
    store = open_store(data)
    pictures = scan(store)
    probe, shown = None, scan(store, "val")
    held_out = bool(shown.subjects or shown.loose)
    if probe_cases:
        if not held_out:
            logging.info("%s has no val/ folder, so the probe shows pictures that are trained on.", data)
        cases = choose_cases(make_source(shown if held_out else pictures, size), probe_cases)
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
    wanted = held_out and bool(run and run.validate)
    if cache is None:
        return Task(base, make_source(pictures, size, **options), probe, make_source(shown, size) if wanted else None)
    identity = file_identity(checkpoint, clip_vision, dino, cache)
    kept, source = cached(base, pictures, size, cache, identity, **options)
    validation = make_source(shown, size, source.entries, identity, **options) if wanted else None
    return Task(kept, source, probe, validation)


def fill_cache(cfg: TrainConfig, patches: bool = False, dry_run: bool = False, texts: int = MOST_TEXTS) -> None:
    """What the command `cache` does for a config whose task is `make` with a cache folder. Says before how much it is.

    No UNet is read. `texts`: as for cache.fill.
    """
    from tqdm import tqdm

    task = dict(cfg.task)
    if "cache" not in task or str(task.get("make")) != "flexip_core.training.sd:make":
        raise ValueError(
            'The config\'s [task] must have make = "flexip_core.training.sd:make" and cache = "a folder" to keep the results in.'
        )
    check_place(task["cache"], task["data"])
    files = [task[name] for name in ("checkpoint", "clip_vision", "dino")]
    base = SDBase.load(*files, device=cfg.device, precision=cfg.precision, unet=False)
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
            texts=texts,
            on_start=told,
            on_progress=lambda done, total: (setattr(bar, "total", total), bar.update(done - bar.n)),
        )
