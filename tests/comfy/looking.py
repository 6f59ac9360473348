"""A gated tiny model and a fake CLIP to look at, and ways to run FlexIPAttentionMaps on them."""

import comfy.context_windows
import comfy.sd1_clip
import comfy.sdxl_clip
import pytest
import tiny
from flexip_pack.flexip_core.measuring import maps
from flexip_pack.nodes import runtime
from flexip_pack.nodes.maps import FlexIPAttentionMaps

import nodes

P, N, M = tiny.cond(1), tiny.cond(2), tiny.cond(3)
FINEST = "input.1.0"  # a block on the latent's own grid


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def network(model):
    return tiny.tiny_network(model)


@pytest.fixture(scope="module")
def gated(model, network):
    return runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), 0.6))


class FakeVae:
    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2).sigmoid()


class FakeClip:
    """ComfyUI's tokenizers without a text encoder."""

    def __init__(self, kind=comfy.sd1_clip.SD1Tokenizer, **kwargs):
        self.tokenizer = kind(**kwargs)

    def tokenize(self, text, return_word_ids=False, **kwargs):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **kwargs)


@pytest.fixture(scope="module")
def clip():
    return FakeClip()


def latent(batch=1, height=8, width=8, seed=5, **extra):
    return {"samples": tiny.noise_for(batch, height, width, seed), **extra}


def run(model, show="adapters", positive=P, samples=None, **kwargs):
    samples = samples or latent()
    kwargs = {"vae": FakeVae(), "steps": 2, **kwargs}
    return FlexIPAttentionMaps.execute(model, positive, samples, show, **kwargs).args


def raw(model, show="adapters", positive=P, samples=None, **kwargs):
    """The maps as measured, (g, batch, h, w) on the latent's grid"""
    kept = []
    original = maps.MapMean.result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps.MapMean, "result", lambda self: (kept.append(original(self)), kept[-1])[1])
        run(model, show, positive, samples, **kwargs)
    return kept[0]


def watch_blocks(monkeypatch):
    """Every Block that is measured"""
    seen = []
    for name in ("measure_adapters", "measure_words", "measure_words_added"):
        original = getattr(maps, name)

        def spying(*args, original=original):
            measure = original(*args)
            return lambda runs, block: (seen.append(block), measure(runs, block))[1]

        monkeypatch.setattr(maps, name, spying)
    return seen


def set_mask(conditioning, mask):
    return nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]
