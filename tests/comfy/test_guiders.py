"""Every guider and kind of conditioning of ComfyUI: each text gets the reference or the null reference as its role says.

The naive reference knows the role of each text from the test; ours must find it by itself.
"""

import comfy.context_windows
import node_helpers
import pytest
import tiny
import torch
from comfy_extras import nodes_context_windows, nodes_hooks, nodes_pag, nodes_perpneg, nodes_sag
from comfy_extras import nodes_custom_sampler as custom
from flexip_pack.nodes import runtime

import nodes

TOLERANCE = 1e-5
P, N, M, E = (tiny.cond(seed) for seed in (1, 2, 3, 4))
ROLES = {"p": False, "n": True, "m": True}  # m: DualCFG's middle, PerpNeg's empty prompt


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


def first(result):
    return result.args[0] if hasattr(result, "args") else result[0]


def check(model, network, run, texts, gate=0.6):
    """`run(model)` samples; `texts` maps each conditioning to its role. Compared with the naive reference and the bare model."""
    link = tiny.link_for(network, tiny.tiny_reference(), gate)
    got = run(runtime.attach(model, link))
    expected = run(tiny.naive_attach(model, [link], [(conditioning[0][0], null) for conditioning, null in texts]))
    assert tiny.relative_error(got, expected) < TOLERANCE
    assert tiny.relative_error(got, run(model)) > 1e-3, "FlexIP must change the picture"


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_gives_its_middle_the_null_reference(model, network, style):
    check(
        model,
        network,
        lambda m: tiny.guide(first(custom.DualCFGGuider.execute(m, P, M, N, 7.0, 5.0, style))),
        [(P, False), (M, True), (N, True)],
    )


def test_perp_neg_guider(model, network):
    check(
        model,
        network,
        lambda m: tiny.guide(first(nodes_perpneg.PerpNegGuider.execute(m, P, N, M, 7.0, 1.0))),
        [(P, False), (N, True), (M, True)],
    )


def test_old_perp_neg_node_whose_own_conditioning_has_no_tag(model, network):
    check(
        model,
        network,
        lambda m: tiny.ksample(first(nodes_perpneg.PerpNeg.execute(m, M, 1.0)), P, N),
        [(P, False), (N, True), (M, True)],
    )


def test_a_conditioning_without_tag_is_projected_once_in_a_run(model, network, monkeypatch):
    runs, seen = [], []
    start = runtime._start
    monkeypatch.setattr(runtime, "_start", lambda *args, **kwargs: runs.append(start(*args, **kwargs)) or runs[-1])

    def look(*args):
        counters = runs[0].links[0].counters
        seen.append((len(runs[0].links[0].conditionings), counters.projected, counters.from_cache))

    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    tiny.ksample(first(nodes_perpneg.PerpNeg.execute(gated, M, 1.0)), P, N, steps=20, callback=look)
    assert len(runs) == 1 and len(seen) == 20
    assert set(seen) == {
        (3, 5, 1)
    }  # three texts; of what reads no text one for the reference, one for the null reference


def test_basic_guider_without_negative(model, network):
    check(model, network, lambda m: tiny.guide(first(custom.BasicGuider.execute(m, P))), [(P, False)])


def test_cfg_guider(model, network):
    check(model, network, lambda m: tiny.guide(first(custom.CFGGuider.execute(m, P, N, 7.0))), [(P, False), (N, True)])


def test_perturbed_attention_guidance(model, network):
    check(
        model,
        network,
        lambda m: tiny.ksample(first(nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)), P, N),
        [(P, False), (N, True)],
    )


def test_self_attention_guidance(model, network):
    check(
        model,
        network,
        lambda m: tiny.ksample(
            first(nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)), P, N, noise=tiny.noise_for(1, 16, 16)
        ),
        [(P, False), (N, True)],
    )


def area(conditioning):
    return nodes.ConditioningSetArea().append(conditioning, 32, 64, 0, 0, 1.0)[0]


