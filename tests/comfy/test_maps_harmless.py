"""FlexIPAttentionMaps: the model it looks at never notices, and what cannot be looked at is a sentence."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import comfy.model_management as mm
import latent_preview
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfy_extras import nodes_pag
from flexip_pack.flexip_core.files.ip_adapter import IPAdapterPair
from flexip_pack.flexip_core.network.blocks import block_levels
from flexip_pack.nodes import maps as node
from flexip_pack.nodes import observe, runtime, slots
from looking import FINEST, FakeClip, FakeVae, M, N, P, clip, gated, latent, model, network, raw, run, watch_blocks  # noqa: F401 - fixtures among them

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counters import count


def fingerprint(model):
    slots = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    return {key: (id(patch), patch.added) for key, patch in slots.items()}


def test_the_model_that_is_looked_at_stays_as_it_is(gated, clip):
    before, options = fingerprint(gated), copy.copy(gated.model_options["transformer_options"])
    wrappers = {kind: dict(keys) for kind, keys in gated.wrappers.items()}
    picture = tiny.ksample(gated, P, N)
    costs = count(lambda: tiny.ksample(gated, P, N))
    positive, samples = copy.deepcopy(P), latent()
    for show in ("adapters", "words"):
        run(gated, show, samples=samples, clip=clip, prompt="a red fox")
    assert fingerprint(gated) == before and all(added == () for _, added in before.values())
    assert gated.model_options["transformer_options"].keys() == options.keys()
    assert {kind: dict(keys) for kind, keys in gated.wrappers.items()} == wrappers
    assert torch.equal(P[0][0], positive[0][0]) and P[0][1] == positive[0][1] == {}
    assert torch.equal(samples["samples"], latent()["samples"]) and samples.keys() == {"samples"}
    assert count(lambda: tiny.ksample(gated, P, N)) == costs
    assert torch.equal(tiny.ksample(gated, P, N), picture)


def test_looking_does_not_change_what_the_model_computes(gated, monkeypatch):
    """The call that is recorded is the call that a sampler makes."""
    outputs = []
    original = observe.Looker.predict_noise
    monkeypatch.setattr(
        observe.Looker, "predict_noise", lambda self, *a: (outputs.append(original(self, *a)), outputs[-1])[1]
    )
    run(gated, steps=2)
    recorded = list(outputs)
    monkeypatch.setattr(observe.Recorder, "see", lambda self, out, q, k, v, options, address: 0)
    with pytest.raises(ValueError):
        run(gated, steps=2)
    assert len(recorded) == 2 and all(torch.equal(a, b) for a, b in zip(recorded, outputs[2:]))


def test_one_call_of_the_positive_prompt_per_level_whatever_guidance_the_model_has(gated):
    guided = nodes_pag.PerturbedAttentionGuidance.execute(gated, 3.0).args[0]
    calls = []

    def spy(executor, x, *args, **kwargs):
        calls.append(x.shape[0])
        return executor(x, *args, **kwargs)

    guided.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    assert torch.equal(raw(guided, steps=3), raw(gated, steps=3)) and calls == [1, 1, 1]


def test_compiled_models_are_looked_at_without_the_compiler(gated):
    compiled = gated.clone()
    used = []

    def compiler(executor, *args, **kwargs):
        used.append(True)
        return executor(*args, **kwargs)

    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, compiler)
    assert torch.equal(raw(compiled), raw(gated)) and not used
    tiny.ksample(compiled, P, N)
    assert used, "the model itself stays compiled"


@pytest.fixture
def recorders(monkeypatch):
    """Weak references to what gathered the maps, which knows the run with its K and V"""
    kept = []

    def keep(self, *args, original=observe.Recorder.__init__, **kwargs):
        kept.append(weakref.ref(self))
        original(self, *args, **kwargs)

    monkeypatch.setattr(observe.Recorder, "__init__", keep)
    return kept


def test_a_finished_look_keeps_nothing_but_its_outputs(gated, recorders, monkeypatch):
    during = []
    monkeypatch.setattr(node, "refuse_nothing", lambda recorder: during.append((len(recorder.seen), recorder.runs)))
    run(gated)
    assert during == [(2, ())], "K and V are let go before anything is decoded"
    gc.collect()
    assert [recorder() for recorder in recorders] == [None]


def test_an_interrupted_look_leaves_nothing_behind(gated, recorders, monkeypatch):
    def interrupting(*args):
        def callback(*args):
            raise mm.InterruptProcessingException()

        return callback

    before, expected = fingerprint(gated), raw(gated)
    with monkeypatch.context() as patch:
        patch.setattr(latent_preview, "prepare_callback", interrupting)
        with pytest.raises(mm.InterruptProcessingException):
            run(gated)
    gc.collect()
    assert [recorder() for recorder in recorders] == [None, None]
    assert fingerprint(gated) == before and runtime.RUN not in gated.model_options["transformer_options"]
    assert torch.equal(raw(gated), expected)


# ---- neighbours and errors


def test_a_block_that_another_node_took_over_is_left_out_and_named(gated):
    taken = gated.clone()
    taken.set_model_attn2_replace(
        lambda q, k, v, options: slots.base_attention(q, k, v, options["n_heads"]), "input", 1, 0
    )
    assert "WARNING: another node took over 1 of " in run(taken)[2]
    with pytest.raises(ValueError, match="no chosen block called FlexIP"):
        run(taken, blocks="input.1")


def test_a_neighbours_additions_are_not_counted(gated):
    """IPAdapter_plus adds to our object; what it adds is not FlexIP's."""
    other = gated.clone()
    slots = other.model_options["transformer_options"]["patches_replace"]["attn2"]
    slots["input", 1, 0].add(lambda out, q, k, v, options: 5 * torch.ones_like(out))
    assert torch.equal(raw(other, blocks=FINEST), raw(gated, blocks=FINEST))


