"""Precision: the adapter follows the query, whatever the model is stored in, calculated in, and attended with.

users.md row 4 (dtype mismatch: errors and black pictures) and row 8 (other devices). Every picture is compared with that of the same
weights in float32, and with how far the bare model's own picture is from its float32 one.
"""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as core_attention
import comfy.ops
import comfy.sd
import pytest
import tiny
import torch
from comfy_extras import nodes_model_advanced
from conftest import REPO
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.attention import Branch, GatedAttention, decoupled_attention
from flexip_pack.flexip_core.network.blocks import cross_attentions
from flexip_pack.flexip_core.pictures import crop
from flexip_pack.flexip_core.untrained import mini_checkpoints
from flexip_pack.nodes import runtime
from pairs import pairs

P, N = tiny.cond(1), tiny.cond(2)
FULL, HALF, BRAIN, EIGHT = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
# (stored, calculated in) -> how far the picture may be from the same weights' in float32
MODELS = {
    (FULL, FULL): 1e-5,
    (HALF, HALF): 1e-2,
    (BRAIN, BRAIN): 8e-2,
    (EIGHT, FULL): 1e-5,
    (EIGHT, HALF): 1e-2,
    (EIGHT, BRAIN): 8e-2,
}
# the adapters' own rounding: K and V of weights kept in that dtype
ADAPTERS = {FULL: 1e-5, HALF: 2e-3, BRAIN: 2e-2}
BACKENDS = ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"]


def short(value: Any) -> str:
    return {FULL: "fp32", HALF: "fp16", BRAIN: "bf16", EIGHT: "fp8"}.get(value, str(value))


def names(models: Any) -> list[str]:
    return ["-".join(map(short, dict.fromkeys(pair))) for pair in models]


@functools.cache
def model_of(stored: torch.dtype, compute: torch.dtype) -> Any:
    return tiny.tiny_model(stored, compute=None if stored == compute else compute)


@functools.cache
def same_weights_in_float32(stored: torch.dtype) -> Any:
    model = tiny.tiny_model()
    model.model.diffusion_model.load_state_dict(
        {key: value.float() for key, value in model_of(stored, stored).model.diffusion_model.state_dict().items()}
    )
    return model


@functools.cache
def link_of(dtype: torch.dtype, mode: str = "outputs", **settings: Any) -> Any:
    """With the layers that the loader gives it, which cast their weights as they are used."""
    plain = tiny.tiny_network(same_weights_in_float32(FULL), mode)
    network = FlexIPNetwork(plain.cfg, comfy.ops.manual_cast)
    network.load_state_dict(plain.state_dict())
    return tiny.link_for(network.eval().requires_grad_(False).to(dtype), tiny.tiny_reference(), **settings)


@functools.cache
def bare(stored: torch.dtype, compute: torch.dtype) -> torch.Tensor:
    return tiny.ksample(model_of(stored, compute), P, N, steps=1)


