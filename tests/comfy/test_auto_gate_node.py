"""FlexIPAutoGate on a real sampling, with a score whose truth is known."""

import dataclasses

import pytest
import tiny
import torch
from flexip_pack.flexip_core.measuring import auto_gate
from flexip_pack.nodes import auto_gate as auto_gate_node
from flexip_pack.nodes import runtime, scorers
from flexip_pack.nodes import sampler as sampler_node
from flexip_pack.nodes.auto_gate import SCORE, SHARE, FlexIPAutoGate
from flexip_pack.nodes.conditioning import FlexIPConditioning

P, N = tiny.cond(1), tiny.cond(2)
PICTURE = torch.rand(1, 16, 16, 3)


class FakeVae:
    """Shows the latent as it is, so that the scorer below sees exact numbers."""

    def decode(self, samples):
        return samples.movedim(1, -1)


class Closeness:
    """Score of a picture: how near it is to what gate 1 makes from the same noise; 1 there, 0 at gate 0."""

    label, note, name = "closeness by a test", "", "closeness"

    def __init__(self, ends):
        self.ends, self.calls = ends, []

    def score(self, images, reference_image):
        low, high = self.ends[len(self.calls) % len(self.ends)]
        self.calls.append(images)
        way = high - low
        return tuple(((image - low) * way).sum().item() / (way * way).sum().item() for image in images), self.label


class Seen(Exception):
    """Ends a run where it is seen."""


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def gated(model):
    return runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), 0.6))


def picture(gated, gate, seed):
    links = runtime.links_of(gated)
    one = runtime.with_links(gated, (*links[:-1], dataclasses.replace(links[-1], gates=(gate,))))
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    out = sampler_node.sample(one, seed, 3, 5.0, "euler", "normal", P, N, latent, 1.0, 1)
    return out["samples"].movedim(1, -1)[0]


@pytest.fixture
def scorer(gated, monkeypatch):
    found = Closeness([(picture(gated, 0.0, seed), picture(gated, 1.0, seed)) for seed in (5, 6)])
    monkeypatch.setattr(scorers, "identity_scorer", lambda *args: found)
    return found


def run(model, target=0.5, target_is=SCORE, noises=2, latent=None, positive=P, seed=5):
    return FlexIPAutoGate.execute(
        model,
        positive,
        N,
        latent or {"samples": torch.zeros(1, 4, 8, 8)},
        FakeVae(),
        PICTURE,
        target,
        target_is,
        seed,
        3,
        noises,
        5.0,
        "euler",
        "normal",
        "auto",
        "auto",
    ).args


def test_the_gate_it_returns_reaches_the_target_and_sits_on_the_model(gated, scorer):
    model, gate, plot, report = run(gated, 0.5)
    assert runtime.links_of(model)[-1].gates == (gate,) and 0.0 < gate < 1.0
    got = [
        ((picture(gated, gate, seed) - low) * (high - low)).sum() / ((high - low) ** 2).sum()
        for seed, (low, high) in zip((5, 6), scorer.ends)
    ]
    assert abs(sum(got) / 2 - 0.5) < 0.05
    assert f"gate {gate:.2f} reaches 0.500" in report and "individual noises reach it between" in report
    assert plot.shape[0] == 1 and plot.std() > 0


def test_it_measures_each_gate_once_per_noise_and_no_more(gated, scorer):
    run(gated)
    sizes = [len(images) for images in scorer.calls]
    assert sizes == [len(auto_gate.FIRST_ROUND)] * 2 + [auto_gate.FINER] * 2


def test_all_gates_of_a_noise_start_from_the_same_noise(gated, scorer):
    run(gated)
    assert torch.allclose(scorer.calls[0][0], picture(gated, 0.0, 5), rtol=1e-4, atol=1e-3)
    assert torch.allclose(scorer.calls[1][-1], picture(gated, 1.0, 6), rtol=1e-4, atol=1e-3)


def test_the_cached_upstream_model_keeps_its_gate(gated, scorer):
    run(gated)
    assert runtime.links_of(gated)[-1].gates == (0.6,)


def test_a_target_out_of_reach_takes_gate_1_and_says_so(gated, scorer):
    model, gate, _, report = run(gated, 1.0 + 1e-3)
    assert gate == 1.0 and "no gate reaches" in report and len(scorer.calls) == 2


def test_a_share_of_the_range_needs_no_knowledge_of_the_scores(gated, scorer):
    assert "gate" in run(gated, 0.5, SHARE)[3]
    assert abs(run(gated, 0.5, SHARE)[1] - run(gated, 0.5, SCORE)[1]) < 0.02  # this score runs from 0 to 1


def test_one_noise_admits_that_it_knows_no_uncertainty(gated, scorer):
    assert "no estimate of how sure" in run(gated, noises=1)[3]


def test_only_the_first_latent_of_a_batch_is_used(gated, scorer):
    run(gated, latent={"samples": torch.zeros(4, 4, 8, 8)})
    assert len(scorer.calls[0]) == len(auto_gate.FIRST_ROUND)


def test_models_that_no_gate_can_change_are_a_sentence(model, gated, scorer):
    with pytest.raises(ValueError, match="FlexIPAutoGate.*Apply FlexIP Gate"):
        run(model)
    silent = runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), 0.6, strength=0.0))
    with pytest.raises(ValueError, match="FlexIPAutoGate.*strength 0"):
        run(silent)


def test_the_gate_is_looked_for_and_set_in_prompts_that_bring_their_own(gated, scorer):
    """Their own gate would make a curve that is flat, and the model that comes out would not have the gate that was found."""
    positive = FlexIPConditioning.execute(P, 0.3, 1.0).args[0]
    plain, plain_gate, *_ = run(gated)
    model, gate, *_ = run(gated, positive=positive)
    assert gate == plain_gate and 0.0 < gate < 1.0
    pictures = [tiny.ksample(one, prompt, N) for one, prompt in ((plain, P), (model, P), (model, positive))]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[1], pictures[2])


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 1, 8, 8)])
def test_the_short_runs_are_of_the_first_latent_with_its_mask_and_noise(gated, scorer, monkeypatch, shape):
    seen = []

    def sample(*args):
        seen.append(args[8])
        raise Seen

    monkeypatch.setattr(auto_gate_node, "sample", sample)
    mask = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    latent = {"samples": torch.randn(2, 4, 8, 8), "noise_mask": mask, "batch_index": [7, 9]}
    with pytest.raises(Seen):
        run(gated, latent=latent)
    assert torch.equal(seen[0]["samples"], latent["samples"][:1]) and seen[0]["batch_index"] == [7]
    assert torch.equal(seen[0]["noise_mask"], mask.reshape(-1, 1, 8, 8)[:1]) and latent["batch_index"] == [7, 9]


def test_the_largest_seed_counts_on_from_zero(gated, monkeypatch):
    ends = [(picture(gated, 0.0, seed), picture(gated, 1.0, seed)) for seed in (2**64 - 1, 0)]
    monkeypatch.setattr(scorers, "identity_scorer", lambda *args: Closeness(ends))
    assert 0.0 < run(gated, seed=2**64 - 1)[1] < 1.0
