"""Levels and presets hold on ComfyUI's own UNets, and FlexIPBlocks hands on what it shows."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from flexip_pack.flexip_core.network.blocks import block_levels, cross_attentions
from flexip_pack.flexip_core.run import depth
from flexip_pack.nodes.depth import FlexIPBlocks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import noise_for, tiny_model

SD15 = {
    "model_channels": 320,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "context_dim": 768,
    "num_heads": 8,
}
SDXL = {
    "model_channels": 320,
    "num_res_blocks": [2] * 3,
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3,
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
VEGA = SDXL | {  # a distilled SDXL with the same blocks and few transformers in them: fast
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0] * 3 + [1] * 3 + [2] * 3,
}
KOALA = SDXL | {  # a distilled SDXL with blocks that no preset's table knows
    "num_res_blocks": [1] * 3,
    "transformer_depth": [0, 2, 5],
    "transformer_depth_middle": 5,
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
}
RESAMPLING_RESBLOCKS = SD15 | {"resblock_updown": True}  # no known checkpoint, but ComfyUI's class can do it
CONFIGS = {"SD15": SD15, "SDXL": SDXL, "Vega": VEGA, "KOALA": KOALA, "resblock_updown": RESAMPLING_RESBLOCKS}
SIZES = st.integers(1, 80)


@cache
def on_meta(name: str) -> UNetModel:
    """Full size, without memory or arithmetic: only shapes."""
    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
    return UNetModel(**config, **CONFIGS[name], device="meta").eval()


def observed(model: torch.nn.Module, x: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Block address -> (tokens, ComfyUI's count of the transformer) as a call of the model shows them."""
    seen = {}

    def look(q, k, v, extra_options):
        kind, number = extra_options["block"]
        address = f"{kind}.{number}.{extra_options['block_index']}"
        seen[address] = q.shape[1], extra_options["transformer_index"]
        return torch.zeros_like(q)

    keys = [address.split(".") for address in cross_attentions(model)]
    patches = {(kind, int(number), int(index)): look for kind, number, index in keys}
    text_width = next(iter(cross_attentions(model).values())).to_k.weight.shape[1]
    y = torch.zeros(1, 2816, device=x.device) if model.num_classes else None
    with torch.no_grad():
        model(
            x,
            timesteps=torch.ones(1, device=x.device),
            context=torch.zeros(1, 77, text_width, device=x.device),
            y=y,
            transformer_options={"patches_replace": {"attn2": patches}},
        )
    return seen


@cache
def observed_once(name: str) -> dict[str, tuple[int, int]]:
    return observed(on_meta(name), torch.empty(1, 4, 16, 16, device="meta"))


def check_tokens(model: torch.nn.Module, x: torch.Tensor) -> None:
    levels = block_levels(model)
    assert list(levels) == list(cross_attentions(model))
    height, width = x.shape[-2:]
    expected = {a: math.ceil(height / 2**level) * math.ceil(width / 2**level) for a, level in levels.items()}
    assert {address: tokens for address, (tokens, _) in observed(model, x).items()} == expected


@pytest.mark.parametrize("name", ["SD15", "Vega"])
def test_tokens_of_every_block_follow_from_its_level_at_any_size(name: str) -> None:
    @settings(max_examples=5)  # each walks a whole UNet
    @given(height=SIZES, width=SIZES)
    @example(height=9, width=13)
    @example(height=7, width=5)
    @example(height=1, width=1)
    @example(height=65, width=33)
    def check(height: int, width: int) -> None:
        check_tokens(on_meta(name), torch.empty(1, 4, height, width, device="meta"))

    check()


@settings(max_examples=15)  # each runs a UNet
@given(height=st.integers(3, 24), width=st.integers(3, 24))  # it is so narrow that torch refuses to norm 1 x 1
@example(height=7, width=5)
def test_tokens_of_a_model_that_computes_follow_from_the_levels(height: int, width: int) -> None:
    check_tokens(small_model().model.diffusion_model, noise_for(1, height, width))


@cache
def small_model():
    return tiny_model()


def test_levels_count_resblocks_that_resample() -> None:
    model = on_meta("resblock_updown")
    assert block_levels(model) == block_levels(on_meta("SD15"))
    check_tokens(model, torch.empty(1, 4, 24, 40, device="meta"))


def test_levels_of_the_known_models() -> None:
    sd15, sdxl = block_levels(on_meta("SD15")), block_levels(on_meta("SDXL"))
    assert Counter(sd15.values()) == {0: 5, 1: 5, 2: 5, 3: 1} and sd15["middle.0.0"] == 3
    assert Counter(sdxl.values()) == {1: 10, 2: 60} and sdxl["middle.0.9"] == 2


def test_a_model_without_such_blocks_has_no_levels() -> None:
    assert block_levels(torch.nn.Linear(2, 2)) == {}