@functools.cache
def in_float32(stored: torch.dtype, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(without, with FlexIP)"""
    model = same_weights_in_float32(stored)
    return tuple(tiny.ksample(m, P, N, steps=1) for m in (model, runtime.attach(model, link_of(FULL, mode))))


@pytest.mark.parametrize("model, adapters, mode", pairs(list(MODELS), list(ADAPTERS), ["outputs", "tokens"]))
def test_every_precision_of_model_and_adapters_is_as_near_to_float32_as_the_bare_model(model, adapters, mode):
    stored, compute = model
    seen = []

    def look(executor, *args, **kwargs):
        branches = [branch for part in args[5]["flexip"].values() for branch in part]
        seen.extend(t for branch in branches for t in (branch.k, branch.v))
        return executor(*args, **kwargs)

    gated = runtime.attach(model_of(stored, compute), link_of(adapters, mode))
    gated.add_wrapper_with_key("apply_model", "look", look)
    got = tiny.ksample(gated, P, N, steps=1)
    plain, expected = in_float32(stored, mode)
    assert torch.isfinite(got).all()
    assert {t.dtype for t in seen} == {compute}
    assert tiny.relative_error(got, expected) < MODELS[stored, compute] + ADAPTERS[adapters]
    own_error = tiny.relative_error(bare(stored, compute), plain)
    assert tiny.relative_error(got, expected) < 3 * own_error + ADAPTERS[adapters], "not worse than the bare model"
    assert tiny.relative_error(got, bare(stored, compute)) > 1e-2, "FlexIP must act"


@pytest.mark.parametrize("backend", [*BACKENDS, "override"])
@pytest.mark.parametrize("stored, compute", MODELS, ids=names(MODELS))
def test_every_attention_of_comfyui_in_every_precision(monkeypatch, stored, compute, backend):
    """`override` is the hook through which sage, flash and xformers nodes replace the attention of one model."""
    model, used = model_of(stored, compute).clone(), []
    if backend == "override":

        def function(original, *args, **kwargs):
            used.append(args[0].dtype)
            return original(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = function
    else:
        original = getattr(core_attention, backend)

        def function(*args, **kwargs):
            used.append(args[0].dtype)
            return original(*args, **kwargs)

        monkeypatch.setattr(core_attention, "optimized_attention", function)
    got = tiny.ksample(runtime.attach(model, link_of(HALF)), P, N, steps=1)
    assert torch.isfinite(got).all() and set(used) == {compute}
    tolerance = MODELS[stored, compute] + ADAPTERS[HALF]
    assert tiny.relative_error(got, in_float32(stored, "outputs")[1]) < tolerance


@pytest.mark.parametrize("stored, compute", MODELS, ids=names(MODELS))
def test_strength_0_is_the_bare_model_bit_for_bit_in_every_precision(stored, compute):
    gated = runtime.attach(model_of(stored, compute), link_of(HALF, strength=0.0))
    assert torch.equal(tiny.ksample(gated, P, N, steps=1), bare(stored, compute))


@pytest.mark.parametrize("stored, compute", MODELS, ids=names(MODELS))
def test_outside_the_window_is_the_bare_model_bit_for_bit_in_every_precision(stored, compute):
    gated = runtime.attach(model_of(stored, compute), link_of(BRAIN, start_percent=0.5, end_percent=0.51))
    assert torch.equal(tiny.ksample(gated, P, N, steps=1), bare(stored, compute))


@pytest.mark.parametrize("wanted, dtype", [("fp32", FULL), ("bf16", BRAIN), ("fp16", HALF)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_dtype_that_a_later_node_computes_in_is_followed(order, wanted, dtype):
    """ModelComputeDtype: the weights stay in half precision; K and V must not be rounded to it on the way to float32."""
    model, link = model_of(HALF, HALF), link_of(FULL)
    put = lambda m: nodes_model_advanced.ModelComputeDtype().patch(m, wanted)[0]
    gated = runtime.attach(put(model), link) if order == "before" else put(runtime.attach(model, link))
    expected = in_float32(HALF, "outputs")[1]
    assert tiny.relative_error(tiny.ksample(gated, P, N, steps=1), expected) < MODELS[dtype, dtype]


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=short)
def test_the_head_widths_of_real_unets(dtype):
    """SD1.5's heads are 40, 80 and 160 wide; here are half as many of them."""
    depth = {"num_res_blocks": [1] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [1] * 3}
    config = dict(depth, model_channels=160, transformer_depth_output=[1] * 6)
    model, exact = (tiny.tiny_model(d, heads=4, **config) for d in (dtype, FULL))
    weights = {key: value.float() for key, value in model.model.diffusion_model.state_dict().items()}
    exact.model.diffusion_model.load_state_dict(weights)
    network = tiny.tiny_network(exact)
    assert {width // 4 for width in network.block_widths.values()} == {40, 80, 160}
    link = tiny.link_for(network, tiny.tiny_reference())
    got, expected, plain, bare = (
        tiny.ksample(m, P, N, steps=1) for m in (runtime.attach(model, link), runtime.attach(exact, link), model, exact)
    )
    assert torch.isfinite(got).all()
    assert tiny.relative_error(got, expected) < MODELS[dtype, dtype]
    assert tiny.relative_error(got, expected) < 3 * tiny.relative_error(plain, bare)


@pytest.mark.parametrize("width, query, keys", pairs([40, 64, 80, 160], [FULL, HALF, BRAIN], [FULL, HALF, BRAIN]))
def test_a_block_answers_in_the_dtype_of_its_query(width, query, keys):
    """Also where a neighbour runs the attention of its block in another precision than the model's."""
    g, heads = tiny.generator(1), 2
    q, k, v = (torch.randn(2, 9, heads * width, generator=g) for _ in range(3))
    branch = Branch(*(torch.randn(2, 5, heads * width, generator=g) for _ in range(2)))
    exact = decoupled_attention(torch.zeros_like(q), q, (branch,), heads)

    def zero(q, *args, **kwargs):
        return torch.zeros_like(q)

    patch = GatedAttention("input.1.0", 0, zero)
    given = Branch(branch.k.to(keys), branch.v.to(keys))
    options = {"n_heads": heads, "flexip": {(0, "input.1.0"): (given,)}}
    got = patch(q.to(query), k.to(query), v.to(query), options)
    assert got.dtype == query and got.device == q.device
    assert tiny.relative_error(got.float(), exact) < ADAPTERS[query] + ADAPTERS[keys]


def test_weights_in_fp8_through_comfyuis_own_loader(tmp_path):
    """Its option `dtype`, as the node Load Diffusion Model sets it: stored in fp8, calculated in what the device can."""
    mini_checkpoints.make_base(tmp_path / "base.ckpt", "sd15_min")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "base.ckpt"), model_options={"dtype": EIGHT})
    diffusion_model = model.model.diffusion_model
    assert {t.dtype for t in (cross.to_k.weight for cross in cross_attentions(diffusion_model).values())} == {EIGHT}
    weights = {key: value.float() for key, value in diffusion_model.state_dict().items()}
    exact = comfy.sd.load_diffusion_model_state_dict(weights)
    link = tiny.link_for(tiny.tiny_network(exact), tiny.tiny_reference())
    positive, negative = ([[torch.randn(1, 77, 768, generator=tiny.generator(seed)), {}]] for seed in (1, 2))
    got, expected, bare = (
        tiny.ksample(m, positive, negative, steps=1)
        for m in (runtime.attach(model, link), runtime.attach(exact, link), model)
    )
    tolerance = MODELS[EIGHT, model.model.get_dtype_inference()]
    assert tiny.relative_error(got, expected) < tolerance < tiny.relative_error(got, bare)


