"""The loss on what is never trained on, averages elsewhere than on the device, and bases that predict v."""

import json

import pytest
import torch
import training_fakes as fakes

from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.training import __main__ as command
from flexip_core.training.checkpointing import states
from flexip_core.training.config import EmaConfig
from flexip_core.training.data import ALL, INVARIANT, VARIANT
from flexip_core.training.draws import generator
from flexip_core.training.loop import FINAL, LOG, Trainer
from flexip_core.training.losses import add_noise, min_snr_weights, prediction_target
from flexip_core.training.optim import update_average
from flexip_core.training.sampling import ddim
from flexip_core.training.validation import NOTHING_DROPPED, validation_losses


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase()


def logged(trainer, what):
    return [line for line in map(json.loads, (trainer.folder / LOG).read_text().splitlines()) if what in line]


def test_validation_is_told_by_kind_and_quartile_on_the_same_draws_and_changes_nothing(base, tmp_path, caplog):
    held_out = fakes.pairs(seed=9)
    with caplog.at_level("INFO"):
        trainer = Trainer(fakes.config(tmp_path / "a", validate=8), base, fakes.pairs(), validation=held_out)
        trainer.run()
    plain = Trainer(fakes.config(tmp_path / "b"), base, fakes.pairs())
    plain.run()
    for key, value in plain.network.state_dict().items():
        assert torch.equal(value, trainer.network.state_dict()[key]), "the same training"
    first, last = logged(trainer, "validation")
    assert (first["step"], last["step"]) == (3, 6)
    assert first["validation"]["rows_by_kind"] == {"invariant": 8, "variant": 8}
    quartiles = [first["validation"]["loss_by_kind_and_quartile"][kind] for kind in ("invariant", "variant")]
    assert all(len(kind) == 4 and sum(value is not None for value in kind) >= 2 for kind in quartiles)
    assert first["validation"]["loss"] != last["validation"]["loss"], "other weights"
    again = validation_losses(trainer.average, trainer.forward, fakes.pairs(seed=9), trainer.cfg)
    assert again == last["validation"], "the same weights"
    assert "Step 3: loss on pictures that are not trained on: invariant " in caplog.text


def test_the_validation_loss_is_the_training_loss_of_those_rows_without_dropout(base, tmp_path):
    trainer = Trainer(fakes.config(tmp_path, validate=4, batch=4), base, fakes.pairs())
    source = fakes.pairs(seed=9)
    found = validation_losses(trainer.average, trainer.forward, source, trainer.cfg)
    for kind, name in ((INVARIANT, "invariant"), (VARIANT, "variant")):

        def draw(purpose, number=1_000_000 * kind):
            return generator(2718, number, 0, purpose)

        kinds = torch.full((4,), kind)
        low = 0.5 if kind == INVARIANT else 0.0  # and as wide
        gates = tuple((low + 0.5 * torch.rand(4, generator=draw("gates"), dtype=torch.float64)).tolist())
        with torch.no_grad():
            losses, _ = trainer.forward.losses(
                trainer.network, source.batch(kinds, draw("pairs")), gates, draw, 4, ALL, NOTHING_DROPPED
            )
        assert found["loss_by_kind"][name] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_an_average_that_is_off_takes_no_memory_and_the_last_weights_are_exported(base, tmp_path):
    cfg = fakes.config(tmp_path / "run", ema=EmaConfig(where="off"), steps=3)
    trainer = Trainer(
        cfg, base, fakes.pairs(), probe=lambda network, step: {"score": float(network is trainer.network)}
    )
    trainer.run()
    assert trainer.average is None and trainer.progress.best_score == 1
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "run" / FINAL).state_dict(), trainer.network.state_dict(), rtol=0, atol=0
    )
    trainer.save()
    size = states(tmp_path / "run")[-1].stat().st_size
    resumed = Trainer(fakes.config(tmp_path / "run", steps=4), base, fakes.pairs())  # turned on
    resumed.start(resume=True)
    torch.testing.assert_close(resumed.average.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "x.safetensors")]) == 0
    resumed.save()
    assert size < 0.8 * states(tmp_path / "run")[-1].stat().st_size
    off = Trainer(fakes.config(tmp_path / "run", ema=EmaConfig(where="off"), steps=4), base, fakes.pairs())
    off.start(resume=True)  # and off again
    torch.testing.assert_close(off.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)


