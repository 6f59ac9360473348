"""FlexIPAttentionMaps: what it shows is what FlexIP adds."""

import comfy.context_windows
import comfy.sd1_clip
import comfy.sdxl_clip
import node_helpers
import pytest
import tiny
import torch
from comfy_extras import nodes_context_windows
from flexip_pack.flexip_core.measuring import maps
from flexip_pack.flexip_core.network.attention import GatedAttention
from flexip_pack.flexip_core.network.blocks import block_levels
from flexip_pack.flexip_core.run.reference import ReferenceSet
from flexip_pack.nodes import maps as node
from flexip_pack.nodes import runtime, slots
from flexip_pack.nodes.conditioning import FlexIPConditioning
from looking import (  # noqa: F401 - fixtures among them
    FINEST,
    FakeClip,
    FakeVae,
    M,
    N,
    P,
    clip,
    gated,
    latent,
    model,
    network,
    raw,
    run,
    set_mask,
    watch_blocks,
)

import nodes

# ---- the numbers


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)], ids=str)
def test_a_map_is_what_a_naive_recomputation_says(model, mode, size, monkeypatch):
    network, reference, gate, strength = tiny.tiny_network(model, mode), tiny.tiny_reference(pictures=2), 0.3, 0.7
    gated = runtime.attach(model, tiny.link_for(network, reference, gate, strength=strength))
    blocks = watch_blocks(monkeypatch)
    got = raw(gated, samples=latent(1, *size), blocks=FINEST, steps=3)
    assert [block.address for block in blocks] == [FINEST] * 3
    expected = sum(naive_map(network, reference, gate, strength, block) for block in blocks) / 3
    torch.testing.assert_close(got[:, 0], expected.unflatten(1, size), rtol=1e-4, atol=1e-6)


def naive_map(network, reference, gate, strength, block):
    """(3, n): detail, semantic, personalization; tokens of pictures are [semantic 2 ; detail 5]"""
    text = P[0][0]
    tokens = {name: network.tokens(name, reference.features, text)[0] for name in network.adapters}
    kv = {name: network.projection(FINEST, name) for name in network.adapters}
    k = {name: tokens[name] @ kv[name].to_k.weight.T for name in tokens}
    v = {name: tokens[name] @ kv[name].to_v.weight.T for name in tokens}
    q = block.q[0]
    index = torch.arange(14)
    detail, semantic = index % 7 >= 2, index % 7 < 2
    if network.gate_mode == "outputs":
        softmaxes = [
            (k["preservation"], gate * v["preservation"] * detail[:, None]),
            (k["preservation"], gate * v["preservation"] * semantic[:, None]),
            (k["personalization"], (1 - gate) * v["personalization"]),
        ]
    else:
        joined_k = torch.cat([gate * k["preservation"], (1 - gate) * k["personalization"]])
        joined_v = torch.cat([gate * v["preservation"], (1 - gate) * v["personalization"]])
        others = torch.zeros(77, dtype=torch.bool)
        groups = (torch.cat([detail, others]), torch.cat([semantic, others]), torch.cat([detail & False, ~others]))
        softmaxes = [(joined_k, joined_v * kept[:, None]) for kept in groups]
    unit = tiny.naive_softmax(q, block.k[0], block.v[0], block.heads).norm(dim=1).mean()
    return torch.stack(
        [strength * tiny.naive_softmax(q, keys, values, block.heads).norm(dim=1) / unit for keys, values in softmaxes]
    )


def test_the_groups_together_add_exactly_what_the_gated_model_adds(gated, monkeypatch):
    """The block's output, bare and gated, is known from the patch itself."""
    blocks = watch_blocks(monkeypatch)
    run(gated, steps=1)
    assert {block.address for block in blocks} == set(block_levels(gated.model.diffusion_model))
    for block in blocks:
        patch = GatedAttention(block.address, 0, slots.base_attention)
        options = {"n_heads": block.heads, "activations_shape": (1, 4, *block.grid)}
        bare = patch(block.q, block.k, block.v, options)
        full = patch(block.q, block.k, block.v, {**options, "flexip": block.branches})
        groups = [
            (branch, tokens)
            for branch, adapter in zip(block.branches[0, block.address], ("preservation", "personalization"))
            for tokens in runtime.links_of(gated)[0].network.token_groups(adapter, branch.k.shape[1]).values()
        ]
        added = sum(maps.added_by(block.q, [group], block.heads, block.grid) for group in groups)
        assert len(groups) == 3 and tiny.relative_error(added, full - bare) < 1e-4