def test_area_prompts_on_the_positive_side_only(model, network):
    """Core makes a negative of the same area: a copy of the positive's entry with the negative's text."""
    check(model, network, lambda m: tiny.ksample(m, area(P) + M, N), [(P, False), (M, False), (N, True)])


def test_area_prompts_on_the_negative_side_only(model, network):
    check(model, network, lambda m: tiny.ksample(m, P, area(N) + M), [(P, False), (M, True), (N, True)])


@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_mask_prompts_on_one_side(model, network, bounds):
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    positive = nodes.ConditioningSetMask().append(P, mask, bounds, 1.0)[0] + M
    check(
        model,
        network,
        lambda m: tiny.ksample(m, positive, N, noise=tiny.noise_for(1, 16, 16)),
        [(P, False), (M, False), (N, True)],
    )


def test_combined_prompts(model, network):
    check(model, network, lambda m: tiny.ksample(m, P + M, N + E), [(P, False), (M, False), (N, True), (E, True)])


def test_timestep_ranges(model, network):
    setter = nodes.ConditioningSetTimestepRange()
    positive = setter.set_range(P, 0.0, 0.5)[0] + setter.set_range(M, 0.5, 1.0)[0]
    check(model, network, lambda m: tiny.ksample(m, positive, N, steps=4), [(P, False), (M, False), (N, True)])


def test_default_conditionings_fill_the_unmasked_rest(model, network):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    positive, negative = nodes_hooks.PairConditioningSetProperties().set_properties(P, N, 1.0, "default", mask=mask)
    positive, negative = nodes_hooks.PairConditioningSetDefaultAndCombine().set_default_and_combine(
        positive, negative, M, E
    )
    check(model, network, lambda m: tiny.ksample(m, positive, negative), [(P, False), (N, True), (M, False), (E, True)])


def windows(model, length=8):
    return first(
        nodes_context_windows.ContextWindowsManualNode.execute(
            model,
            4,
            2,
            comfy.context_windows.ContextSchedules.STATIC_STANDARD,
            1,
            False,
            comfy.context_windows.ContextFuseMethods.PYRAMID,
            0,
            False,
        )
    )


def test_context_windows_over_the_batch(model, network):
    noise = tiny.noise_for(8)
    check(model, network, lambda m: tiny.ksample(windows(m), P, N, noise=noise), [(P, False), (N, True)])


def test_context_windows_take_each_rows_own_gate(model):
    """Core slices the rows of a window out of the batch, sometimes with an anchor row in front; each keeps its own gate."""
    network = tiny.tiny_network(model)
    gates = tuple(i / 7 for i in range(8))
    seen = []

    def spy(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        window = options["context_window"]
        anchor = getattr(window, "causal_anchor_index", None)
        rows = ([] if anchor is None else [anchor]) + list(window.index_list)
        values = options["flexip"][0, "middle.0.0"][0].v  # the preservation branch: V scaled by the gate
        seen.append((rows, values.norm(dim=(1, 2)).tolist()))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    gated = windows(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), gates)))
    gated.add_wrapper_with_key("apply_model", "spy", spy)
    tiny.ksample(gated, P, N, noise=tiny.noise_for(8), cfg=1.0, steps=1)
    assert len(seen) > 1
    full = max(norm for _, norms in seen for norm in norms)
    for rows, norms in seen:
        assert [norm / full for norm in norms] == pytest.approx([gates[row] for row in rows], abs=1e-5)


def test_hooked_lora_on_one_side(model, network):
    import comfy.hooks

    g = tiny.generator(7)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    hook = comfy.hooks.create_hook_lora(
        {
            f"{key}.lora_up.weight": torch.randn(32, 2, generator=g) * 0.1,
            f"{key}.lora_down.weight": torch.randn(2, 32, generator=g) * 0.1,
        },
        1.0,
        1.0,
    )
    positive = node_helpers.conditioning_set_values(P, {"hooks": hook}) + M
    check(model, network, lambda m: tiny.ksample(m, positive, N), [(P, False), (M, False), (N, True)])


