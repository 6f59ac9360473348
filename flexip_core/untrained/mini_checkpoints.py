"""Seeded, untrained Stable Diffusion checkpoints of a few megabytes that ComfyUI's stock CheckpointLoaderSimple loads.

ComfyUI recognises a family by a few shapes (comfy/model_detection.py) and takes the rest from the file: the UNet may
have few and narrow levels, the VAE may be a TAESD. Only the text encoders must have their full size, because their
layers and widths are fixed; a missing one would stay uninitialised memory (code that loads the file may say how many
layers there are). So every tensor is a strided view into a few
shared pools: torch.save stores each pool once, torch.load(weights_only=True) restores the views, and the file stays
small whatever the widths. (Safetensors writes views out in full, hence the .ckpt.)
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.weights import write_atomically

BASE_CHANNELS = 320  # by this width ComfyUI tells SD1.5 and SDXL from other families
TIME_CHANNELS = 4 * BASE_CHANNELS
POOL_SIZE = 1 << 17  # values per pool; a row of a weight must fit in


@dataclass(frozen=True)
class Family:
    text_width: int
    linear_projection: bool  # proj_in of a transformer: linear, else a 1x1 convolution
    vector_width: int  # of SDXL's pooled conditioning, 0 without
    vae_scale: float


@dataclass(frozen=True)
class Layout:
    """A UNet's shape: per level its width and residual blocks, per residual block its transformer layers."""

    family: Family
    widths: tuple[int, ...]
    res_blocks: int
    input_depths: tuple[int, ...]
    middle_depth: int
    output_depths: tuple[int, ...]


SD15 = Family(text_width=768, linear_projection=False, vector_width=0, vae_scale=0.18215)
SDXL = Family(text_width=2048, linear_projection=True, vector_width=2816, vae_scale=0.13025)

_SD15_DEPTHS = ((1, 1, 1, 1, 1, 1, 0, 0), 1, (0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1))
_SDXL_DEPTHS = ((0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0))

# min: as small as the family's detection allows. narrow: every block of the real model, all 320 wide. full: real
# widths.
# SDXL is recognised by its input depths; (0, 2, 5) is the distilled KOALA-700M, which ComfyUI treats as an SDXL. Middle and
# outputs mirror the inputs, because diffusers' UNet can hold nothing else.
LAYOUTS = {
    "sd15_min": Layout(SD15, (320, 320), 1, (0, 1), 1, (1, 1, 0, 0)),
    "sd15_narrow": Layout(SD15, (320, 320, 320, 320), 2, *_SD15_DEPTHS),
    "sd15_full": Layout(SD15, (320, 640, 1280, 1280), 2, *_SD15_DEPTHS),
    "sdxl_min": Layout(SDXL, (320, 320, 320), 1, (0, 2, 5), 5, (5, 5, 2, 2, 0, 0)),
    "sdxl_narrow": Layout(SDXL, (320, 320, 320), 2, *_SDXL_DEPTHS),
    "sdxl_full": Layout(SDXL, (320, 640, 1280), 2, *_SDXL_DEPTHS),
}


def block_widths(layout: str) -> dict[str, int]:
    """ComfyUI's address of every cross-attention ("input.3.0": kind, block number, transformer index) and its width."""
    return {
        f"{block.kind}.{block.number}.{index}": block.width
        for block in _blocks(_layout(layout))
        for index in range(block.depth)
    }


def make_base(
    path: str | Path,
    layout: str = "sd15_min",
    seed: int = 0,
    text_layers: tuple[int, int] = (12, 32),
    full_vae: bool = False,
) -> None:
    """Writes a checkpoint (UNet, text encoders, VAE) to `path`, which must end in .ckpt.

    `text_layers` of CLIP-L and bigG: fewer than the real ones only if ComfyUI is told. `full_vae`: SD's own, not a TAESD.
    """
    if Path(path).suffix != ".ckpt":
        raise ValueError(f"A mini checkpoint is a .ckpt file (its tensors share memory), got {Path(path).name}.")
    shape = _layout(layout)
    weights = Weights(seed)
    _unet(weights, shape)
    if shape.family is SDXL:
        _clip_l(weights, "conditioner.embedders.0.transformer.text_model.", layers=text_layers[0])
        _clip_g(weights, "conditioner.embedders.1.model.", layers=text_layers[1])
    else:
        _clip_l(weights, "cond_stage_model.transformer.text_model.", layers=text_layers[0])
    if full_vae:
        _vae(weights, "first_stage_model.")
    else:
        _taesd(weights, "first_stage_model.", shape.family.vae_scale)
    # Through memory: given a path, torch.save would write the file's name into the file.
    buffer = io.BytesIO()
    torch.save({"state_dict": weights.tensors}, buffer)
    write_atomically(path, buffer.getvalue())


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"A mini checkpoint's layout is one of {', '.join(LAYOUTS)}, got {name!r}.")
    return LAYOUTS[name]