@pytest.mark.parametrize("gate, silent", [(1.0, ["personalization"]), (0.0, ["detail", "semantic"])])
def test_a_group_that_the_gate_takes_out_has_a_black_map(model, network, gate, silent):
    result = raw(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), gate)))
    for name, group in zip(("detail", "semantic", "personalization"), result):
        assert group.eq(0).all() if name in silent else group.min() > 0


def test_twice_the_strength_is_twice_the_map(model, network):
    """In the first block, whose queries do not depend on FlexIP."""
    once, twice = (
        raw(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), 0.6, strength=s)), blocks=FINEST)
        for s in (0.4, 0.8)
    )
    assert tiny.relative_error(2 * once, twice) < 1e-5


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_where_the_mask_is_black_the_maps_are_zero(model, mode):
    mask = torch.ones(64, 96)
    mask[:, :48] = 0
    link = tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference(), 0.6, mask=mask[None])
    gated = runtime.attach(model, link)
    fine = raw(gated, samples=latent(1, 8, 12), blocks="input.1")
    assert fine[..., :6].eq(0).all() and fine[..., 6:].min() > 0
    everywhere = raw(gated, samples=latent(1, 8, 12))
    assert everywhere[..., :5].eq(0).all() and everywhere[..., 7:].min() > 0  # a coarse token is two cells wide


def test_a_gate_mask_moves_the_maps_apart(model):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    for mode in ("outputs", "tokens"):
        link = tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference(), 1.0, gate_mask=mask)
        result = raw(runtime.attach(model, link), blocks=FINEST)
        assert result[:2, ..., 4:].eq(0).all() and result[2, ..., :4].eq(0).all()
        assert result[:2, ..., :4].min() > 0 and result[2, ..., 4:].min() > 0


# ---- batches, prompts and parts of the picture


def test_every_latent_of_a_batch_has_the_maps_it_has_alone(model, network):
    gates = (0.1, 0.9, 0.5)
    reference = tiny.tiny_reference()
    batch = latent(3, 6, 10, batch_index=[4, 0, 2])
    together = raw(runtime.attach(model, tiny.link_for(network, reference, gates)), samples=batch)
    for item, gate in enumerate(gates):
        one = {"samples": batch["samples"][item : item + 1], "batch_index": [batch["batch_index"][item]]}
        alone = raw(runtime.attach(model, tiny.link_for(network, reference, gate)), samples=one)
        assert tiny.relative_error(together[:, item : item + 1], alone) < 1e-5
    assert tiny.relative_error(together[:, 0], together[:, 1]) > 0.1


def test_context_windows_change_no_map(gated):
    windowed = nodes_context_windows.ContextWindowsManualNode.execute(
        gated,
        4,
        2,
        comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        1,
        False,
        comfy.context_windows.ContextFuseMethods.PYRAMID,
        0,
        False,
    ).args[0]
    batch = latent(6)
    assert tiny.relative_error(raw(windowed, samples=batch), raw(gated, samples=batch)) < 1e-5


def test_packs_that_run_rows_one_by_one_change_no_map(gated):
    def one_by_one(apply_model, arguments):
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]

        def row(value, i):
            return value[i : i + 1] if isinstance(value, torch.Tensor) and len(value) == len(x) else value

        rows = reversed(range(len(x)))
        outputs = [apply_model(row(x, i), row(t, i), **{key: row(c[key], i) for key in c}) for i in rows]
        return torch.cat(outputs[::-1])

    split = gated.clone()
    split.set_model_unet_function_wrapper(one_by_one)
    positive = tiny.cond(1, batch=3)
    assert (
        tiny.relative_error(
            raw(split, positive=positive, samples=latent(3)), raw(gated, positive=positive, samples=latent(3))
        )
        < 1e-5
    )


