"""The gate along the sampling follows sigma, and along the batch the latents, whatever samples."""

import comfy.samplers
import naive
import pytest
import tiny
import torch
from comfy_extras import nodes_custom_sampler as custom
from flexip_pack.flexip_core.run.schedule import GateBatch, GateCurve, PercentOfSigma, preset_curve
from flexip_pack.nodes import runtime
from flexip_pack.nodes import sampler as sampler_node
from flexip_pack.nodes.sampler import FlexIPSampler
from torch.utils._python_dispatch import TorchDispatchMode

import nodes

TOLERANCE = 1e-5
POINTS = ((0.1, 0.95), (0.35, 0.2), (0.6, 0.7), (0.9, 0.05))
CURVE, BY_HAND = GateCurve(POINTS, "test"), naive.lines(POINTS)
P, N = tiny.cond(1), tiny.cond(2)
PROMPTS = [naive.Prompt(P[0][0][0], False), naive.Prompt(N[0][0][0], True)]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


@pytest.fixture(scope="module")
def outputs_network(model):
    return tiny.tiny_network(model)


def gated(model, network, gates, reference=None, **kwargs):
    """`gates`: a number, numbers per row, a curve or a batch."""
    spec = naive.Spec(network, [reference or tiny.tiny_reference()], **kwargs)
    return runtime.attach(model, spec.link((gates,) if isinstance(gates, float) else gates))


def advanced(m, start, end, latent, fresh, leftover):
    return nodes.KSamplerAdvanced().sample(
        m, fresh, 3, 7, 7.0, "euler", "karras", P, N, {"samples": latent}, start, end, leftover
    )[0]["samples"]


def two_stages(m):
    return advanced(m, 3, 10000, advanced(m, 0, 3, torch.zeros(1, 4, 8, 8), "enable", "enable"), "disable", "disable")


def custom_sigmas(m):
    noise = custom.Noise_RandomNoise(5)
    sigmas = torch.tensor([9.0, 4.5, 4.4, 0.7, 0.03, 0.0])
    return custom.SamplerCustomAdvanced.execute(
        noise,
        custom.CFGGuider.execute(m, P, N, 7.0).args[0],
        comfy.samplers.sampler_object("euler"),
        sigmas,
        {"samples": torch.zeros(1, 4, 8, 8)},
    ).args[0]["samples"]


def ksample(**kwargs):
    return lambda m: tiny.ksample(m, P, N, **kwargs)


RUNS = {
    **{f"{s} {n}": ksample(sampler=s, steps=n) for s, n in [("euler", 3), ("dpmpp_2m", 7), ("ddim", 20), ("heun", 3)]},
    "denoise 0.5": ksample(denoise=0.5, steps=4, latent=torch.ones(1, 4, 8, 8)),
    "two stages": two_stages,
    "own sigmas": custom_sigmas,
}


def calls_of(m, run, value=lambda branches: None):
    """(sigma, x, timestep, conditionings, result, value) of every UNet call."""
    calls, m = [], m.clone()

    def wrapper(apply_model, arguments):
        result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        calls[-1] += (arguments["input"], result)
        return result

    m.set_model_unet_function_wrapper(wrapper)

    def look(sigma, branches):
        calls.append((sigma, value(branches)))

    picture = run(naive.watch_calls(m, look))
    return calls, picture


@pytest.mark.parametrize("name", RUNS)
def test_the_gate_of_every_call_is_the_curve_at_its_sigma(model, outputs_network, name):
    """V of the preservation branch is scaled by the gate, V of the other one by the rest."""
    ends = {}
    value = lambda branches: [branch.v.norm() for branch in branches[0, "middle.0.0"]]
    for end in (0.0, 1.0):
        ends[end] = calls_of(gated(model, outputs_network, end), RUNS["euler 3"], value)[0][0][1][int(1 - end)]
    calls, _ = calls_of(gated(model, outputs_network, CURVE), RUNS[name], value)
    sampling = model.get_model_object("model_sampling")
    assert len({sigma for sigma, *_ in calls}) > 2
    for sigma, (preservation, personalization), *_ in calls:
        gate = BY_HAND(naive.percent_of(sigma, sampling))
        assert float(preservation / ends[1.0]) == pytest.approx(gate, abs=2e-3)
        assert float(personalization / ends[0.0]) == pytest.approx(1 - gate, abs=2e-3)


