"""What a training step does, on a base of 32 channels with random weights."""

import dataclasses
import json

import pytest
import torch
import training_fakes as fakes

from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.integrations.diffusers import text_projections
from flexip_core.network.adapters import ADAPTERS
from flexip_core.training.config import DropoutConfig, GateConfig, OptimizerConfig
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.draws import draw_dropout, draw_gates, draw_kinds, generator
from flexip_core.training.loop import BEST, FINAL, LOG, Trainer
from flexip_core.training.ranks import TrainingError

NOTHING_DROPPED = DropoutConfig(image=0, text=0, both=0, phrase=0)


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase()


@pytest.fixture
def trainer_for(base, tmp_path):
    def make(probe=None, base=base, source=None, mode="outputs", **changes):
        cfg = fakes.with_network(fakes.config(tmp_path / "run", **changes), gate_mode=mode)
        return Trainer(cfg, base, source or fakes.pairs(), probe)

    return make


def lines(trainer):
    return [json.loads(line) for line in (trainer.folder / LOG).read_text().splitlines()]


def weights(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def batch_for(trainer, kinds):
    return trainer.source.batch(kinds, fakes.generator(0))


def loss_now(trainer, gates=(0.5,), n=16):
    """On fixed pairs, noise and timesteps."""
    kinds = torch.tensor([INVARIANT, VARIANT] * (n // 2))
    done, trainer.progress.step = trainer.progress.step, 10**6
    with torch.no_grad():
        losses, _ = trainer.losses(batch_for(trainer, kinds), gates * (n // len(gates)))
    trainer.progress.step = done
    return losses.mean().item()


# --- the draws


def test_gates_come_from_the_range_of_their_kind():
    kinds = torch.tensor([INVARIANT, VARIANT] * 2000)
    assert set(draw_gates(kinds[:2], GateConfig((0.8, 0.8), (0.2, 0.2)), fakes.generator(0))) == {0.8, 0.2}
    gates = torch.tensor(draw_gates(kinds, GateConfig((0.5, 1.0), (0.1, 0.3)), fakes.generator(0)))
    for kind, low, high in ((INVARIANT, 0.5, 1.0), (VARIANT, 0.1, 0.3)):
        drawn = gates[kinds == kind]
        assert low <= drawn.min() < low + 0.01 and high - 0.01 < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.01


def test_the_default_recipe_trains_every_gate_and_drops_phrases(tmp_path):
    cfg = fakes.config(tmp_path)
    kinds = draw_kinds(32000, cfg.mix, fakes.generator(0))
    gates = torch.tensor(draw_gates(kinds, cfg.gates, fakes.generator(1)), dtype=torch.float64)
    rows = torch.histc(gates, 100, 0, 1)
    assert len(gates) == 32000 == rows.sum() and rows.min() > 200  # 320 are expected in each hundredth
    assert gates[kinds == INVARIANT].min() >= 0.5 >= gates[kinds == VARIANT].max()
    assert cfg.dropout.phrase == 0.3


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_mix_is_the_share_of_variant_rows(mix):
    kinds = draw_kinds(20000, mix, fakes.generator(0))
    assert abs((kinds == VARIANT).float().mean() - mix) < 0.01


def test_reference_text_and_both_are_dropped_independently_of_each_other_in_their_shares():
    n = 40000
    no_reference, no_text = draw_dropout(n, DropoutConfig(image=0.1, text=0.2, both=0.3), fakes.generator(0))
    for got, share in ((no_reference & ~no_text, 0.1), (~no_reference & no_text, 0.2), (no_reference & no_text, 0.3)):
        assert abs(got.float().mean() - share) < 0.01
    no_reference, no_text = draw_dropout(n, NOTHING_DROPPED, fakes.generator(0))
    assert not no_reference.any() and not no_text.any()


def test_randomness_is_a_function_of_seed_step_rank_and_purpose():
    def first(*key):
        return torch.rand(3, generator=generator(*key)).tolist()

    torch.manual_seed(0)
    one = first(1, 2, 3, "noise")
    torch.manual_seed(1)
    assert first(1, 2, 3, "noise") == one
    others = [first(*key) for key in ((0, 2, 3, "noise"), (1, 0, 3, "noise"), (1, 2, 0, "noise"), (1, 2, 3, "pairs"))]
    assert one not in others and len({tuple(o) for o in others}) == 4


def test_a_run_depends_on_the_seed_and_on_no_other_randomness(trainer_for):
    def losses(**changes):
        trainer = trainer_for(**changes)
        torch.rand(torch.randint(1, 9, ()))  # somebody else draws from torch's own generator
        return [trainer.step().loss for _ in range(3)]

    same = losses()
    assert losses() == same
    assert losses(seed=4) != same


# --- what the model is given


def test_dropped_references_are_zero_features_and_dropped_texts_the_empty_text(trainer_for, base):
    n = 64
    trainer = trainer_for(batch=n, dropout=DropoutConfig(image=0.2, text=0.2, both=0.2, phrase=0))
    batch = batch_for(trainer, torch.full((n,), VARIANT))
    text, features = trainer.conditions(batch)
    full = base.features(batch.references)
    no_reference = (features["cls"] == 0).all(1)
    assert torch.equal((features["patches"] == 0).flatten(1).all(1), no_reference)
    for name in full:
        assert torch.equal(features[name][~no_reference], full[name][~no_reference])
    no_text = (text.tokens == base.empty_text().tokens).flatten(1).all(1)
    assert torch.equal(text.tokens[~no_text], base.encode_text(batch.captions).tokens[~no_text])
    combinations = {(bool(a), bool(b)) for a, b in zip(no_reference, no_text)}
    assert combinations == {(False, False), (False, True), (True, False), (True, True)}


def test_phrases_are_dropped_from_the_text(trainer_for, base):
    trainer = trainer_for(dropout=dataclasses.replace(NOTHING_DROPPED, phrases={"ground": 1.0}))
    batch = batch_for(trainer, torch.full((8,), VARIANT))
    text, _ = trainer.conditions(batch)
    without = batch.captions.clone()
    without[:, fakes.PHRASES.index("ground")] = 0
    assert torch.equal(text.tokens, base.encode_text(without).tokens)


def test_to_k_and_to_v_start_from_the_bases_own_text_projections(trainer_for, base):
    network = trainer_for(start="text").network
    for address, (to_k, to_v) in text_projections(base.unet).items():
        for name in ADAPTERS:
            projection = network.projection(address, name)
            assert torch.equal(projection.to_k.weight, to_k) and torch.equal(projection.to_v.weight, to_v)
    assert network.block_widths.keys() == text_projections(base.unet).keys()


def test_a_start_at_zero_is_the_bare_base_and_trains(trainer_for, base):
    trainer = trainer_for(start="zero", dropout=NOTHING_DROPPED, loss_weight="none")
    batch = batch_for(trainer, torch.full((4,), VARIANT))
    losses, timesteps = trainer.losses(batch, (0.5,) * 4)
    latents = base.to_latents(batch.targets)
    g = generator(trainer.cfg.seed, 0, 0, "noise")
    assert torch.equal(torch.randint(1000, (4,), generator=g), timesteps)
    noise, a = torch.randn(latents.shape, generator=g), base.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    bare = base.unet(noisy, timesteps, encoder_hidden_states=base.encode_text(batch.captions).tokens).sample
    torch.testing.assert_close(losses, (bare - noise).square().mean((1, 2, 3)))
    for _ in range(2):
        trainer.step()
    assert trainer.network.projection("middle.0.0", "personalization").to_v.weight.abs().max() > 0


def test_min_snr_weighs_each_row_by_its_timestep(trainer_for, base):
    batch = batch_for(trainer_for(), torch.full((8,), VARIANT))
    plain, timesteps = trainer_for(loss_weight="none").losses(batch, (0.5,) * 8)
    weighed, _ = trainer_for(min_snr_gamma=2.0).losses(batch, (0.5,) * 8)
    snr = base.alphas_cumprod[timesteps] / (1 - base.alphas_cumprod[timesteps])
    torch.testing.assert_close(weighed, plain * (2 / snr).clamp(max=1))


def test_a_base_whose_text_does_not_fit_its_unet_is_refused(trainer_for):
    wrong = fakes.FakeBase()
    wrong.text_width = 48
    with pytest.raises(ValueError, match="says that its text is 48 wide, its cross-attention at .* reads 32"):
        trainer_for(base=wrong)


# --- what a step changes


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_both_gate_modes_train_both_adapters_and_leave_the_base_bit_for_bit(trainer_for, base, mode):
    trainer = trainer_for(mode=mode, steps=30, batch=8)
    frozen, start = weights(base.unet), weights(trainer.network)
    assert not any(p.requires_grad for p in base.unet.parameters())
    before = loss_now(trainer)
    for _ in range(30):
        step = trainer.step()
        assert all(norm > 0 for norm in step.gradient_norms.values())
    assert loss_now(trainer) < 0.95 * before
    same = [key for key, value in trainer.network.state_dict().items() if torch.equal(value, start[key])]
    assert same == []
    assert all(torch.equal(value, frozen[key]) for key, value in base.unet.state_dict().items())
    assert all(p.grad is None for p in base.unet.parameters())


def test_the_gate_of_a_row_decides_which_adapter_learns_from_it(trainer_for):
    """γ = 1 in all rows: nothing for personalization, and that is no error."""
    trainer = trainer_for(mix=0.5, gates=GateConfig((1.0, 1.0), (0.0, 0.0)), batch=1, steps=30)
    norms = [trainer.step().gradient_norms for _ in range(12)]
    assert {tuple(norm[name] > 0 for name in ADAPTERS) for norm in norms} == {(True, False), (False, True)}


def test_one_adapter_alone_is_an_ip_adapter(trainer_for):
    trainer = trainer_for(train_adapters=("preservation",), gates=GateConfig((1, 1), (1, 1)))
    start = weights(trainer.network)
    trainer.network.personalization.rows = None  # would fail if it were called
    for _ in range(2):
        assert set(trainer.step().gradient_norms) == {"preservation"}
    for key, value in trainer.network.state_dict().items():
        assert torch.equal(value, start[key]) == ("personalization" in key)


def test_gradients_are_clipped_together(trainer_for):
    trainer = trainer_for(optimizer=OptimizerConfig(lr=1e-3, warmup=0, clip=1e-3))
    caught = {}
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (caught.update({k: p.grad.clone() for k, p in trainer.parameters.items()}), step())
    norms = trainer.step().gradient_norms
    assert min(norms.values()) > 1e-3
    clipped = {name: torch.cat([g.flatten() for k, g in caught.items() if name in k]).norm() for name in ADAPTERS}
    torch.testing.assert_close(torch.stack(list(clipped.values())).norm(), torch.tensor(1e-3))
    assert clipped["preservation"] / clipped["personalization"] == pytest.approx(
        norms["preservation"] / norms["personalization"], rel=1e-4
    )


def test_the_average_follows_the_weights(trainer_for):
    trainer = trainer_for(steps=20)
    trainer.step()
    torch.testing.assert_close(weights(trainer.average), weights(trainer.network), rtol=0, atol=0)
    expected = weights(trainer.network)
    for step in range(1, 4):
        trainer.step()
        decay = 1 - (1 + step) ** -0.75
        for key, value in trainer.network.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
    torch.testing.assert_close(weights(trainer.average), expected)


def test_bf16_computes_in_bf16_and_keeps_the_weights_in_fp32(trainer_for):
    half, full = trainer_for(precision="bf16"), trainer_for()
    seen = set()
    hook = half.base.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss = half.step().loss
    hook.remove()
    assert seen == {torch.bfloat16}
    assert loss == pytest.approx(full.step().loss, rel=0.03) and loss != full.step().loss
    assert {value.dtype for value in half.network.state_dict().values()} == {torch.float32}


# --- a run


def test_a_run_writes_log_states_and_adapters(trainer_for):
    trainer = trainer_for()
    assert trainer.run() is True
    log = lines(trainer)
    assert [line["step"] for line in log] == [2, 4, 6]
    for line in log:
        assert set(line) == {
            "step",
            "loss",
            "loss_by_kind",
            "loss_by_quartile",
            "loss_by_kind_and_quartile",
            "rows_by_kind",
            "gradient_norm",
            "lr",
            "seconds",
        }
        assert sum(line["rows_by_kind"].values()) == 2 * trainer.cfg.batch
        assert set(line["gradient_norm"]) == set(ADAPTERS) and line["lr"] > 0 and line["loss"] > 0
    assert log[0]["seconds"] < log[-1]["seconds"]
    final = load_checkpoint(trainer.folder / FINAL)
    assert final.cfg == trainer.network.cfg
    torch.testing.assert_close(weights(final), weights(trainer.average), rtol=0, atol=0)


def test_the_probe_decides_what_is_best(trainer_for):
    scores, seen = iter([0.5, 0.9, 0.7]), []

    def probe(network, step):
        seen.append(weights(network))
        assert not torch.is_grad_enabled()
        return {"score": next(scores), "identity": 0.1}

    trainer = trainer_for(probe, steps=9, probe_every=3)
    trainer.run()
    best = weights(load_checkpoint(trainer.folder / BEST))
    torch.testing.assert_close(best, seen[1], rtol=0, atol=0)
    probes = [line for line in lines(trainer) if "probe" in line]
    assert [(line["step"], line["best"]) for line in probes] == [(3, True), (6, True), (9, False)]
    assert probes[0]["probe"] == {"score": 0.5, "identity": 0.1}
    assert (trainer.progress.best_score, trainer.progress.best_step) == (0.9, 6)


@pytest.mark.parametrize("answer", [{"identity": 1.0}, {"score": float("nan")}])
def test_a_probe_without_a_usable_score_stops_the_run(trainer_for, answer):
    with pytest.raises(TrainingError, match="a probe must return one finite number of that name"):
        trainer_for(lambda network, step: answer, probe_every=1).run()


def test_should_stop_ends_a_run_after_saving(trainer_for):
    trainer = trainer_for()
    assert trainer.run(should_stop=lambda: trainer.progress.step == 3) is False
    assert [path.name for path in sorted(trainer.folder.glob("*.safetensors"))] == ["state_00000003.safetensors"]


def test_a_wish_to_stop_at_the_last_step_is_a_finished_run(trainer_for):
    trainer = trainer_for()
    assert trainer.run(should_stop=lambda: trainer.progress.step == trainer.cfg.steps) is True
    assert (trainer.folder / FINAL).exists()


# --- what stops it


def test_nan_stops_with_a_sentence_and_keeps_nothing_of_the_step(trainer_for):
    trainer = trainer_for()
    trainer.step()
    before = weights(trainer.network)
    words = trainer.base.words.clone()
    try:
        trainer.base.words.fill_(float("nan"))
        with pytest.raises(TrainingError, match="Step 2: the loss is nan; nothing of this step was kept") as error:
            trainer.run()
    finally:
        trainer.base.words.copy_(words)
    assert "\n" not in str(error.value) and trainer.progress.step == 1
    torch.testing.assert_close(weights(trainer.network), before, rtol=0, atol=0)
    assert [path.name for path in trainer.folder.glob("*.safetensors")] == ["state_00000001.safetensors"]


def test_an_infinite_gradient_stops_too(trainer_for):
    trainer = trainer_for()
    trainer.network.preservation.queries.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="Step 1: the gradient of the preservation adapter is (inf|nan)"):
        trainer.step()


@pytest.mark.parametrize("silent", [("personalization",), ADAPTERS])
def test_an_adapter_without_gradient_stops_with_a_sentence(trainer_for, silent):
    trainer = trainer_for()
    project = trainer.network.project

    def detached(adapter, tokens):
        kv = project(adapter, tokens)
        return {a: (k.detach(), v.detach()) for a, (k, v) in kv.items()} if adapter in silent else kv

    trainer.network.project = detached
    with pytest.raises(TrainingError, match=f"Step 1: the {silent[0]} adapter got no gradient") as error:
        trainer.step()
    assert "\n" not in str(error.value)


def test_data_is_checked_before_anything_is_built(trainer_for):
    with pytest.raises(ValueError, match="has one picture"):
        trainer_for(source=fakes.pairs(subjects=3, views=1))
    with pytest.raises(ValueError, match="there is no picture for invariant data"):
        trainer_for(source=fakes.pairs(subjects=0, loose=0))