def test_regional_prompts_count_where_they_draw(gated):
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    own = FlexIPConditioning.execute(M, 0.0, 1.0).args[0]  # all personalization
    both = raw(gated, positive=set_mask(P, left) + set_mask(own, 1 - left))
    first, second = raw(gated), raw(gated, positive=own)
    assert tiny.relative_error(both[..., :4], first[..., :4]) < 1e-5
    assert tiny.relative_error(both[..., 4:], second[..., 4:]) < 1e-5
    assert both[:2, ..., 4:].eq(0).all() and both[:2, ..., :4].min() > 0


def test_a_default_prompt_fills_the_rest(gated):
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    rest = node_helpers.conditioning_set_values(M, {"default": True})
    both = raw(gated, positive=set_mask(P, left) + rest)
    assert tiny.relative_error(both[..., :4], raw(gated)[..., :4]) < 1e-5
    assert tiny.relative_error(both[..., 4:], raw(gated, positive=M)[..., 4:]) < 1e-5


def test_area_prompts_are_laid_into_their_area(gated, monkeypatch):
    """Outside of its area a prompt leaves no trace; inside, what it adds there is at its place."""
    area = nodes.ConditioningSetArea().append(P, 64, 32, 64, 96, 1.0)[0]  # 8 x 4 cells at column 8, row 12
    samples = latent(1, 16, 16)
    blocks = watch_blocks(monkeypatch)
    alone = raw(gated, positive=area, samples=samples, blocks=FINEST, steps=1)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[12:16, 8:16] = False
    assert alone[:, 0, outside].eq(0).all() and alone[:, 0, ~outside].min() > 0
    (block,) = blocks
    assert block.grid == (4, 8)
    branch = block.branches[0, FINEST][1]
    size = maps.added_by(block.q, [(branch, list(range(77)))], block.heads, block.grid).norm(dim=-1)
    inside = alone[2, 0, 12:16, 8:16].flatten()
    assert tiny.relative_error(inside / inside.max(), size[0] / size.max()) < 1e-5
    mixed = raw(gated, positive=area + M, samples=samples, blocks=FINEST)
    assert (
        tiny.relative_error(mixed[:, 0, outside], raw(gated, positive=M, samples=samples, blocks=FINEST)[:, 0, outside])
        < 1e-5
    )


def test_prompts_over_time_count_while_they_are_used(gated):
    setter = nodes.ConditioningSetTimestepRange()
    positive = setter.set_range(P, 0.0, 0.5)[0] + setter.set_range(M, 0.5, 1.0)[0]
    both = raw(gated, positive=positive, steps=2)
    early, late = raw(gated, steps=1, end_percent=0.5), raw(gated, positive=M, steps=1, start_percent=0.5)
    assert tiny.relative_error(both, (early + late) / 2) < 1e-5


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_references_by_region_and_by_batch_item(model, mode):
    network = tiny.tiny_network(model, mode)
    pair = (tiny.tiny_reference(9), tiny.tiny_reference(11, pictures=2))
    regions = torch.zeros(2, 8, 8)
    regions[0, :, :3], regions[1, :, 5:] = 1, 1
    by_region = ReferenceSet(pair, (1.0, 1.0), "one per region", masks=regions)
    result = raw(runtime.attach(model, tiny.link_for(network, by_region)), blocks=FINEST)
    assert result[..., 3:5].eq(0).all() and result[..., :3].min() > 0 and result[..., 5:].min() > 0
    by_item = ReferenceSet(pair, (1.0, 1.0), "one per batch item")
    samples = latent(2)
    together = raw(runtime.attach(model, tiny.link_for(network, by_item)), samples=samples)
    for item, reference in enumerate(pair):
        alone = raw(runtime.attach(model, tiny.link_for(network, reference)), samples=samples)
        assert tiny.relative_error(together[:, item], alone[:, item]) < 1e-5


