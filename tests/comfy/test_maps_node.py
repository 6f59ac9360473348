"""FlexIPAttentionMaps: what it shows is what FlexIP adds, and the model it looks at never notices."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import comfy.context_windows
import comfy.model_management as mm
import comfy.sd1_clip
import comfy.sdxl_clip
import latent_preview
import node_helpers
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfy_extras import nodes_context_windows, nodes_pag
from flexip_pack.flexip_core import maps, unet
from flexip_pack.flexip_core.attention import GatedAttention
from flexip_pack.flexip_core.ip_adapter import IPAdapterPair
from flexip_pack.flexip_core.reference import ReferenceSet
from flexip_pack.nodes import look, runtime
from flexip_pack.nodes import maps as node
from flexip_pack.nodes.maps import FlexIPAttentionMaps
from flexip_pack.nodes.own import FlexIPConditioning

import nodes

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counters import count

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
    assert {block.address for block in blocks} == set(unet.block_levels(gated.model.diffusion_model))
    for block in blocks:
        patch = GatedAttention(block.address, 0, runtime.base_attention)
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


def set_mask(conditioning, mask):
    return nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]


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


# ---- words


def test_words_of_a_prompt_with_weights_chunks_and_repeats(clip):
    words, length = node.tokenized(clip, "A (red:1.3) fox, the sleepiest fox")
    assert length == 77
    assert [word.text for word in words] == ["a", "red", "fox", ",", "the", "sleepiest", "fox"]
    assert words[0].tokens == (1,) and len(words[5].tokens) > 1
    spelled = [token for word in words for token in word.tokens]
    assert spelled == list(range(1, len(spelled) + 1))


def test_words_of_a_long_prompt_lie_in_chunks_of_77(clip):
    text = ", ".join(f"word{'abcdefghij'[i % 10]}" for i in range(60)) + ", zebra"
    words, length = node.tokenized(clip, text)
    (zebra,) = [word for word in words if word.text == "zebra"]
    chunks = clip.tokenize(text)["l"]
    assert length == 77 * len(chunks) and len(chunks) > 1
    ids = [token for chunk in chunks for token, _ in chunk]
    assert clip.tokenizer.clip_l.decode([ids[place] for place in zebra.tokens]).strip() == "zebra"
    assert all(ids[place] not in (49406, 49407) for word in words for place in word.tokens)


def test_words_in_other_scripts_are_readable(clip):
    words, _ = node.tokenized(clip, "ein Mädchen, 猫")
    assert [word.text for word in words] == ["ein", "mädchen", ",", "猫"]


def test_embeddings_are_words_of_their_own(tmp_path):
    torch.save({"emb_params": torch.randn(3, 768)}, tmp_path / "style.pt")
    torch.save({"emb_params": torch.randn(2, 768)}, tmp_path / "other.pt")
    clip = FakeClip(embedding_directory=str(tmp_path))
    words, length = node.tokenized(clip, "a embedding:style embedding:other cat")
    found = {word.text: word.tokens for word in words}
    assert length == 77 and found == {"a": (1,), "embedding 1": (2, 3, 4), "embedding 2": (5, 6), "cat": (7,)}


def test_sdxl_and_sd15_find_the_same_words():
    text = "A (red:1.3) fox, sleepiest"
    assert node.tokenized(FakeClip(comfy.sdxl_clip.SDXLTokenizer), text) == node.tokenized(FakeClip(), text)


def test_word_maps_are_the_texts_own_attention(gated, clip, monkeypatch):
    blocks = watch_blocks(monkeypatch)
    result = raw(gated, "words", clip=clip, prompt="a red fox", steps=1, blocks=FINEST)
    (block,) = blocks
    for place, got in enumerate(result, start=1):
        one = torch.zeros_like(block.v)
        one[:, place] = 1.0  # in every channel of every head: the softmax's weight itself
        weights = tiny.naive_softmax(block.q[0], block.k[0], one[0], block.heads).mean(dim=1)
        torch.testing.assert_close(got[0].flatten(), weights, rtol=1e-4, atol=1e-7)


def test_the_maps_of_all_words_leave_room_for_start_end_and_padding(gated, clip):
    letters = "abcdefghijklmnopqrst"
    result = raw(gated, "words", clip=clip, prompt=", ".join(letters))
    assert len(result) == 20 and result.min() > 0 and result.sum(dim=0).max() < 1


def test_chosen_words_and_phrases(gated, clip):
    prompt = "a red fox in a (red hat:1.2)"
    every = dict(zip(("a", "red", "fox", "in", "hat"), raw(gated, "words", clip=clip, prompt=prompt)))
    chosen = raw(gated, "words", clip=clip, prompt=prompt, words="Fox, red hat")
    assert len(chosen) == 2 and torch.equal(chosen[0], every["fox"])
    assert (chosen[1] > every["hat"]).all() and (chosen[1] < every["hat"] + every["red"]).all()


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_words_of_the_personalization_adapter(model, clip, mode):
    link = tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference(), 0.3)
    gated = runtime.attach(model, link)
    words = raw(gated, "words (personalization)", clip=clip, prompt="a red fox", blocks=FINEST)
    whole = raw(gated, blocks=FINEST)[2]
    assert len(words) == 3 and words.min() > 0 and words.sum(dim=0).max() < 3 * whole.max()
    none = raw(
        runtime.attach(model, tiny.link_for(link.network, link.reference, 1.0)),
        "words (personalization)",
        clip=clip,
        prompt="a red fox",
        blocks=FINEST,
    )
    assert none.eq(0).all()


def test_words_are_those_of_the_first_prompt(gated, clip):
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    # the second text is longer, so core repeats the first one's tokens in the call
    both = set_mask(P, left) + set_mask(tiny.cond(4, tokens=154), 1 - left)
    result = raw(gated, "words", positive=both, clip=clip, prompt="a fox")
    assert result[..., 4:].eq(0).all()
    assert tiny.relative_error(result[..., :4], raw(gated, "words", clip=clip, prompt="a fox")[..., :4]) < 1e-5


def test_words_can_be_looked_at_with_strength_zero(model, network, clip):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), strength=0.0))
    sheet, masks, report = run(gated, "words", clip=clip, prompt="a red fox")
    assert masks.max() == 1 and "strength 0" in report and sheet.shape[0] == 1


def test_only_some_words_of_a_long_prompt_are_shown(gated, clip):
    prompt = " ".join(f"{a}{b}" for a in "bcdfgh" for b in "aeiouy")
    sheet, masks, report = run(gated, "words", clip=clip, prompt=prompt, positive=tiny.cond(1, tokens=154))
    assert len(masks) == node.MOST_WORDS and "36 different words, and the first 32 are shown" in report
    assert sheet.shape[2] < 7 * node.SHEET and sheet.shape[1] > 6 * node.SHEET, "33 columns in bands of 6"


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
    addresses = unet.block_levels(gated.model.diffusion_model)
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


# ---- nothing else changes


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
    original = look.Looker.predict_noise
    monkeypatch.setattr(
        look.Looker, "predict_noise", lambda self, *a: (outputs.append(original(self, *a)), outputs[-1])[1]
    )
    run(gated, steps=2)
    recorded = list(outputs)
    monkeypatch.setattr(look.Recorder, "see", lambda self, out, q, k, v, options, address: 0)
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

    def keep(self, *args, original=look.Recorder.__init__, **kwargs):
        kept.append(weakref.ref(self))
        original(self, *args, **kwargs)

    monkeypatch.setattr(look.Recorder, "__init__", keep)
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
        lambda q, k, v, options: runtime.base_attention(q, k, v, options["n_heads"]), "input", 1, 0
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
    with pytest.raises(
        ValueError, match="FlexIPAttentionMaps: the model has no FlexIP gate. Wire the model from Apply"
    ):
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
    blocks = list(unet.block_levels(model.model.diffusion_model))
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
        c = {key: value for key, value in arguments["c"].items() if key not in (look.VIEW, "flexip_view")}
        x = arguments["input"]
        return torch.cat([apply_model(half, arguments["timestep"], **c) for half in x.chunk(2, dim=3)], dim=3)

    tiled = gated.clone()
    tiled.set_model_unet_function_wrapper(tiling)
    with pytest.raises(ValueError, match="shows the model tiles without saying"):
        run(tiled)