@pytest.mark.skipif(not hasattr(custom, "DualModelGuider"), reason="this ComfyUI has no such guider")
def test_second_model_of_a_two_model_guider_runs_bare(model, network):
    """Core never runs the wrappers of the second model, so its patches find no tensors and add nothing."""
    link = tiny.link_for(network, tiny.tiny_reference())
    other = tiny.tiny_model(seed=1)
    got = tiny.guide(first(custom.DualModelGuider.execute(model, P, 7.0, runtime.attach(other, link), N)))
    assert torch.equal(got, tiny.guide(first(custom.DualModelGuider.execute(model, P, 7.0, other, N))))


def rows_in_tile_order(apply_model, arguments):
    """As TiledDiffusion batches: each row of the batch repeated next to the whole chunk sequence, chunks no longer in blocks."""
    x, t, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
    order = (
        torch.arange(x.shape[0]).view(len(arguments["cond_or_uncond"]), -1).T.flatten()
    )  # row-major instead of chunk-major
    c = {
        key: value[order] if isinstance(value, torch.Tensor) and value.shape[:1] == x.shape[:1] else value
        for key, value in c.items()
    }
    out = apply_model(x[order], t[order], **c)
    return torch.empty_like(out).index_copy_(0, order, out)


def rows_one_by_one(apply_model, arguments):
    x, t, c = arguments["input"], arguments["timestep"], arguments["c"]

    def row(value, i):
        return value[i : i + 1] if isinstance(value, torch.Tensor) and value.shape[:1] == x.shape[:1] else value

    calls = ({key: row(value, i) for key, value in c.items()} for i in range(len(x)))
    return torch.cat([apply_model(row(x, i), row(t, i), **call) for i, call in enumerate(calls)])


@pytest.mark.parametrize("wrapper", [rows_in_tile_order, rows_one_by_one])
@pytest.mark.parametrize("gate", [0.6, (0.1, 0.9)], ids=["one gate", "gate per row"])
def test_packs_that_reorder_or_split_the_batch_keep_every_rows_reference_and_gate(model, network, wrapper, gate):
    noise = tiny.noise_for(2)
    positive = tiny.cond(1, batch=2)
    link = tiny.link_for(network, tiny.tiny_reference(), gate)
    expected = tiny.ksample(
        tiny.naive_attach(model, [link], [(positive[0][0], False), (N[0][0], True)]), positive, N, noise=noise
    )
    wrapped = runtime.attach(model, link)
    wrapped.set_model_unet_function_wrapper(wrapper)
    assert tiny.relative_error(tiny.ksample(wrapped, positive, N, noise=noise), expected) < TOLERANCE


def test_a_prompt_of_another_checkpoints_clip_is_a_sentence(model, network):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    wide = [[torch.randn(1, 77, 2 * tiny.TEXT_WIDTH), {}]]
    with pytest.raises(ValueError, match="ApplyFlexIPGate: the model reads text of width 64.*width 128"):
        tiny.ksample(gated, wide, N)


def test_many_prompts_over_time_keep_a_bounded_number_of_layouts_on_the_device(model, network, monkeypatch):
    from flexip_pack.flexip_core.run import lru
    from flexip_pack.flexip_core.run import run as core_run

    monkeypatch.setattr(lru, "ROOM", 0)
    most = []
    original = core_run.LinkRun.branches
    monkeypatch.setattr(
        core_run.LinkRun, "branches", lambda self, *args: (original(self, *args), most.append(len(self._layouts)))[0]
    )
    setter = nodes.ConditioningSetTimestepRange()
    schedule = [part for i in range(10) for part in setter.set_range(tiny.cond(20 + i), i / 10, (i + 1) / 10)[0]]
    tiny.ksample(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference())), schedule, N, steps=10)
    assert len(most) == 10 and max(most) == core_run.LAYOUTS


def test_no_prompts_at_all_sample_as_without_flexip(model, network):
    """What ComfyUI itself accepts must not be lost in the report."""
    gated, reports = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference())), []
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    assert torch.equal(tiny.ksample(gated, [], []), tiny.ksample(model, [], []))
    assert "this gate changed nothing in this run" in reports[0]