@pytest.mark.parametrize("name", ["heun 3", "two stages", "denoise 0.5"])
def test_every_call_equals_that_call_of_a_run_with_its_constant_gate(model, network, name):
    """Nothing of the gate before is left: the same x at the same sigma gives the same numbers."""
    reference = tiny.tiny_reference()
    calls, _ = calls_of(gated(model, network, CURVE, reference), RUNS[name])
    percent_of = PercentOfSigma(model.get_model_object("model_sampling").percent_to_sigma)
    for sigma, _, x, result in calls:

        def only(denoise, start, sigmas, extra_args, x=x, sigma=sigma, **kwargs):
            return denoise(x[: len(start)], torch.full((len(start),), sigma), **extra_args)

        constant = gated(model, network, CURVE(percent_of(sigma)), reference)
        guider = custom.CFGGuider.execute(constant, P, N, 7.0).args[0]
        again, _ = calls_of(
            constant,
            lambda m, g=guider, f=only: (
                g.set_conds(P, N),
                setattr(g, "model_options", m.model_options),
                setattr(g, "model_patcher", m),
                g.sample(
                    tiny.noise_for(),
                    torch.zeros(1, 4, 8, 8),
                    comfy.samplers.KSAMPLER(f),
                    torch.tensor([1.0, 0.0]),
                    disable_pbar=True,
                ),
            ),
        )
        assert torch.equal(again[0][2], x) and torch.equal(again[0][3], result)


@pytest.mark.parametrize("sampler, steps", [("euler", 4), ("heun", 3)])
def test_a_run_with_a_curve_and_masks_equals_the_naive_reference(model, network, sampler, steps):
    masks = torch.rand(2, 16, 16, generator=tiny.generator(3))
    spec = naive.Spec(network, [tiny.tiny_reference()], BY_HAND, 0.9, (0.0, 0.8), mask=masks[:1], gate_mask=masks)
    run = ksample(sampler=sampler, steps=steps, noise=tiny.noise_for(2))
    expected = run(naive.attach(model, [spec], PROMPTS, naive.Picture(2, 8, 8)))
    # the product reads the curve from a table of sigmas
    assert tiny.relative_error(run(runtime.attach(model, spec.link(CURVE))), expected) < 1e-3


@pytest.mark.parametrize(
    "gates",
    [preset_curve("constant", 0.3, 0.9), GateBatch((0.3,), "interpolate"), GateBatch((0.3, 0.3), "repeat")],
    ids=["curve", "one for all", "alike"],
)
def test_a_constant_schedule_is_the_constant_gate_bit_for_bit(model, network, gates):
    run = ksample(noise=tiny.noise_for(3), steps=3)
    assert torch.equal(run(gated(model, network, gates)), run(gated(model, network, 0.3)))


class HostReads(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: numbers read out of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        HostReads.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["curve", "window", "both", "neither"])
def test_a_call_reads_sigma_at_most_once(model, outputs_network, what):
    reads, before = [], []

    def enter(executor, *args, **kwargs):
        before.append(HostReads.count)
        return executor(*args, **kwargs)

    def leave(executor, *args, **kwargs):
        reads.append(HostReads.count - before[-1])
        return executor(*args, **kwargs)

    outer = model.clone()
    outer.add_wrapper_with_key("apply_model", "before", enter)
    gates = CURVE if what in ("curve", "both") else 0.4
    m = gated(outer, outputs_network, gates, window=(0.1, 0.9) if what in ("window", "both") else (0.0, 1.0))
    m.add_wrapper_with_key("apply_model", "after", leave)
    with HostReads():
        tiny.ksample(m, P, N, steps=5)
    assert reads == [int(what != "neither")] * 5


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("spread, values", [("repeat", (0.1, 0.9)), ("interpolate", (0.0, 1.0, 0.4))])
def test_gates_along_the_batch_equal_single_runs(model, network, batch, spread, values):
    reference, noise = tiny.tiny_reference(), tiny.noise_for(batch)
    if spread == "repeat":
        expected = [values[row % 2] for row in range(batch)]
    else:
        place = naive.lines([(0.0, 0.0), (0.5, 1.0), (1.0, 0.4)])
        expected = [place(row / (batch - 1)) if batch > 1 else values[0] for row in range(batch)]
    together = tiny.ksample(gated(model, network, GateBatch(values, spread), reference), P, N, noise=noise)
    for row, gate in enumerate(expected):
        alone = tiny.ksample(gated(model, network, float(gate), reference), P, N, noise=noise[row : row + 1])
        assert tiny.relative_error(together[row : row + 1], alone) < TOLERANCE


def swept(m, gates="", strengths="", batch=3, steps=2):
    latent = {"samples": torch.zeros(batch, 4, 8, 8)}
    return FlexIPSampler.execute(m, 0, steps, 7.0, "euler", "normal", P, N, latent, 1.0, gates, None, strengths).args[
        0
    ]["samples"]


