"""What is loaded when: projection before the UNet, nothing of the adapters needed during the steps."""

import dataclasses
import sys
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import pytest
import tiny
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.flexip_core.run.chain import Link
from flexip_pack.flexip_core.run.schedule import GateCurve
from flexip_pack.nodes import runtime

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from models import BASES

P, N = tiny.cond(1), tiny.cond(2)
MB = 2**20


def real_config(base):
    """ComfyUI's config of the real UNet, by its class's name in comfy.supported_models."""
    kind, config, _ = BASES[base.lower()]
    return kind({**config, "model_channels": 320, "dtype": torch.float32})


@pytest.mark.parametrize("base, blocks, text_width", [("SD15", 16, 768), ("SDXL", 70, 2048)])
def test_all_cross_attentions_of_the_real_unets_are_found(base, blocks, text_width):
    config = real_config(base)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("meta"))
    widths, text = block_widths(model.diffusion_model)
    assert len(widths) == blocks and text == text_width and "middle.0.0" in widths
    assert widths["input.4.0"] == 640 and widths["middle.0.0"] == 1280


class Budget:
    """A device with little memory, on the CPU: cpu:0 is not "cpu" to the memory manager, and what is free follows from what is loaded."""

    device = torch.device("cpu", 0)

    def __init__(self):
        self.total = 0
        self.patchers = []

    def patcher(self, module):
        patcher = comfy.model_patcher.ModelPatcher(module, load_device=self.device, offload_device=tiny.CPU)
        self.patchers.append(patcher)
        return patcher

    def free(self, device=None, torch_free_too=False):
        left = self.total - sum(patcher.loaded_size() for patcher in self.patchers)
        return (left, left) if torch_free_too else left


@pytest.fixture
def budget(monkeypatch):
    budget = Budget()
    faked = dict(
        get_free_memory=budget.free,
        is_device_cpu=lambda device: False,
        vram_state=mm.VRAMState.NORMAL_VRAM,
        EXTRA_RESERVED_VRAM=0,
        minimum_inference_memory=lambda: MB,
        soft_empty_cache=lambda *a, **k: None,
        current_loaded_models=[],
    )
    for name, value in faked.items():
        monkeypatch.setattr(mm, name, value)
    yield budget
    for patcher in budget.patchers:
        patcher.detach()