SOURCES = [*Path(REPO, "nodes").glob("*.py"), *Path(REPO, "flexip_core").rglob("*.py")]
# device names are arguments of the people who train and measure
COMMANDS = ("training", "evaluation", "mini_world", "characters", "integrations")


def sources() -> list[Path]:
    return [path for path in SOURCES if not set(path.parts) & set(COMMANDS)]


def found(test: Any) -> list[str]:
    return [
        f"{path.name}:{part.lineno}"
        for path in sources()
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if test(part)
    ]


def test_no_device_is_named_in_the_pack():
    """users.md row 8: `Torch not compiled with CUDA enabled`, and a Mac, an Arc or an AMD card left out."""
    devices = ("cuda", "mps", "xpu", "hip", "privateuseone", "npu")

    def is_device(part: ast.AST) -> bool:
        named = isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.split(":")[0] in devices
        return named or isinstance(part, ast.Attribute) and part.attr in devices

    assert len(sources()) > 40 and found(is_device) == []


def test_the_dtype_is_never_a_global_default():
    """users.md row 4: `unet_dtype()` says what ComfyUI would choose for some model, not what the model in use is."""
    guesses = ("unet_dtype", "get_autocast_device", "set_default_dtype", "autocast")
    assert found(lambda part: isinstance(part, (ast.Attribute, ast.Name)) and _name(part) in guesses) == []


def test_only_pictures_on_the_cpu_are_resized_with_antialiased_bicubic():
    """users.md row 8: `aten::_upsample_bicubic2d_aa.out` is missing on XPU and MPS. crop.py takes every picture to the CPU first."""
    bicubic = found(lambda part: isinstance(part, ast.Constant) and part.value == "bicubic")
    assert {place.split(":")[0] for place in bicubic} == {"crop.py", "towers.py"}
    # towers.pixels_for shows training's pictures to an encoder on CUDA; no node may
    assert not [path.name for path in (REPO / "nodes").glob("*.py") if "pixels_for" in path.read_text(encoding="utf-8")]
    taken = [
        part for part in ast.walk(ast.parse(inspect.getsource(crop._check_image))) if isinstance(part, ast.Constant)
    ]
    assert "cpu" in {part.value for part in taken}


def _name(part: ast.AST) -> str:
    return part.attr if isinstance(part, ast.Attribute) else part.id
