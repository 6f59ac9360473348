"""Loss weights, learning rate, averaged weights and what is trained, against numbers by hand and diffusers' own classes."""

import math

import pytest
import torch
import training_fakes as fakes
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr

from flexip_core.network.adapters import ADAPTERS
from flexip_core.training.config import EmaConfig, OptimizerConfig
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.losses import Meter, add_noise, min_snr_weights, noise_loss
from flexip_core.training.optim import (
    adapter_of,
    ema_decay,
    gradient_norms,
    lr_at,
    make_optimizer,
    trainable,
    update_average,
)
from flexip_core.training.start import make_network


@pytest.fixture(scope="module")
def network():
    return make_network(fakes.config("run"), fakes.FakeBase())


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 5 / 6, 0.8, 0.5, 0.01])  # SNR 9, 5, 4, 1, 1/99
    torch.testing.assert_close(min_snr_weights(alphas, 5.0), torch.tensor([5 / 9, 1.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(min_snr_weights(alphas, 1.0), torch.tensor([1 / 9, 1 / 5, 1 / 4, 1.0, 1.0]))


def test_min_snr_weights_equal_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, torch.arange(1000))
    expected = (
        torch.stack([snr, 5 * torch.ones(1000)], dim=1).min(dim=1).values / snr
    )  # as its training scripts write it
    torch.testing.assert_close(min_snr_weights(scheduler.alphas_cumprod, 5.0), expected)


@pytest.mark.parametrize("gamma", [0, -1, math.nan])
def test_a_gamma_that_silences_the_loss_is_refused(gamma):
    with pytest.raises(ValueError, match="min_snr_gamma must be above 0"):
        min_snr_weights(torch.tensor([0.5]), gamma)


def test_noise_is_added_as_diffusers_does():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    g = fakes.generator(0)
    x, noise, t = (
        torch.randn(3, 4, 2, 2, generator=g),
        torch.randn(3, 4, 2, 2, generator=g),
        torch.tensor([0, 500, 999]),
    )
    torch.testing.assert_close(add_noise(x, noise, scheduler.alphas_cumprod[t]), scheduler.add_noise(x, noise, t))


def test_the_loss_of_a_row_is_its_weighted_mean_square():
    predicted, noise = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    torch.testing.assert_close(noise_loss(predicted, noise, torch.tensor([1.0, 0.5])), torch.tensor([5.0, 2.0]))


def test_losses_are_logged_by_kind_and_quartile():
    meter = Meter()
    kinds = torch.tensor([INVARIANT, INVARIANT, VARIANT, VARIANT])
    meter.add(torch.tensor([1.0, 3.0, 5.0, 7.0]), kinds, torch.tensor([0, 249, 250, 999]), 1000)
    meter.add(torch.tensor([2.0]), torch.tensor([INVARIANT]), torch.tensor([500]), 1000)
    report = meter.report()
    assert report["loss"] == 18 / 5
    assert report["loss_by_kind"] == {"invariant": 2.0, "variant": 6.0}
    assert report["loss_by_quartile"] == [2.0, 5.0, 2.0, 7.0]
    assert report["loss_by_kind_and_quartile"] == {
        "invariant": [2.0, None, 2.0, None],
        "variant": [None, 5.0, None, 7.0],
    }
    assert report["rows_by_kind"] == {"invariant": 3, "variant": 2}
    meter.reset()
    assert meter.report()["loss"] is None


def test_the_learning_rate_rises_stays_and_falls():
    cfg = OptimizerConfig(lr=2.0, warmup=4, cosine_from=0.5, floor=0.1)
    got = [lr_at(step, 20, cfg) for step in range(20)]
    assert got[:4] == [0.5, 1.0, 1.5, 2.0] and got[4:11] == [2.0] * 7
    assert got[15] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert all(a > b for a, b in zip(got[10:], got[11:])) and got[-1] > 0.2
    assert lr_at(20, 20, cfg) == pytest.approx(0.2)
    assert lr_at(19, 20, OptimizerConfig(lr=2.0, warmup=0, cosine_from=1.0)) == 2.0


def test_decay_of_the_average_by_hand():
    cfg = EmaConfig(decay=0.99, power=0.75)
    assert ema_decay(0, cfg) == 0
    assert ema_decay(15, cfg) == pytest.approx(1 - 16**-0.75) == pytest.approx(0.875)
    assert ema_decay(10**6, cfg) == 0.99


def test_the_average_equals_diffusers():
    g = fakes.generator(0)
    current = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,))]
    theirs = EMAModel(current, decay=0.9, use_ema_warmup=True, power=0.75)
    average = [p.detach().clone() for p in current]
    for step in range(40):  # 0.9 is reached at step 21
        with torch.no_grad():
            for p in current:
                p.add_(torch.randn(p.shape, generator=g))
        theirs.step(current)
        update_average(average, current, ema_decay(step, EmaConfig(0.9, 0.75)))
        for ours, expected in zip(average, theirs.shadow_params):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_every_weight_belongs_to_one_adapter(network):
    keys = [key for key, _ in network.named_parameters()]
    owners = {name: [key for key in keys if adapter_of(key) == name] for name in ADAPTERS}
    assert sum(map(len, owners.values())) == len(keys)
    blocks = len(network.block_widths)
    for name, own in owners.items():
        assert sum(key.startswith("blocks.") for key in own) == 2 * blocks
        assert sum(key.startswith(f"{name}.") for key in own) == len(list(network.get_submodule(name).parameters()))


def test_one_adapter_alone_is_trained(network):
    parameters = trainable(network, ["preservation"])
    assert {adapter_of(key) for key in parameters} == {"preservation"}
    assert {key for key, p in network.named_parameters() if p.requires_grad} == parameters.keys()
    assert len(trainable(network, ADAPTERS)) == len(list(network.parameters()))


def test_matrices_decay_and_nothing_else(network):
    optimizer = make_optimizer(trainable(network, ADAPTERS), OptimizerConfig(weight_decay=0.3))
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    names = {id(p): key for key, p in network.named_parameters()}
    assert all(key.endswith(".weight") and "norm" not in key for key in (names[id(p)] for p in decayed))
    assert all("norm" in key or key.endswith((".bias", "queries")) for key in (names[id(p)] for p in plain))
    assert len(decayed) + len(plain) == len(names)


def test_gradient_norms_per_adapter(network):
    parameters = trainable(network, ADAPTERS)
    network.zero_grad(set_to_none=True)
    network.preservation.queries.grad = torch.zeros_like(network.preservation.queries)
    network.preservation.queries.grad.view(-1)[:2] = torch.tensor([3.0, 0.0])
    network.projection("middle.0.0", "preservation").to_k.weight.grad = torch.zeros(32, fakes.TEXT)
    network.projection("middle.0.0", "preservation").to_k.weight.grad[1, 1] = 4.0
    assert {name: float(norm) for name, norm in gradient_norms(parameters).items()} == {
        "preservation": 5.0,
        "personalization": 0.0,
    }
    network.zero_grad(set_to_none=True)