def test_adapters_leave_for_the_unet_and_none_of_their_bytes_is_needed_during_the_steps(budget, monkeypatch):
    plain = tiny.tiny_model()
    expected = tiny.ksample(runtime.attach(plain, tiny.link_for(tiny.tiny_network(plain), tiny.tiny_reference())), P, N)

    network = FlexIPNetwork(tiny.config_for(plain), operations=comfy.ops.manual_cast)
    network.load_state_dict(tiny.tiny_network(plain).state_dict())
    network.requires_grad_(False)
    model, adapters = budget.patcher(plain.model), budget.patcher(network)
    monkeypatch.setattr(plain.model, "memory_required", lambda *args, **kwargs: MB // 4)
    # room for the UNet with its activations, but not for the adapters beside it
    budget.total = model.model_size() + MB + adapters.model_size() // 2
    projecting, stepping = [], []
    monkeypatch.setattr(
        network,
        "project",
        lambda *args: (projecting.append(adapters.loaded_size()), FlexIPNetwork.project(network, *args))[1],
    )
    gated = runtime.attach(model, Link(network, adapters, tiny.tiny_reference(), (0.6,)))
    got = tiny.ksample(
        gated, P, N, callback=lambda *args: stepping.append((adapters.loaded_size(), model.loaded_size()))
    )
    assert tiny.relative_error(got, expected) < 1e-5
    assert len(projecting) == 4 and all(size == adapters.model_size() for size in projecting)
    assert len(stepping) == 2 and all(size == (0, model.model_size()) for size in stepping)


def test_adapters_and_unet_that_fit_only_in_part_still_give_the_right_picture(budget, monkeypatch):
    """Layers cast their weights as they come, and the learned queries follow their input."""
    plain = tiny.tiny_model()
    expected = tiny.ksample(runtime.attach(plain, tiny.link_for(tiny.tiny_network(plain), tiny.tiny_reference())), P, N)
    network = FlexIPNetwork(tiny.config_for(plain), operations=comfy.ops.manual_cast)
    network.load_state_dict(tiny.tiny_network(plain).state_dict())
    model, adapters = budget.patcher(plain.model), budget.patcher(network.requires_grad_(False))
    monkeypatch.setattr(plain.model, "memory_required", lambda *args, **kwargs: MB // 4)
    budget.total = MB + MB // 8 + adapters.model_size() // 2
    projecting = []
    monkeypatch.setattr(
        network,
        "project",
        lambda *args: (projecting.append(adapters.loaded_size()), FlexIPNetwork.project(network, *args))[1],
    )
    got = tiny.ksample(runtime.attach(model, Link(network, adapters, tiny.tiny_reference(), (0.6,))), P, N)
    assert tiny.relative_error(got, expected) < 1e-5
    assert all(0 <= size < adapters.model_size() for size in projecting) and len(projecting) == 4
    assert model.loaded_size() < model.model_size()


def test_a_second_run_with_another_gate_loads_no_adapter(monkeypatch):
    model = tiny.tiny_model()
    network, reference = tiny.tiny_network(model), tiny.tiny_reference()
    loads = []
    original = mm.load_models_gpu
    monkeypatch.setattr(
        mm,
        "load_models_gpu",
        lambda models, *args, **kwargs: (
            loads.append([type(m.model).__name__ for m in models]),
            original(models, *args, **kwargs),
        )[1],
    )
    tiny.ksample(runtime.attach(model, tiny.link_for(network, reference)), P, N)
    assert loads == [["FlexIPNetwork"], ["BaseModel"]]
    loads.clear()
    tiny.ksample(runtime.attach(model, tiny.link_for(network, reference, 0.1)), P, N, seed=5)
    assert loads == [["BaseModel"]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gates, times", [((0.6,), 1), (GateCurve(((0.0, 1.0), (1.0, 0.0)), "falling"), 2)])
@pytest.mark.parametrize("links", [1, 2])
def test_comfyui_makes_room_for_k_and_v_of_every_row(monkeypatch, batch, gates, times, links):
    """Else a card is filled to the brim with the UNet, and a long sweep runs out of memory."""
    model, asked, original = tiny.tiny_model(), [], mm.load_models_gpu

    def load(models, memory_required=0, **kwargs):
        asked.append(memory_required)
        return original(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", load)
    # the less a column of the noise stands for, the more is told apart
    monkeypatch.setattr(model.model, "memory_usage_factor", model.model.memory_usage_factor / 32)
    tiny.ksample(model, P, N, noise=tiny.noise_for(batch))
    [bare] = asked
    network, gated = tiny.tiny_network(model), model
    for _ in range(links):
        gated = runtime.attach(gated, dataclasses.replace(tiny.link_for(network, tiny.tiny_reference()), gates=gates))
    tiny.ksample(gated, P, N, noise=tiny.noise_for(batch))
    per_row = sum(network.block_widths.values()) * 2 * 4 * (7 + 77)  # K and V in float32, of 7 + 77 tokens
    rows = 2 * batch  # of both prompts
    column = bare / 8  # the noise is called wider by whole columns
    assert 2 * column < rows * per_row, "a factor of 2 must be more than rounding"
    assert 0 <= asked[-1] - bare - times * links * rows * per_row < column


@pytest.mark.parametrize("base, most_mb", [("SD15", 6), ("SDXL", 40)])
def test_keys_and_values_of_one_conditioning_are_small_at_half_precision(base, most_mb):
    """Both adapters, 20 + 77 tokens: counted from the real bases' widths."""
    config = real_config(base)
    config.set_inference_dtype(torch.float32, None)
    widths, _ = block_widths(config.get_model({}, "", device=torch.device("meta")).diffusion_model)
    total = sum(2 * 97 * width * 2 for width in widths.values())
    assert total <= most_mb * MB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_follow_the_models_dtype(dtype):
    model = tiny.tiny_model(dtype)
    network, reference = tiny.tiny_network(model), tiny.tiny_reference()
    seen = set()

    def spy(executor, *args, **kwargs):
        seen.update(t.dtype for branches in args[5]["flexip"].values() for branch in branches for t in branch[:2])
        return executor(*args, **kwargs)

    gated = runtime.attach(model, tiny.link_for(network, reference, (0.2, 0.8)))
    gated.add_wrapper_with_key("apply_model", "spy", spy)
    out = tiny.ksample(gated, P, N, noise=tiny.noise_for(2))
    assert seen == {dtype} and torch.isfinite(out).all()


def test_a_reference_used_in_half_precision_is_as_new_in_full_precision():
    """Its cache holds K and V of both."""
    half, full = tiny.tiny_model(torch.float16), tiny.tiny_model()
    network, used = tiny.tiny_network(full), tiny.tiny_reference()
    tiny.ksample(runtime.attach(half, tiny.link_for(network, used)), P, N, steps=1)
    got, fresh = (
        tiny.ksample(runtime.attach(full, tiny.link_for(network, reference)), P, N, steps=1)
        for reference in (used, tiny.tiny_reference())
    )
    assert torch.equal(got, fresh)


def test_room_is_asked_for_by_the_number_of_pictures(monkeypatch):
    """The load of the adapters, before the projection needs memory for its activations."""
    model, asked, original = tiny.tiny_model(), [], mm.load_models_gpu
    network = tiny.tiny_network(model)

    def load(models, memory_required=0, *args, **kwargs):
        if models[0].model is network:
            asked.append(memory_required)
        return original(models, memory_required, *args, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", load)
    for pictures in (1, 2, 3):
        reference = tiny.tiny_reference(pictures=pictures)
        tiny.ksample(runtime.attach(model, tiny.link_for(network, reference)), P, N, steps=1)
    one, two, three = asked
    assert one >= 4 * sum(value.numel() for value in tiny.tiny_reference().features.values())
    assert (two, three) == (2 * one, 3 * one)


class OnItsOwnOptions(comfy.samplers.CFGGuider):
    """A guider that samples with the same options again and again, where core's copies them each time."""

    def __init__(self, model):
        super().__init__(model)
        self.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.sampler_helpers.prepare_model_patcher(model, {}, self.model_options)

    def sample(self, noise, latent, sampler, sigmas, callback=None):
        self.conds = {name: [entry.copy() for entry in entries] for name, entries in self.original_conds.items()}
        wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options, is_model_options=True)
        executor = WrapperExecutor.new_class_executor(self.outer_sample, self, wrappers)
        return executor.execute(noise, latent, sampler, sigmas, None, callback, True, 0, latent_shapes=[latent.shape])


def test_options_that_a_guider_uses_again_hold_no_run_after_it():
    model = tiny.tiny_model()
    gated = runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference()))
    guider, noise = OnItsOwnOptions(gated), tiny.noise_for()
    guider.set_conds(P, N)
    guider.set_cfg(7.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    options, seen = guider.model_options["transformer_options"], []

    def sample(callback):
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, callback)

    def stop(*args):
        raise KeyboardInterrupt

    got = sample(lambda *args: seen.append(runtime.RUN in options))
    assert seen == [True, True] and runtime.RUN not in options
    with pytest.raises(KeyboardInterrupt):
        sample(stop)
    assert runtime.RUN not in options
    assert torch.equal(got, tiny.ksample(gated, P, N))


def test_a_wrong_number_of_gates_is_a_sentence():
    model = tiny.tiny_model()
    gated = runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), (0.1, 0.2, 0.3)))
    with pytest.raises(ValueError, match="3 gates for a batch of 2"):
        tiny.ksample(gated, P, N, noise=tiny.noise_for(2))


def test_nothing_of_the_cached_model_or_its_conditioning_changes():
    model = tiny.tiny_model()
    gated = runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference()))
    positive, negative = tiny.cond(1), tiny.cond(2)
    tiny.ksample(model, positive, negative)  # core notes on its modules that they were loaded
    modules = {name: set(module.__dict__) for name, module in model.model.diffusion_model.named_modules()}
    options = set(gated.model_options["transformer_options"])
    tiny.ksample(gated, positive, negative)
    assert {name: set(module.__dict__) for name, module in model.model.diffusion_model.named_modules()} == modules
    assert set(gated.model_options["transformer_options"]) == options
    assert positive[0][1] == {} and negative[0][1] == {}