@pytest.mark.parametrize(
    "gates",
    [0.3, CURVE, GateBatch((0.1, 0.9), "repeat"), GateBatch((0.0, 1.0), "interpolate")],
    ids=["one gate", "curve", "repeat", "interpolate"],
)
def test_rows_of_a_sweep_of_strengths_equal_single_runs(model, network, gates):
    reference = tiny.tiny_reference()
    together = swept(gated(model, network, gates, reference), strengths="0.4, 1, 0")
    for number, strength in enumerate((0.4, 1.0, 0.0)):
        alone = swept(gated(model, network, gates, reference, strength=strength)) if strength else swept_bare(model)
        assert tiny.relative_error(together[3 * number : 3 * number + 3], alone) < TOLERANCE


def swept_bare(model):
    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    return nodes.common_ksampler(model, 0, 2, 7.0, "euler", "normal", P, N, latent)[0]["samples"]


def test_a_grid_of_strengths_and_gates_equals_single_runs(model, network):
    reference = tiny.tiny_reference()
    grid = swept(gated(model, network, 0.5, reference), "0, 1", "0.5, 1.5", batch=2)
    cells = [(strength, gate) for strength in (0.5, 1.5) for gate in (0.0, 1.0)]
    assert len(grid) == 2 * len(cells)
    for number, (strength, gate) in enumerate(cells):
        alone = swept(gated(model, network, gate, reference, strength=strength), batch=2)
        assert tiny.relative_error(grid[2 * number : 2 * number + 2], alone) < TOLERANCE


def test_a_sweep_starts_masks_batches_and_earlier_links_again_for_every_copy(model, network):
    """Two masks, gates and references of two weights for three latents: the second copy does not go on where the first ended."""
    references = [tiny.tiny_reference(seed) for seed in (9, 10)]
    masks = torch.rand(2, 16, 16, generator=tiny.generator(3))
    first = naive.Spec(network, references, combine="one per batch item", weights=(1.0, 0.5), mask=masks)
    last = naive.Spec(network, [tiny.tiny_reference(11)], gate_mask=masks)

    def chain(gate):
        m = runtime.attach(model, first.link(GateBatch((0.1, 0.9), "repeat")))
        return runtime.attach(m, last.link((gate,)))

    together = swept(chain(0.5), "0.2, 0.8")
    for number, gate in enumerate((0.2, 0.8)):
        assert tiny.relative_error(together[3 * number : 3 * number + 3], swept(chain(gate))) < TOLERANCE


class PlainVae:
    def decode(self, samples):
        return samples[:, :3].movedim(1, -1)


def test_the_contact_sheet_of_strengths_over_a_gate_batch_has_a_column_per_latent_and_a_row_per_strength(
    model, outputs_network, monkeypatch
):
    shown = []

    def sheet(pictures, labels, row_labels):
        shown.append((pictures, labels, row_labels))
        return torch.zeros(1, 8, 8, 3)

    monkeypatch.setattr(sampler_node, "contact_sheet", sheet)
    m = gated(model, outputs_network, GateBatch((0.0, 1.0), "interpolate"))
    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    out = FlexIPSampler.execute(m, 0, 1, 7.0, "euler", "normal", P, N, latent, 1.0, "", PlainVae(), "0.5, 1").args[0]
    pictures, labels, row_labels = shown[0]
    assert (list(labels), list(row_labels)) == (["gate 0", "gate 0.5", "gate 1"], ["strength 0.5", "strength 1"])
    for column in range(3):
        for row in range(2):
            assert torch.equal(pictures[column * 2 + row], PlainVae().decode(out["samples"])[row * 3 + column])


def test_a_curve_in_one_link_of_a_chain_leaves_the_others_gate_alone(model):
    first = naive.Spec(tiny.tiny_network(model), [tiny.tiny_reference()], gates=BY_HAND)
    second = naive.Spec(tiny.tiny_network(model, "tokens", seed=5), [tiny.tiny_reference(11)], gates=[0.2, 0.9])
    noise = tiny.noise_for(2)
    got = tiny.ksample(
        runtime.attach(runtime.attach(model, first.link(CURVE)), second.link()), P, N, noise=noise, steps=3
    )
    expected = tiny.ksample(
        naive.attach(model, [first, second], PROMPTS, naive.Picture(2, 8, 8)), P, N, noise=noise, steps=3
    )
    assert tiny.relative_error(got, expected) < 1e-3