class Weights:
    """Collects named tensors; each is a view into a seeded random pool, one pool per magnitude."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tensors: dict[str, Tensor] = {}
        self._pools: dict[object, Tensor] = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> None:
        """Normally distributed; neighbouring rows overlap in memory, so no two rows of a tensor are equal."""
        row = math.prod(shape[1:])
        step = min(row, max(1, (POOL_SIZE - row) // shape[0]))
        room = POOL_SIZE - ((shape[0] - 1) * step + row)
        if room < 0:
            raise ValueError(f"{name} with shape {shape} does not fit a pool of {POOL_SIZE} values.")
        inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
        offset = len(self.tensors) * 7919 % (room + 1)  # a prime, so that tensors of one shape start apart
        self.tensors[name] = torch.as_strided(self._normal_pool(std), shape, [step, *inner], offset)

    def constant(self, name: str, size: int, value: float) -> None:
        pool = self._pools.setdefault(("constant", value), torch.full((1,), value, dtype=torch.float16))
        self.tensors[name] = pool.expand(size)

    def linear(self, name: str, n_in: int, n_out: int, bias: bool = True, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        if bias:
            self.constant(f"{name}.bias", n_out, 0.0)

    def conv(self, name: str, n_in: int, n_out: int, kernel: int, bias: bool = True, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", (n_out, n_in, kernel, kernel), gain / math.sqrt(n_in * kernel * kernel))
        if bias:
            self.constant(f"{name}.bias", n_out, 0.0)

    def norm(self, name: str, size: int) -> None:
        self.constant(f"{name}.weight", size, 1.0)
        self.constant(f"{name}.bias", size, 0.0)

    def _normal_pool(self, std: float) -> Tensor:
        magnitude = round(4 * math.log2(std))  # steps of a quarter octave keep the pools few
        if magnitude not in self._pools:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + magnitude + 1_000)
            values = torch.randn(POOL_SIZE, generator=generator) * 2 ** (magnitude / 4)
            self._pools[magnitude] = values.half()
        return self._pools[magnitude]


@dataclass(frozen=True)
class Block:
    """One numbered UNet block with a residual block, `depth` transformer layers and perhaps a change of resolution."""

    kind: str
    number: int
    width_in: int
    width: int
    depth: int
    resample: str = ""  # "down" (a block of its own) or "up" (at the end of the block)


def _blocks(layout: Layout) -> Iterator[Block]:
    """In the order of the forward pass; input block 0, the first convolution, is left out."""
    width, skips, number = BASE_CHANNELS, [BASE_CHANNELS], 1
    input_depths, output_depths = iter(layout.input_depths), iter(layout.output_depths)
    levels = list(enumerate(layout.widths))
    for level, level_width in levels:
        for _ in range(layout.res_blocks):
            yield Block("input", number, width, level_width, next(input_depths))
            width, number = level_width, number + 1
            skips.append(width)
        if level < len(levels) - 1:
            yield Block("input", number, width, width, 0, "down")
            number += 1
            skips.append(width)
    yield Block("middle", 0, width, width, layout.middle_depth)
    number = 0
    for level, level_width in reversed(levels):
        for repeat in range(layout.res_blocks + 1):
            up = "up" if level > 0 and repeat == layout.res_blocks else ""
            yield Block("output", number, width + skips.pop(), level_width, next(output_depths), up)
            width, number = level_width, number + 1


def _unet(weights: Weights, layout: Layout, root: str = "model.diffusion_model.") -> None:
    family = layout.family
    weights.linear(f"{root}time_embed.0", BASE_CHANNELS, TIME_CHANNELS)
    weights.linear(f"{root}time_embed.2", TIME_CHANNELS, TIME_CHANNELS)
    if family.vector_width:
        weights.linear(f"{root}label_emb.0.0", family.vector_width, TIME_CHANNELS)
        weights.linear(f"{root}label_emb.0.2", TIME_CHANNELS, TIME_CHANNELS)
    weights.conv(f"{root}input_blocks.0.0", 4, BASE_CHANNELS, 3)
    for block in _blocks(layout):
        name = f"{root}middle_block" if block.kind == "middle" else f"{root}{block.kind}_blocks.{block.number}"
        if block.resample == "down":
            weights.conv(f"{name}.0.op", block.width, block.width, 3)
            continue
        _res_block(weights, f"{name}.0", block.width_in, block.width)
        if block.depth:
            _transformer(weights, f"{name}.1", block.width, block.depth, family)
        if block.kind == "middle":
            _res_block(weights, f"{name}.2", block.width, block.width)
        if block.resample == "up":
            weights.conv(f"{name}.{2 if block.depth else 1}.conv", block.width, block.width, 3)
    weights.norm(f"{root}out.0", layout.widths[0])
    weights.conv(f"{root}out.2", layout.widths[0], 4, 3)


def _res_block(weights: Weights, name: str, n_in: int, n_out: int) -> None:
    weights.norm(f"{name}.in_layers.0", n_in)
    weights.conv(f"{name}.in_layers.2", n_in, n_out, 3)
    weights.linear(f"{name}.emb_layers.1", TIME_CHANNELS, n_out)
    weights.norm(f"{name}.out_layers.0", n_out)
    weights.conv(f"{name}.out_layers.3", n_out, n_out, 3, gain=0.3)
    if n_in != n_out:
        weights.conv(f"{name}.skip_connection", n_in, n_out, 1)


def _transformer(weights: Weights, name: str, width: int, depth: int, family: Family) -> None:
    weights.norm(f"{name}.norm", width)
    for part, gain in (("proj_in", 1.0), ("proj_out", 0.3)):
        if family.linear_projection:
            weights.linear(f"{name}.{part}", width, width, gain=gain)
        else:
            weights.conv(f"{name}.{part}", width, width, 1, gain=gain)
    for index in range(depth):
        layer = f"{name}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", family.text_width)):
            weights.linear(f"{layer}.{attention}.to_q", width, width, bias=False)
            weights.linear(f"{layer}.{attention}.to_k", context, width, bias=False)
            weights.linear(f"{layer}.{attention}.to_v", context, width, bias=False)
            weights.linear(f"{layer}.{attention}.to_out.0", width, width)
        weights.linear(f"{layer}.ff.net.0.proj", width, 8 * width)
        weights.linear(f"{layer}.ff.net.2", 4 * width, width)
        for norm in ("norm1", "norm2", "norm3"):
            weights.norm(f"{layer}.{norm}", width)


def _clip_l(weights: Weights, root: str, width: int = 768, layers: int = 12) -> None:
    """The CLIP-L text encoder under the names of Hugging Face transformers."""
    weights.normal(f"{root}embeddings.token_embedding.weight", (49408, width), 0.02)
    weights.normal(f"{root}embeddings.position_embedding.weight", (77, width), 0.01)
    for index in range(layers):
        layer = f"{root}encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj"):
            weights.linear(f"{layer}.self_attn.{part}", width, width)
        weights.linear(f"{layer}.self_attn.out_proj", width, width, gain=0.3)
        weights.linear(f"{layer}.mlp.fc1", width, 4 * width)
        weights.linear(f"{layer}.mlp.fc2", 4 * width, width, gain=0.3)
        weights.norm(f"{layer}.layer_norm1", width)
        weights.norm(f"{layer}.layer_norm2", width)
    weights.norm(f"{root}final_layer_norm", width)


def _clip_g(weights: Weights, root: str, width: int = 1280, layers: int = 32) -> None:
    """The OpenCLIP bigG text encoder under open_clip's names, as SDXL files have it."""
    weights.normal(f"{root}token_embedding.weight", (49408, width), 0.02)
    weights.normal(f"{root}positional_embedding", (77, width), 0.01)
    weights.normal(f"{root}text_projection", (width, width), width**-0.5)
    for index in range(layers):
        layer = f"{root}transformer.resblocks.{index}"
        weights.normal(f"{layer}.attn.in_proj_weight", (3 * width, width), width**-0.5)
        weights.constant(f"{layer}.attn.in_proj_bias", 3 * width, 0.0)
        weights.linear(f"{layer}.attn.out_proj", width, width, gain=0.3)
        weights.linear(f"{layer}.mlp.c_fc", width, 4 * width)
        weights.linear(f"{layer}.mlp.c_proj", 4 * width, width, gain=0.3)
        weights.norm(f"{layer}.ln_1", width)
        weights.norm(f"{layer}.ln_2", width)
    weights.norm(f"{root}ln_final", width)


