"""FlexIP in diffusers' UNet2DConditionModel (SD1.5 and SDXL class), with the gate and attention code of ComfyUI's side.

    network = load_checkpoint("flexip.safetensors").to(pipe.device)
    features = encode_references(network, [picture], "clip_vision.safetensors", "dinov2.safetensors")
    text, no_text = pipe.encode_prompt("a dog on a beach", pipe.device, 1, True, "")[:2]
    with gated(pipe.unet, guided(network, features, text, no_text, gates=(0.7,))):
        image = pipe(prompt_embeds=text, negative_prompt_embeds=no_text).images[0]

Everything is row by row: a batch may hold b references, b texts and b gates. A pipeline with classifier-free guidance makes two
rows of each one, for which `guided` is; for a UNet called by hand `branches` gives the rows as they are. All of it is differentiable.

Shape legend: b batch, n image tokens, t text tokens, w text width, c inner width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from ..encoders.towers import load_tower
from ..network.adapters import ADAPTERS, FlexIPNetwork
from ..network.attention import Branch, attention, decoupled_attention
from ..network.gate import Numbers, gated_branches
from ..pictures.crop import normalise, prepare

BlockBranches = Mapping[str, tuple[Branch, ...]]
"""Block address -> what the block's cross-attention adds."""
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # whose arithmetic GatedProcessor repeats


def branches(
    network: FlexIPNetwork,
    features: Mapping[str, torch.Tensor],
    text: torch.Tensor,
    gates: Numbers,
    strengths: Numbers = (1.0,),
    adapters: Iterable[str] = ADAPTERS,
) -> BlockBranches:
    """K and V of every block for "cls" (b, clip width), "patches" (b, p, dino width) and text (b, t, w).

    `gates` and `strengths`: one number, or one per row. `adapters`: those that take part.
    """
    kv = {name: network.project(name, network.row_tokens(name, features, text)) for name in adapters}
    return {
        address: gated_branches(
            network.gate_mode,
            gates,
            strengths,
            *(Branch(*kv[name][address]) if name in kv else None for name in ADAPTERS),
        )
        for address in network.block_widths
    }


def guided(
    network: FlexIPNetwork,
    features: Mapping[str, torch.Tensor],
    text: torch.Tensor,
    no_text: torch.Tensor,
    gates: Numbers = (0.6,),
    strengths: Numbers = (1.0,),
) -> BlockBranches:
    """`branches` for a pipeline with classifier-free guidance, which runs the negative rows first.

    text and no_text (b, t, w) as pipe.encode_prompt gives them (with negative_prompt "", as ComfyUI has it). One reference serves
    all b rows. The negative rows get the null reference, as in ComfyUI.
    """
    dtype = next(network.parameters()).dtype  # may be another one than the pipeline's
    rows = {name: value.to(dtype).expand(len(text), *value.shape[1:]) for name, value in features.items()}
    both = {name: torch.cat([torch.zeros_like(value), value]) for name, value in rows.items()}
    return branches(network, both, torch.cat([no_text, text]).to(dtype), _twice(gates), _twice(strengths))


def _twice(numbers: Numbers) -> Numbers:
    return numbers if len(numbers) == 1 else (*numbers, *numbers)


@torch.no_grad()
def encode_references(
    network: FlexIPNetwork,
    pictures: Sequence[Image.Image],
    clip_vision: str | Path,
    dino: str | Path,
    crop: str = "center",
) -> dict[str, torch.Tensor]:
    """What the adapters read of each picture, row by row, on the network's device; `crop` as in Encode Reference.

    `clip_vision` and `dino` are the encoders' files, of the kind that the adapters were trained with: others are refused.
    """
    device, features = next(network.parameters()).device, {}
    for need in network.needs():
        tower = load_tower(need.encoder, dino if need.kind == "patches" else clip_vision).to(device)
        squares = [prepare(_floats(picture), None, crop, tower.image_size) for picture in pictures]
        features[need.name] = tower(normalise(torch.stack(squares), tower.mean, tower.std).to(device))
    return features


