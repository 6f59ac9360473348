"""ComfyUI's TorchCompileModel node drops every guard on transformer_options: the picture to fear is a stale one."""

import pytest
import tiny
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from flexip_pack.nodes import runtime
from torch._dynamo.utils import counters

P, N, M = tiny.cond(1), tiny.cond(2), tiny.cond(3)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model):
    model = model.clone()
    # the node's own options; backend "eager" traces and guards like inductor and compiles in a moment
    set_torch_compile_wrapper(model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return model


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["outputs", pytest.param("tokens", marks=pytest.mark.long)])
def test_compiled_picture_is_right_after_every_change_and_only_new_structures_compile(mode):
    model = tiny.tiny_model()
    network, longer = tiny.tiny_network(model, mode), tiny.tiny_reference(pictures=2)
    reference = tiny.tiny_reference()
    bare = compiled(model)

    def new_graphs(attach, sample=lambda m: tiny.ksample(m, P, N)):
        """Graphs that FlexIP on the compiled model needed; the picture must equal the eager one in both orders of the nodes."""
        expected, before = sample(attach(model)), graphs()
        assert tiny.relative_error(sample(attach(bare)), expected) < 1e-5
        count = graphs() - before
        assert tiny.relative_error(sample(compiled(attach(model))), expected) < 1e-5
        assert tiny.relative_error(expected, sample(model)) > 1e-3
        return count

    def gate(value, reference=reference, **kwargs):
        return lambda m: runtime.attach(m, tiny.link_for(network, reference, value, **kwargs))

    assert tiny.relative_error(tiny.ksample(bare, P, N), tiny.ksample(model, P, N)) < 1e-5
    assert new_graphs(gate(0.7)) > 0, "a graph compiled without FlexIP must not be used with it"
    for value in (0.1, 0.0, 1.0):
        assert new_graphs(gate(value)) == 0
    assert new_graphs(gate(0.3, strength=0.5)) == 0
    assert new_graphs(gate(0.7, reference=longer)) > 0
    new_graphs(gate(0.7, start_percent=0.3, end_percent=0.8), lambda m: tiny.ksample(m, P, N, steps=4))
    new_graphs(gate((0.0, 0.3, 0.6, 1.0)), lambda m: tiny.ksample(m, P, N, noise=tiny.noise_for(1).repeat(4, 1, 1, 1)))
    new_graphs(gate(0.7), lambda m: tiny.guide(custom.DualCFGGuider.execute(m, P, M, N, 7.0, 5.0, "regular").args[0]))
    before = graphs()
    assert tiny.relative_error(tiny.ksample(bare, P, N), tiny.ksample(model, P, N)) < 1e-5
    assert graphs() == before


@pytest.mark.parametrize("mode", [pytest.param("outputs", marks=pytest.mark.long), "tokens"])
def test_four_runs_with_another_gate_seed_and_prompt_compile_and_break_as_often_as_the_bare_model(mode):
    model = tiny.tiny_model()
    network, reference = tiny.tiny_network(model, mode), tiny.tiny_reference()
    runs = [(0.7, 0, P), (0.2, 1, P), (0.2, 2, M), (0.9, 3, tiny.cond(8))]

    def compile_costs(attach):
        """(graphs of the first run, of the other three together, graph breaks of all) on a model compiled afresh."""
        torch._dynamo.reset()
        counters.clear()
        base, counts = compiled(model), []
        for gate, seed, prompt in runs:
            noise = tiny.noise_for(seed=seed)
            got = tiny.ksample(attach(base, gate), prompt, N, noise=noise, seed=seed)
            assert tiny.relative_error(got, tiny.ksample(attach(model, gate), prompt, N, noise=noise, seed=seed)) < 1e-5
            counts.append(graphs())
        return counts[0], counts[-1] - counts[0], sum(counters["graph_break"].values())

    bare = compile_costs(lambda m, gate: m)
    ours = compile_costs(lambda m, gate: runtime.attach(m, tiny.link_for(network, reference, gate)))
    assert bare[0] > 0 and ours == bare


def test_rows_that_another_node_repeats_are_right_on_a_compiled_model():
    """Its patch runs outside the graphs; it is there or not from one run to the next."""
    model = tiny.tiny_model()
    network, reference, noise = tiny.tiny_network(model), tiny.tiny_reference(), tiny.noise_for(2)
    base = compiled(model)

    def twice(model):
        model = model.clone()
        model.set_model_attn2_patch(lambda q, k, v, options: (q.repeat(2, 1, 1), k.repeat(2, 1, 1), v.repeat(2, 1, 1)))
        model.set_model_attn2_output_patch(lambda out, options: out.chunk(2)[0] * 0.3 + out.chunk(2)[1] * 0.7)
        return model

    for gates in ((0.1, 0.9), (0.8, 0.2)):
        gated = lambda m, gates=gates: runtime.attach(m, tiny.link_for(network, reference, gates))
        plain = tiny.ksample(gated(model), P, N, noise=noise)
        # both halves are the same picture, so repeating changes nothing
        assert tiny.relative_error(tiny.ksample(twice(gated(base)), P, N, noise=noise), plain) < 1e-5
        assert tiny.relative_error(tiny.ksample(compiled(twice(gated(model))), P, N, noise=noise), plain) < 1e-5
        assert tiny.relative_error(tiny.ksample(gated(base), P, N, noise=noise), plain) < 1e-5
