"""Kosinkadink/ComfyUI-AnimateDiff-Evolved: its sliding windows over the frames, through its own nodes; they need no motion model."""

from __future__ import annotations

import pytest
import tiny
import torch
from flexip_pack.nodes import runtime

from . import layouts

FRAMES, LENGTH, OVERLAP = 7, 4, 2


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def put(pack):
    nodes = pack.NODE_CLASS_MAPPINGS

    def put(model):
        options = nodes["ADE_StandardStaticContextOptions"]().create_options(LENGTH, OVERLAP)[0]
        return nodes["ADE_UseEvolvedSampling"]().use_evolved_sampling(model, "use existing", context_options=options)[0]

    return put


def sample(model, noise):
    return tiny.ksample(model, *layouts.prompts(model), noise=noise)


@pytest.mark.parametrize("order", ["before", "after"])
def test_packs_every_frame_of_a_sliding_window_keeps_its_own_gate_and_mask(model, put, order):
    network, reference = tiny.tiny_network(model), tiny.tiny_reference()
    gates = tuple(frame / (FRAMES - 1) for frame in range(FRAMES))
    masks = torch.rand(FRAMES, 8, 8, generator=tiny.generator(3))
    link, noise, lengths = tiny.link_for(network, reference, gates, mask=masks), tiny.noise_for(FRAMES), set()
    gated = put(runtime.attach(model, link)) if order == "after" else runtime.attach(put(model), link)

    def spy(executor, *args, **kwargs):
        lengths.add(len(args[0]) // len(args[5]["cond_or_uncond"]))
        return executor(*args, **kwargs)

    gated.add_wrapper_with_key("apply_model", "spy", spy)
    together = sample(gated, noise)
    assert lengths == {LENGTH}
    errors = []
    for frame in range(FRAMES):
        one = tiny.link_for(network, reference, gates[frame], mask=masks[frame : frame + 1])
        alone = sample(runtime.attach(model, one), noise[frame : frame + 1])
        errors.append(tiny.relative_error(together[frame : frame + 1], alone))
    print(f"AnimateDiff-Evolved {order} FlexIP, worst frame: {max(errors):.1e}")
    assert max(errors) < 1e-5


def test_packs_with_and_without_theirs_a_short_clip_is_the_same(model, put):
    """No windows are needed: their sampling around ours changes nothing."""
    link, noise = tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference()), tiny.noise_for(LENGTH - 1)
    gated = runtime.attach(model, link)
    assert layouts.error(sample(put(gated), noise), sample(gated, noise), "AnimateDiff-Evolved, no window") < 1e-5