def test_links_of_a_chain_have_maps_of_their_own(model, network):
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    first = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), 0.7, mask=left, title="one"))
    chain = runtime.attach(
        first, tiny.link_for(tiny.tiny_network(model, seed=5), tiny.tiny_reference(11), 0.2, mask=1 - left, title="two")
    )
    result = raw(chain, blocks=FINEST)
    assert len(result) == 6 and result[:3, ..., 4:].eq(0).all() and result[3:, ..., :4].eq(0).all()
    assert result[:3, ..., :4].min() > 0 and result[3:, ..., 4:].min() > 0
    report = run(chain)[2]
    assert "1 detail: " in report and "2 personalization: " in report and "1: one (gate mode outputs)" in report


# ---- outputs


def test_masks_are_group_major_scaled_together_and_as_large_as_the_picture(gated):
    batch = latent(2, 6, 10)
    sheet, masks, _ = run(gated, samples=batch)
    measured = raw(gated, samples=batch)
    assert masks.shape == (6, 48, 80) and masks.max() == 1 and masks.min() >= 0
    large = torch.nn.functional.interpolate(measured, size=(48, 80), mode="bilinear").flatten(0, 1)
    assert tiny.relative_error(masks, large / large.max()) < 1e-6
    assert len(sheet) == 1 and 4 * 640 < sheet.shape[2] < 5 * 640 and 2 * 384 < sheet.shape[1] < 3 * 384


def test_a_wired_image_is_drawn_on_and_needs_no_vae(gated):
    image = torch.rand(1, node.SHEET, node.SHEET + 8, 4)
    sheet, masks, _ = run(gated, vae=None, image=image, samples=latent(2))
    assert masks.shape == (6, node.SHEET, node.SHEET + 8)
    column = sheet[0, :, 4 : 4 + image.shape[2]]
    rows = (column - image[0, 20, :, :3]).abs().amax(dim=(1, 2)) < 2 / 255
    assert rows.sum() == 2, "the picture stands in both rows of the first column"


@pytest.mark.parametrize("size, shown", [((900, 600), (576, 384)), ((48, 96), (384, 768))], ids=str)
def test_pictures_of_any_size_are_shown_alike_and_masked_in_full(gated, size, shown):
    sheet, masks, _ = run(gated, vae=None, image=torch.rand(1, *size, 3))
    assert masks.shape[1:] == size
    assert 4 * shown[1] < sheet.shape[2] < 4 * shown[1] + 40 and shown[0] < sheet.shape[1] < shown[0] + 80


def test_the_report_says_what_was_looked_at(gated):
    report = run(gated, steps=3, blocks="output, middle")[2]
    sampling = gated.get_model_object("model_sampling")
    sigmas = [sampling.percent_to_sigma(percent) for percent in (1 / 6, 3 / 6, 5 / 6)]
    assert f"(sigma {', '.join(f'{sigma:.3g}' for sigma in sigmas)})" in report
    for part in (
        "detail: ",
        "of what the text adds on average, at most ",
        "3 noise levels (sigma ",
        "gate mode outputs",
    ):
        assert part in report
    blocks = report.split("the blocks ")[1].splitlines()[0]
    addresses = block_levels(gated.model.diffusion_model)
    assert blocks.rstrip(".") == ", ".join(
        dict.fromkeys(a.rpartition(".")[0] for a in addresses if not a.startswith("input"))
    )
    measured = raw(gated, steps=3, blocks="output, middle")
    mean, highest = node.percent(measured[1].mean().item()), node.percent(measured[1].max().item())
    assert f"semantic: {mean} of what the text adds on average, at most {highest}" in report


def test_shares_have_two_digits():
    assert [node.percent(share) for share in (0.0021, 0.049, 0.226, 1.0, 1.3)] == [
        "0.2%",
        "4.9%",
        "23%",
        "100%",
        "130%",
    ]


def test_only_levels_at_which_a_link_acts_are_averaged(model, network):
    half = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), end_percent=0.5))
    assert "2 noise levels" in run(half, steps=4)[2]
    assert torch.equal(raw(half, steps=4), raw(half, steps=2, end_percent=0.5))
