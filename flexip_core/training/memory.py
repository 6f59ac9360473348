"""How much memory a training run takes, counted and not guessed: every tensor that the step would hold, without holding any.

The UNet and the adapters are built from their configs alone, with torch's fake tensors (shapes without values); one forward pass then
says which tensors autograd would keep. Not counted: the workspace of kernels, what the allocator leaves unused, the encoders at work.

Shape legend: b batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..encoders.towers import build_clip_tower, build_dino_tower
from ..integrations.diffusers import block_widths, branches, gated
from ..network.adapters import FlexIPNetwork
from ..network.config import ClipConfig, DinoConfig, FlexIPConfig
from .config import TrainConfig
from .optim import trainable
from .recompute import BLOCKS, set_recompute

MB = 1e6
SIDE, TEXT_TOKENS = 8, 77
_DOWN, _CROSS_DOWN, _UP, _CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNETS: dict[str, dict[str, Any]] = {  # arguments of diffusers' UNet2DConditionModel
    "SD1.5": dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
        up_block_types=(_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
        attention_head_dim=8,
        cross_attention_dim=768,
    ),
    "SDXL": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
        up_block_types=(_CROSS_UP, _CROSS_UP, _UP),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
)
TEXTS = {"SD1.5": (CLIP_L,), "SDXL": (CLIP_L, CLIP_G)}  # arguments of transformers' CLIPTextConfig
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


@dataclass(frozen=True)
class Memory:
    """Bytes. The sum is an upper bound of a step: gradients come while activations go."""

    unet: int
    adapters: int
    gradients: int
    moments: int  # of AdamW
    average: int
    copies: int  # of weights in the precision of the arithmetic, kept for the backward pass
    row: int  # activations that one row keeps
    block: int  # what the largest block keeps for one row while it is computed again; 0 without recompute
    rows: int  # of one rank

    @property
    def total(self) -> int:
        fixed = self.unet + self.adapters + self.gradients + self.moments + self.average + self.copies
        return fixed + self.rows * (self.row + self.block)


class Kept:
    """Counts what autograd keeps: every storage once and whole, `but` for those of these tensors. Use it with `counting`."""

    def __init__(self, but: Iterable[torch.Tensor] = ()):
        self.bytes = 0
        self._seen = {id_of(tensor) for tensor in but}
        self._alive: list[torch.Tensor] = []  # or another storage might get the same address

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        if id_of(tensor) not in self._seen:
            self._seen.add(id_of(tensor))
            self._alive.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def counting(kept: Kept) -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield


class LikeCuda(TorchFunctionMode):
    """Autocast on the CPU leaves norms in bfloat16; on CUDA, which is asked about here, they compute in float32."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (nn.functional.group_norm, nn.functional.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
            kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def count(
    cfg: TrainConfig,
    unet_config: dict[str, Any],
    size: int,
    ranks: int = 1,
    clip: ClipConfig = ClipConfig(),
    dino: DinoConfig = DinoConfig(),
) -> Memory:
    """For a diffusers UNet of this config at `size` pixels and the settings' batch, adapters, precision and recompute."""
    stage, mode = full_size(cfg, unet_config, size, clip, dino)
    adapters = sum(map(bytes_of, stage.network.parameters()))
    trained = sum(map(bytes_of, trainable(stage.network, cfg.train_adapters).values()))
    with mode:
        block = stage.largest_block() if cfg.recompute else 0
        set_recompute(stage.unet, cfg.recompute)
        one, two = stage.kept(1), stage.kept(2)
    return Memory(
        unet=sum(map(bytes_of, stage.unet.parameters())),
        adapters=adapters,
        gradients=trained,
        moments=2 * trained,
        average=adapters if cfg.ema.where == "device" else 0,
        copies=2 * one - two,
        row=two - one,
        block=block,
        rows=cfg.batch // ranks // cfg.accumulate,
    )