def _floats(picture: Image.Image) -> torch.Tensor:
    """(h, w, 3 or 4) in 0..1"""
    picture = picture.convert(
        "RGBA" if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info else "RGB"
    )
    return torch.from_numpy(np.array(picture)).float() / 255


@contextlib.contextmanager
def gated(unet: nn.Module, branches: BlockBranches) -> Iterator[None]:
    """Inside the block, every call of `unet` adds `branches`; afterwards its own attention processors are back.

    Raises ValueError where the blocks are not those of this UNet, RuntimeError where another library holds an attention.
    """
    found = cross_attentions(unet)
    if strangers := sorted(set(branches) - set(found)):
        raise ValueError(
            f"FlexIP: these adapters are for a UNet with a cross-attention at {strangers[0]}, but this one has "
            f"{', '.join(found)}. Choose adapters made for this base."
        )
    own = {address: found[address].processor for address in branches}
    for address, processor in own.items():
        if (name := type(processor).__name__) not in PLAIN_PROCESSORS:
            raise RuntimeError(
                f"FlexIP: the cross-attention at {address} already runs {name}; unload that adapter, or call "
                "unet.set_attn_processor(AttnProcessor2_0()), before FlexIP is attached."
            )
    try:
        for address, added in branches.items():
            found[address].processor = GatedProcessor(added)
        yield
    finally:
        for address, processor in own.items():
            found[address].processor = processor


class GatedProcessor:
    """diffusers' plain cross-attention, and the gated branches added before its output projection."""

    def __init__(self, branches: tuple[Branch, ...]):
        self.branches = branches

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (b, n, c), encoder_hidden_states (b, t, w) -> (b, n, c)"""
        if attention_mask is not None:
            b, t = encoder_hidden_states.shape[:2]
            mask = attn.prepare_attention_mask(attention_mask, t, b)
            attention_mask = mask.view(b, attn.heads, -1, mask.shape[-1])
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = attention(q, k, v, attn.heads, attention_mask)
        out = decoupled_attention(out, q, self.branches, attn.heads)
        for layer in attn.to_out:
            out = layer(out)
        return out


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """ComfyUI's block address -> attn2 module, in the order of execution, as flexip_core.network.blocks.cross_attentions gives them."""
    return {address: unet.get_submodule(name) for address, name in attention_names(unet).items()}


def attention_names(unet: nn.Module) -> dict[str, str]:
    """ComfyUI's block address -> diffusers' name of the attn2 module.

    ComfyUI counts every ResBlock (with its transformer), and on the way down every downsampler and the first convolution, as
    one block; an upsampler belongs to the block before it.
    """
    names: dict[str, str] = {}
    number = 1
    for i, block in enumerate(unet.down_blocks):
        _add_names(names, "input", number, f"down_blocks.{i}", block)
        number += len(block.resnets) + (block.downsamplers is not None)
    _add_names(names, "middle", 0, "mid_block", unet.mid_block)
    number = 0
    for i, block in enumerate(unet.up_blocks):
        _add_names(names, "output", number, f"up_blocks.{i}", block)
        number += len(block.resnets)
    return names


def _add_names(names: dict[str, str], kind: str, number: int, prefix: str, block: nn.Module | None) -> None:
    for j, layer in enumerate(getattr(block, "attentions", ())):
        for index, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
            if transformer.attn2 is not None:
                names[f"{kind}.{number + j}.{index}"] = f"{prefix}.attentions.{j}.transformer_blocks.{index}.attn2"


def block_widths(unet: nn.Module) -> dict[str, int]:
    """Inner width per block address: FlexIPConfig.blocks."""
    return {address: attn.to_q.weight.shape[0] for address, attn in cross_attentions(unet).items()}


def text_projections(unet: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The UNet's own text to_k and to_v weights per block address, for FlexIPNetwork.init_from_text."""
    return {address: (attn.to_k.weight, attn.to_v.weight) for address, attn in cross_attentions(unet).items()}