def test_a_model_without_a_gate_is_a_sentence(model):
    with pytest.raises(ValueError, match="FlexIPAttentionMaps: the model has no FlexIP gate. Put Apply"):
        run(model)


WRONG_INPUTS = {
    "empty latent": ({"samples": {"samples": torch.zeros(1, 4, 8, 8)}}, "the latent is empty"),
    "no time": ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent 0.5 is not before end_percent 0.5"),
    "no picture": ({"vae": None}, "no picture to draw on"),
    "other pictures": ({"image": torch.rand(3, 8, 8, 3)}, "got 3 images for 1 latents"),
    "unknown block": ({"blocks": "input.7"}, "FlexIPAttentionMaps: blocks names 'input.7'"),
    "words, neither": ({"show": "words"}, "FlexIPAttentionMaps: words need the prompt's text and its CLIP"),
    "words, no clip": ({"show": "words", "prompt": "a fox"}, "words need the prompt's text"),
    "no words": ({"show": "words", "prompt": ", .", "clip": "sd"}, "the prompt has no words"),
    "too long": (
        {"show": "words", "prompt": "cat " * 90, "clip": "sd"},
        "the prompt has 154 tokens.*positive has 77",
    ),
    "unknown word": (
        {"show": "words", "prompt": "a fox", "clip": "sd", "words": "dog"},
        "words has 'dog'.*words are a, fox",
    ),
    "other clip": ({"show": "words", "prompt": "a fox", "clip": "t5"}, "clip is not that of SD1.5 or SDXL"),
}


class T5:
    tokenizer = None

    def tokenize(self, text, **kwargs):
        return {"t5xxl": [[(3, 1.0, 1)]]}


@pytest.mark.parametrize("wrong", list(WRONG_INPUTS))
def test_wrong_inputs_are_a_sentence(gated, clip, wrong):
    changes, message = WRONG_INPUTS[wrong]
    clips = {"sd": clip, "t5": T5(), None: None}
    with pytest.raises(ValueError, match=message):
        run(gated, **{**changes, "clip": clips[changes.get("clip")]})


def test_a_gate_that_does_nothing_is_a_sentence(model, network):
    def with_link(**kwargs):
        return runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), **kwargs))

    with pytest.raises(ValueError, match="every Apply FlexIP Gate has strength 0"):
        run(with_link(strength=0.0))
    with pytest.raises(ValueError, match="FlexIP adds nothing in the chosen blocks between"):
        run(with_link(end_percent=0.3), start_percent=0.5)
    blocks = list(block_levels(model.model.diffusion_model))
    depth = {name: {a: float(a != FINEST) for a in blocks} for name in ("preservation", "personalization")}
    with pytest.raises(ValueError, match="FlexIP adds nothing in the chosen blocks"):
        run(with_link(depth=depth), blocks=FINEST)
    assert run(with_link(depth=depth))[1].max() == 1


def test_ip_adapter_files_have_no_words_of_their_own(gated, clip, monkeypatch):
    link = runtime.links_of(gated)[0]
    monkeypatch.setattr(type(link.network), "reads_text", staticmethod(IPAdapterPair.reads_text))
    with pytest.raises(ValueError, match="IP-Adapter files, whose tokens belong to the whole picture"):
        run(gated, "words (personalization)", clip=clip, prompt="a fox")


def test_an_unknown_tile_is_a_sentence(gated):
    def tiling(apply_model, arguments):
        c = {key: value for key, value in arguments["c"].items() if key not in (observe.VIEW, "flexip_view")}
        x = arguments["input"]
        return torch.cat([apply_model(half, arguments["timestep"], **c) for half in x.chunk(2, dim=3)], dim=3)

    tiled = gated.clone()
    tiled.set_model_unet_function_wrapper(tiling)
    with pytest.raises(ValueError, match="shows the model tiles without saying"):
        run(tiled)