def test_an_average_on_the_cpu_is_the_same_average(base, tmp_path):
    trainers = [
        Trainer(fakes.config(tmp_path / where, ema=EmaConfig(where=where), steps=3), base, fakes.pairs())
        for where in ("device", "cpu")
    ]
    for trainer in trainers:
        trainer.run()
    torch.testing.assert_close(trainers[0].average.state_dict(), trainers[1].average.state_dict(), rtol=0, atol=0)

    class Elsewhere:
        """A weight on another device: it can only be copied from there."""

        device = torch.device("cuda:0")

        def __init__(self, value):
            self.value = value

        def to(self, device):
            assert device == torch.device("cpu")
            return self.value

    mean, now = torch.ones(3), torch.tensor([3.0, 5.0, 7.0])
    update_average([mean], [Elsewhere(now)], 0.5)
    assert mean.tolist() == [2, 3, 4]


# --- v


def test_v_and_its_picture_are_what_noise_and_picture_are(base):
    g = fakes.generator(0)
    clean, noise = (torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    a = torch.tensor([0.999, 0.7, 0.2, 1e-8], dtype=torch.float64)
    noisy, v = add_noise(clean, noise, a), prediction_target("v", clean, noise, a)
    wide = a.view(-1, 1, 1, 1)
    torch.testing.assert_close(wide.sqrt() * noisy - (1 - wide).sqrt() * v, clean)
    torch.testing.assert_close((1 - wide).sqrt() * noisy + wide.sqrt() * v, noise)
    assert prediction_target("epsilon", clean, noise, a) is noise


def test_min_snr_for_v_is_its_own_formula():
    a = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    snr = a / (1 - a)
    weights = min_snr_weights(a, 5.0, "v")
    torch.testing.assert_close(weights, torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)) / (snr + 1))
    # the error of v is (snr + 1) times that of the picture, that of the noise snr times: both weigh the picture's error alike
    torch.testing.assert_close(weights * (snr + 1), min_snr_weights(a, 5.0) * snr)


def test_a_base_that_predicts_v_is_trained_on_v(tmp_path):
    base = fakes.FakeBase()
    base.prediction = "v"
    trainer = Trainer(fakes.config(tmp_path, loss_weight="none"), base, fakes.pairs())
    seen = {}

    def unet(noisy, timesteps, **kwargs):
        seen.update(noisy=noisy, timesteps=timesteps)
        return (torch.zeros_like(noisy),)

    batch = fakes.pairs().batch(torch.tensor([0, 1, 0, 1]), fakes.generator(0))
    trainer.forward.base.unet.forward = unet
    losses, timesteps = trainer.losses(batch, (0.5,) * 4)
    a = base.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    clean = base.to_latents(batch.targets)
    noise = (seen["noisy"] - a.sqrt() * clean) / (1 - a).sqrt()
    v = a.sqrt() * noise - (1 - a).sqrt() * clean
    torch.testing.assert_close(losses, v.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_finds_the_picture_that_a_perfect_base_sees(base, prediction):
    clean = torch.randn(2, 4, 3, 3, generator=fakes.generator(3), dtype=torch.float64)
    alphas = base.alphas_cumprod.double()

    def perfect(latents, time, done):
        a = alphas[time]
        noise = (latents - a.sqrt() * clean) / (1 - a).sqrt()
        return noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean

    start = torch.randn(2, 4, 3, 3, generator=fakes.generator(4), dtype=torch.float64)
    torch.testing.assert_close(ddim(perfect, start, alphas, 7, prediction), clean, rtol=1e-6, atol=1e-6)