def acting(preset: str, levels: dict[str, int]) -> dict[str, float]:
    resolved = depth.BlockStrengths(depth.Spec(preset), depth.Spec("all")).resolve(levels)["preservation"]
    return {address: strength for address, strength in resolved.items() if strength}


# IPAdapter_plus 9d076a3, IPAdapterPlus.py, weight types "composition" and "style transfer", by ComfyUI's count of the transformer.
IPADAPTER_PLUS = {
    ("SD15", "composition only"): {4: 0.25, 5: 1.0},
    ("SD15", "style only"): dict.fromkeys((0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15), 1.0),
    ("SDXL", "composition only"): {3: 1.0},
    ("SDXL", "style only"): {6: 1.0},
}


@pytest.mark.parametrize("name, preset", IPADAPTER_PLUS)
def test_composition_and_style_are_the_blocks_that_ipadapter_plus_means(name: str, preset: str) -> None:
    model = on_meta(name)
    counts = observed_once(name)
    table = IPADAPTER_PLUS[name, preset]
    expected = {address: table[count] for address, (_, count) in counts.items() if count in table}
    assert acting(preset, block_levels(model)) == expected


@pytest.mark.parametrize(
    "preset, diffusers_name",
    [("composition only", "down_blocks.2.attentions.1"), ("style only", "up_blocks.0.attentions.1")],
)
def test_composition_and_style_of_sdxl_are_instantstyles_blocks(preset: str, diffusers_name: str) -> None:
    names = comfy.utils.unet_to_diffusers(SDXL)
    block, _, layer = names[f"{diffusers_name}.proj_in.weight"].partition(".")  # input_blocks, 8.1.proj_in.weight
    prefix = f"{block.removesuffix('_blocks')}.{layer.split('.')[0]}."
    levels = block_levels(on_meta("SDXL"))
    assert acting(preset, levels) == {address: 1.0 for address in levels if address.startswith(prefix)}
    assert len(acting(preset, levels)) == 10


def test_other_unets_get_the_last_block_down_and_the_deepest_blocks_up() -> None:
    levels = block_levels(on_meta("KOALA"))
    assert blocks_of(acting("composition only", levels)) == {"input.5"}
    assert blocks_of(acting("style only", levels)) == {"output.0", "output.1"}


def blocks_of(addresses) -> set[str]:
    return {address.rpartition(".")[0] for address in addresses}


def run(*args, **kwargs):
    return FlexIPBlocks.execute(*args, **kwargs)


def test_the_node_hands_on_both_choices_and_shows_every_block_of_the_model() -> None:
    model = small_model()
    out = run("list", "coarse", "input=0.5, all=2", "all=1", model)
    (strengths,) = out.args
    levels = block_levels(model.model.diffusion_model)
    resolved = strengths.resolve(levels)
    assert resolved["preservation"] == {a: 0.5 if a.startswith("input") else 2.0 for a in levels}
    assert resolved["personalization"] == {a: float(level > 0) for a, level in levels.items()}
    (text,) = out.ui["text"]
    assert text == (
        "preservation: 2 in middle.0, output.0, output.1, output.2, output.3; 0.5 in input.1, input.3.\n"
        "personalization: 1 in input.3, middle.0, output.0, output.1; 0 elsewhere"
    )


def test_the_node_without_a_model_checks_only_the_syntax() -> None:
    out = run("all", "list", "", "input.3=1")
    assert out.ui is None and out.args[0].personalization.entries == (("input.3", 1.0),)
    with pytest.raises(ValueError, match="FlexIPBlocks: personalization_list has 'input.3'"):
        run("all", "list", "", "input.3")


def test_the_node_with_a_model_refuses_an_address_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"preservation_list names input\.2, .* its blocks are input\.1\.0, "):
        run("list", "all", "input.2=1", "", small_model())


def test_a_model_that_is_no_unet_is_refused() -> None:
    class Patcher:
        class model:
            diffusion_model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="FlexIPBlocks: the model .* is not a UNet with text cross-attentions"):
        run("all", "all", "", "", Patcher())


def test_every_socket_of_the_node_has_a_tooltip_and_execute_takes_its_inputs_in_order() -> None:
    schema = FlexIPBlocks.define_schema()
    code = FlexIPBlocks.execute.__func__.__code__
    assert code.co_varnames[1 : code.co_argcount] == tuple(i.id for i in schema.inputs)
    assert all(socket.tooltip for socket in [*schema.inputs, *schema.outputs])
    assert schema.outputs[0].get_io_type() == "FLEXIP_BLOCKS"
    defaults = [i.default for i in schema.inputs[:4]]
    assert run(*defaults).args[0] == depth.BlockStrengths(depth.Spec("all"), depth.Spec("all"))
    depth.parse(schema.inputs[2].default, "x"), depth.parse(schema.inputs[2].placeholder, "x")