def _taesd(weights: Weights, root: str, scale: float, width: int = 64) -> None:
    """A TAESD (tiny autoencoder), which ComfyUI's VAE loader accepts inside a checkpoint."""

    def stack(name: str, blocks: tuple[int, ...], resamplings: tuple[int, ...]) -> None:
        for block in blocks:
            for conv in (0, 2, 4):
                weights.conv(f"{name}.{block}.conv.{conv}", width, width, 3, gain=0.7)
        for resampling in resamplings:
            weights.conv(f"{name}.{resampling}", width, width, 3, bias=False)

    encoder, decoder = f"{root}taesd_encoder", f"{root}taesd_decoder"
    weights.conv(f"{encoder}.0", 3, width, 3)
    stack(encoder, (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (2, 6, 10))
    weights.conv(f"{encoder}.14", width, 4, 3)
    weights.conv(f"{decoder}.1", 4, width, 3)
    stack(decoder, (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17))
    weights.conv(f"{decoder}.19", width, 3, 3, gain=0.2)
    weights.constant(f"{decoder}.19.bias", 3, 0.5)  # mid grey
    weights.tensors[f"{root}vae_scale"] = torch.tensor(scale)
    weights.tensors[f"{root}vae_shift"] = torch.tensor(0.0)


def _vae(
    weights: Weights, root: str, width: int = 128, factors: tuple[int, ...] = (1, 2, 4, 4), layers: int = 2
) -> None:
    """The autoencoder of SD1.5 and SDXL; its sizes are fixed in ComfyUI."""

    def res_block(name: str, n_in: int, n_out: int) -> None:
        weights.norm(f"{name}.norm1", n_in)
        weights.conv(f"{name}.conv1", n_in, n_out, 3)
        weights.norm(f"{name}.norm2", n_out)
        weights.conv(f"{name}.conv2", n_out, n_out, 3, gain=0.3)
        if n_in != n_out:
            weights.conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def middle(name: str, width: int) -> None:
        res_block(f"{name}.block_1", width, width)
        weights.norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v"):
            weights.conv(f"{name}.attn_1.{part}", width, width, 1)
        weights.conv(f"{name}.attn_1.proj_out", width, width, 1, gain=0.3)
        res_block(f"{name}.block_2", width, width)

    levels = [width * factor for factor in factors]
    encoder, decoder = f"{root}encoder", f"{root}decoder"
    weights.conv(f"{encoder}.conv_in", 3, width, 3)
    before = width
    for level, now in enumerate(levels):
        for block in range(layers):
            res_block(f"{encoder}.down.{level}.block.{block}", before, now)
            before = now
        if level < len(levels) - 1:
            weights.conv(f"{encoder}.down.{level}.downsample.conv", now, now, 3)
    middle(f"{encoder}.mid", before)
    weights.norm(f"{encoder}.norm_out", before)
    weights.conv(f"{encoder}.conv_out", before, 8, 3)
    weights.conv(f"{root}quant_conv", 8, 8, 1)
    weights.conv(f"{root}post_quant_conv", 4, 4, 1)
    weights.conv(f"{decoder}.conv_in", 4, before, 3)
    middle(f"{decoder}.mid", before)
    for level, now in reversed(list(enumerate(levels))):
        for block in range(layers + 1):
            res_block(f"{decoder}.up.{level}.block.{block}", before, now)
            before = now
        if level:
            weights.conv(f"{decoder}.up.{level}.upsample.conv", now, now, 3)
    weights.norm(f"{decoder}.norm_out", before)
    weights.conv(f"{decoder}.conv_out", before, 3, 3, gain=0.2)
