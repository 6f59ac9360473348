"""cubiq/ComfyUI_IPAdapter_plus: its own node, with random weights in the layout of ip-adapter_sd15 and ip-adapter_sdxl."""

from __future__ import annotations

import pytest
import tiny
import torch
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.nodes import runtime

from . import layouts

CLIP_WIDTH = 32


@pytest.fixture(scope="module", params=["SD1.5", "SDXL"])
def model(request):
    return tiny.tiny_model(**(layouts.SD15 if request.param == "SD1.5" else layouts.SDXL))


@pytest.fixture(scope="module")
def link(model):
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


@pytest.fixture(scope="module")
def put(pack, model):
    """Model -> model with their node on it."""
    g, width = tiny.generator(5), block_widths(model.model.diffusion_model)[1]
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, CLIP_WIDTH, generator=g) / CLIP_WIDTH**0.5,
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": layouts.random_pairs(model),
    }
    embeds = [torch.randn(1, CLIP_WIDTH, generator=g) for _ in range(2)]
    pipeline = {"ipadapter": {"model": weights}, "clipvision": {"model": None}}
    node = pack.NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]

    def put(model, weight=0.8, start=0.0, end=1.0):
        return node().apply_ipadapter(model, pipeline, embeds[0], weight, "linear", start, end, neg_embed=embeds[1])[0]

    return put


@pytest.mark.parametrize("start", [0.0, 0.1], ids=["always", "after the first step"])
def test_packs_theirs_and_ours_in_both_orders(model, link, put, start):
    theirs = put(model, start=start)
    expected = layouts.sample(tiny.naive_attach(theirs, [link], layouts.roles(model)), steps=3)
    before, after = runtime.attach(theirs, link), put(runtime.attach(model, link), start=start)
    assert layouts.error(layouts.sample(before, steps=3), expected, "theirs, then FlexIP") < 1e-5
    assert layouts.error(layouts.sample(after, steps=3), expected, "FlexIP, then theirs") < 1e-5
    assert layouts.error(expected, layouts.sample(theirs, steps=3), "theirs alone") > 1e-3
    assert layouts.error(expected, layouts.sample(runtime.attach(model, link), steps=3), "FlexIP alone") > 1e-3


def test_packs_another_weight_on_a_cached_gated_model_adds_to_a_clone(model, link, put):
    """users.md row 7, IPAdapter_plus issue 863: it appends to the object that it finds in the slot."""
    gated = runtime.attach(model, link)
    alone = layouts.sample(gated)
    first, second, third = (layouts.sample(put(gated, weight)) for weight in (0.3, 0.9, 0.3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(layouts.sample(gated), alone)


def test_packs_two_of_theirs_around_ours(model, link, put):
    around = put(runtime.attach(put(model, 0.5), link), 0.4)
    expected = layouts.theirs_after_ours(put(model, 0.5), link, put(model, 0.4))
    assert layouts.error(layouts.sample(around), layouts.sample(expected), "theirs, FlexIP, theirs") < 1e-5