def full_size(
    cfg: TrainConfig,
    unet_config: dict[str, Any],
    size: int,
    clip: ClipConfig = ClipConfig(),
    dino: DinoConfig = DinoConfig(),
) -> tuple[Stage, FakeTensorMode]:
    """A whole model that takes no memory, and the mode in which it can be called."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config).eval().requires_grad_(False)
        choices = {field: getattr(cfg.network, field) for field in vars(cfg.network)}
        width, blocks = unet.config.cross_attention_dim, block_widths(unet)
        network = FlexIPNetwork(FlexIPConfig("counted", width, blocks, clip=clip, dino=dino, **choices))
    patches = (dino.image_size // build_dino_tower(dino, "meta").model.patch_embed.patch_size[0]) ** 2
    mode = FakeTensorMode()
    fill(unet, torch.bfloat16 if cfg.precision == "bf16" else torch.float32, mode)
    fill(network, torch.float32, mode)
    return Stage(cfg, unet, network, size, patches), mode


def fill(module: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    """From the meta device to fake tensors of the CPU, which go through the attention kernels that real ones go through."""
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    with mode:
        tensors = {key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}
    module.load_state_dict(tensors, assign=True)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Stage:
    """The forward pass of a training step; the weights, and so everything else, may be real or fake tensors."""

    cfg: TrainConfig
    unet: nn.Module
    network: FlexIPNetwork
    size: int  # pixels
    patches: int  # of a reference

    def kept(self, rows: int) -> int:
        """Bytes that it keeps for `rows` rows."""
        kept = self._nothing()
        with counting(kept):
            self.forward(rows)
        return kept.bytes

    def largest_block(self) -> int:
        """Bytes that the largest of the blocks which `recompute` means keeps for one row."""
        kept, before, found = self._nothing(), {}, []
        with ExitStack() as hooks:
            for block in self.unet.modules():
                if type(block).__name__ in BLOCKS:
                    enter = block.register_forward_pre_hook(lambda block, inputs: before.update({block: kept.bytes}))
                    leave = block.register_forward_hook(lambda block, *_: found.append(kept.bytes - before[block]))
                    hooks.callback(enter.remove)
                    hooks.callback(leave.remove)
            with counting(kept):
                self.forward(1)
        return max(found)

    def forward(self, rows: int) -> torch.Tensor:
        """Trainer.losses on nothing in particular."""
        about, unet, side = self.network.cfg, self.unet, self.size // SIDE
        latents = torch.randn(rows, unet.config.in_channels, side, side)
        text = torch.randn(rows, TEXT_TOKENS, about.text_width)
        cls, patches = torch.randn(rows, about.clip.width), torch.randn(rows, self.patches, about.dino.width)
        added = None
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            added = {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.randn(rows, 6)}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"), LikeCuda():
            features, gates = {"cls": cls, "patches": patches}, (0.5,) * rows
            with gated(unet, branches(self.network, features, text, gates, adapters=self.cfg.train_adapters)):
                out = unet(
                    latents,
                    torch.zeros(rows, dtype=torch.long),
                    encoder_hidden_states=text,
                    added_cond_kwargs=added,
                    return_dict=False,
                )[0]
        return (out.float() - latents).square().mean((1, 2, 3))

    def _nothing(self) -> Kept:
        return Kept([*self.unet.parameters(), *self.network.parameters()])


def encoders(base_kind: str, clip: ClipConfig = ClipConfig(), dino: DinoConfig = DinoConfig()) -> dict[str, int]:
    """Bytes of what is needed only where latents, texts and features were not computed before; all in fp32."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        modules = {
            "text encoder": nn.ModuleList(CLIPTextModel(CLIPTextConfig(**config)) for config in TEXTS[base_kind]),
            "VAE": AutoencoderKL(**VAE),
            "CLIP image tower": build_clip_tower(clip, "meta"),
            "DINO": build_dino_tower(dino, "meta"),
        }
    return {name: sum(map(bytes_of, module.parameters())) for name, module in modules.items()}


def report(cfg: TrainConfig, base_kind: str, size: int, ranks: int = 1) -> str:
    """A table for people: what one GPU has to hold, with the config's recompute and with the other choice."""
    if base_kind not in UNETS:
        raise ValueError(f"The base must be one of {', '.join(UNETS)}, got {base_kind!r}.")
    if size % 64 or size < 64:
        raise ValueError(f"The size must be a multiple of 64 pixels, got {size}.")
    if cfg.batch % ranks:
        raise ValueError(f"batch = {cfg.batch} rows cannot be shared evenly by {ranks} ranks.")
    found = {
        again: count(dataclasses.replace(cfg, recompute=again), UNETS[base_kind], size, ranks)
        for again in (False, True)
    }
    own, other = found[cfg.recompute], found[not cfg.recompute]
    lines = [
        ("UNet, frozen", own.unet),
        ("adapters, fp32", own.adapters),
        ("their gradients", own.gradients),
        ("their AdamW moments", own.moments),
        ("their average", own.average),
        ("weights copied to bf16", own.copies),
        (f"activations, {own.rows} x {own.row / MB:,.0f} MB", own.rows * own.row),
        (f"the largest block again, {own.rows} x {own.block / MB:,.0f} MB", own.rows * own.block),
    ]
    loaded = encoders(base_kind)
    parts = ", ".join(f"{name} {value / MB:,.0f}" for name, value in loaded.items())
    title = (
        f"{base_kind} at {size} px, {own.rows} rows per GPU, {cfg.precision}, recompute {str(cfg.recompute).lower()}"
    )
    table = [f"{text:<44}{value / MB:>10,.0f} MB" for text, value in [*lines, ("sum", own.total)] if value]
    return "\n".join(
        [
            title,
            *table,
            f"With recompute {str(not cfg.recompute).lower()} the sum is {other.total / MB:,.0f} MB.",
            f"Without a cache the encoders come on top: {sum(loaded.values()) / MB:,.0f} MB ({parts}).",
            "Counted tensor by tensor, as if gradients and activations were there at once; allocator and kernels take some more.",
        ]
    )
