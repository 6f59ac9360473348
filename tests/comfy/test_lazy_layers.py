"""ComfyUI's layers under dynamic VRAM, its default on NVIDIA cards: they have no weights until these are loaded.

That memory manager needs a GPU; its layers do not, so the files are loaded here as they are there.
"""

from __future__ import annotations

import contextlib

import comfy.memory_management
import comfy.model_management
import comfy.ops
import pytest
import test_ip_adapter_nodes as pairs
import tiny
import torch
from flexip_pack.flexip_core.files import checkpoint
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.nodes.demo import FlexIPDemoModels
from test_ip_adapter_nodes import MAKE, PLAIN, PLUS, apply, encode, load, model, models, pair_world, picture, world  # noqa: F401

if not hasattr(comfy.memory_management, "aimdo_enabled"):
    pytest.skip("this ComfyUI has no dynamic VRAM", allow_module_level=True)


@contextlib.contextmanager
def lazy(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_management, "WINDOWS", True)  # older ones have such layers there only
        assert comfy.ops.manual_cast.Linear(2, 2).weight is None
        yield


def assert_same(network, expected):
    state, wanted = network.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("family, clip", MAKE)
def test_an_ip_adapter_file_loads(pair_world, monkeypatch, family, clip):
    [name] = [path.name for path in (pair_world / "ipadapter").glob(f"{family} {clip}.*".replace(" ", "-"))]
    with lazy(monkeypatch):
        loaded = load(name)
    assert_same(loaded.network, load(name).network)


def test_a_damaged_ip_adapter_file_is_still_refused(world, monkeypatch):
    from safetensors.torch import save_file

    tensors = pairs.tensors_of("plus", "A", pairs.file_blocks(tiny.tiny_model()), 0)
    for change in ({"image_proj.norm_out.weight": torch.zeros(31)}, {"image_proj.extra": torch.zeros(1)}):
        save_file({**tensors, **change}, world / "ipadapter" / "bad.safetensors")
        with lazy(monkeypatch), pytest.raises(ValueError, match="bad.safetensors .*do not fit together"):
            load("bad.safetensors")


def test_a_pair_that_was_loaded_so_samples_the_same(pair_world, model, monkeypatch):
    with lazy(monkeypatch):
        adapters = load(PLUS, PLAIN)
    wanted = load(PLUS, PLAIN)
    pictures = [
        tiny.ksample(apply(model, one, encode(one, picture()).args[0], 0.6), pairs.P, pairs.N)
        for one in (adapters, wanted)
    ]
    assert torch.equal(*pictures)


def test_a_flexip_file_loads(tmp_path, model, monkeypatch):
    path = tmp_path / "adapters.safetensors"
    checkpoint.save_checkpoint(tiny.tiny_network(model), path)
    with lazy(monkeypatch):
        network = checkpoint.load_checkpoint(path, comfy.ops.manual_cast)
    assert_same(network, checkpoint.load_checkpoint(path))


def test_the_demo_models_load(monkeypatch):
    with lazy(monkeypatch):
        loaded = FlexIPDemoModels.execute(0).args
    wanted = FlexIPDemoModels.execute(0).args
    assert_same(loaded[0].model.diffusion_model, wanted[0].model.diffusion_model)
    assert block_widths(loaded[0].model.diffusion_model) == block_widths(wanted[0].model.diffusion_model)
