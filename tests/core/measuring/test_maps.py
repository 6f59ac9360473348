"""Attention maps against loops over heads, places and tokens, without ComfyUI."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.files.ip_adapter import IPAdapterPair
from flexip_core.measuring import maps
from flexip_core.measuring.maps import Block, MapMean, Word
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.network.attention import Branch, decoupled_attention
from flexip_core.network.config import ClipConfig, DinoConfig, FlexIPConfig, ResamplerConfig
from flexip_core.network.gate import Place, gated_branches
from flexip_core.run.chain import Call, Entry, Link, Own, Row, Setting
from flexip_core.run.reference import Reference, ReferenceSet
from flexip_core.run.run import LinkRun, Run

ADDRESSES = ["input.1.0", "input.4.0", "input.10.0", "middle.0.0", "middle.0.1", "output.3.0", "output.11.0"]
HEADS, GRID = 2, (3, 2)
CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- what a group adds


def naive_weights(q, k, heads):
    """(b, h, n, m) by loops"""
    b, n, c = q.shape
    d = c // heads
    out = torch.zeros(b, heads, n, k.shape[1])
    for row in range(b):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(n):
                scores = torch.stack([q[row, i, part] @ key / math.sqrt(d) for key in k[row, :, part]])
                out[row, h, i] = scores.exp() / scores.exp().sum()
    return out


def naive_added(q, k, v, tokens, heads):
    """(b, n, c): sum over `tokens` of their weight times their value"""
    weights, d = naive_weights(q, k, heads), q.shape[2] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for token in tokens:
            out[..., part] += weights[:, h, :, token, None] * v[:, None, token, part]
    return out


def test_attention_weights_are_the_mean_softmax_of_the_heads():
    q, k = randn(2, 6, 12), randn(2, 5, 12, seed=1)
    torch.testing.assert_close(maps.attention_weights(q, k, 3), naive_weights(q, k, 3).mean(dim=1))


def test_attention_weights_hold_only_a_chunk_of_the_queries_at_a_time(monkeypatch):
    q, k = randn(2, 37, 12), randn(2, 5, 12, seed=1)
    whole, sizes, softmax = maps.attention_weights(q, k, 3), [], torch.softmax
    monkeypatch.setattr(maps, "CHUNK", 2 * 3 * 5 * 4)
    monkeypatch.setattr(torch, "softmax", lambda t, dim: (sizes.append(t.numel()), softmax(t, dim))[1])
    torch.testing.assert_close(maps.attention_weights(q, k, 3), whole)
    assert len(sizes) == 10 and max(sizes) == maps.CHUNK


def test_attention_weights_of_half_precision_are_computed_in_float32():
    q, k = randn(1, 6, 12).half(), randn(1, 5, 12, seed=1).half()
    got = maps.attention_weights(q, k, 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(1, 6))


ONE_ROW = (Row(0, 0),)


def block_of(branches, rows=ONE_ROW, address="input.1.0", seed=5):
    b = len(rows)
    q, k, v = randn(b, 6, 8, seed=seed), randn(b, 4, 8, seed=seed + 1), randn(b, 4, 8, seed=seed + 2)
    return Block(address, q, k, v, HEADS, GRID, tuple(rows), branches)


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_a_share_is_the_size_of_the_addition_over_the_mean_size_of_the_texts(gate):
    preservation = Branch(randn(1, 3, 8, seed=1), randn(1, 3, 8, seed=2))
    personalization = Branch(randn(1, 5, 8, seed=3), randn(1, 5, 8, seed=4))
    place = Place(strength=torch.rand(1, *GRID, generator=torch.Generator().manual_seed(9)))
    branches = gated_branches("outputs", (gate,), (1.5,), preservation, personalization, place=place)
    block = block_of({})
    got = maps.shares_added(block, [[(branches[0], [0, 2])], [(branches[0], [1])], [(branches[1], list(range(5)))]])
    text = naive_added(block.q, block.k, block.v, range(4), HEADS).norm(dim=-1).mean()
    for number, (branch, factor, tokens) in enumerate(
        [(preservation, gate, [0, 2]), (preservation, gate, [1]), (personalization, 1 - gate, range(5))]
    ):
        added = 1.5 * factor * naive_added(block.q, branch.k, branch.v, tokens, HEADS)
        expected = added.norm(dim=-1) * place.strength.flatten(1) / text
        torch.testing.assert_close(got[:, number], expected)


@given(
    mode=st.sampled_from(["outputs", "tokens"]),
    mask=st.sampled_from([None, "exists", "bias"]),
    strength_map=st.booleans(),
    gate_map=st.booleans(),
    gates=st.lists(st.floats(0, 1), min_size=1, max_size=2),
)
def test_what_the_groups_add_sums_to_what_the_branch_adds(mode, mask, strength_map, gate_map, gates):
    masks = {
        None: None,
        "exists": torch.tensor([True, False, True]).view(1, 1, 1, 3).expand(2, -1, -1, -1),
        "bias": torch.tensor([0.0, 0.7, -1.0]).view(1, 1, 1, 3).expand(2, -1, -1, -1),
    }
    preservation = Branch(randn(2, 3, 8, seed=1), randn(2, 3, 8, seed=2), masks[mask])
    personalization = Branch(randn(2, 5, 8, seed=3), randn(2, 5, 8, seed=4))
    maps_of_place = torch.rand(2, 1, *GRID, generator=torch.Generator().manual_seed(9))
    place = Place(maps_of_place[0] if strength_map else None, maps_of_place[1] if gate_map else None)
    branches = gated_branches(mode, tuple(gates), (1.5,), preservation, personalization, place=place)
    q = randn(2, 6, 8, seed=5)
    total = decoupled_attention(torch.zeros_like(q), q, branches, HEADS, GRID)
    parts = [
        maps.added_by(q, [(branch, tokens)], HEADS, GRID)
        for branch in branches
        for tokens in (list(range(0, branch.k.shape[1], 2)), list(range(1, branch.k.shape[1], 2)))
    ]
    torch.testing.assert_close(sum(parts), total)


def test_nothing_added_is_no_map_and_a_silent_text_does_not_divide_by_zero():
    block = block_of({})
    assert maps.shares_added(block, [[], []]) is None
    branch = Branch(randn(1, 3, 8, seed=1), randn(1, 3, 8, seed=2))
    silent = block._replace(v=torch.zeros_like(block.v))
    assert maps.shares_added(silent, [[(branch, [0])], []]).eq(0).all()


# ---- which tokens are whose


def config(mode="outputs"):
    return FlexIPConfig(
        base="test",
        text_width=20,
        blocks={"input.1.0": 8, "middle.0.0": 16},
        gate_mode=mode,
        clip=ClipConfig("c", 10),
        dino=DinoConfig("d", 14, 28),
        resampler=ResamplerConfig(width=24, depth=1, heads=3, dim_head=4, ff_mult=2),
        detail_tokens=5,
        semantic_tokens=2,
        cls_tokens=3,
    )


def network_of(mode):
    torch.manual_seed(3)
    return FlexIPNetwork(config(mode)).eval().requires_grad_(False)


def reference_of(seed, pictures=1):
    features = {"cls": randn(pictures, 10, seed=seed), "patches": randn(pictures, 4, 14, seed=seed + 1)}
    return Reference(features, {name: torch.zeros_like(value) for name, value in features.items()}, "test")


def test_token_groups_find_semantic_and_detail_of_every_picture():
    network = network_of("outputs")
    features = reference_of(1, pictures=3).features
    tokens = network.tokens("preservation", features)[0]
    groups = network.token_groups("preservation", len(tokens))
    adapter = network.preservation
    semantic = adapter.semantic(adapter.cls_in(features["cls"]).unflatten(1, (-1, 24)), features["patches"])
    detail = adapter.detail(adapter.queries.expand(3, -1, -1), features["patches"])
    torch.testing.assert_close(tokens[groups["semantic"]], semantic.flatten(0, 1))
    torch.testing.assert_close(tokens[groups["detail"]], detail.flatten(0, 1))
    assert list(network.token_groups("preservation", 0)) == ["detail", "semantic"]
    assert network.token_groups("personalization", 4) == {"personalization": [0, 1, 2, 3]}
    assert IPAdapterPair.token_groups(None, "preservation", 2) == {"preservation": [0, 1]}


REFERENCES = {
    "one": reference_of(1),
    "three pictures": reference_of(1, 3),
    "concatenated": ReferenceSet((reference_of(1), reference_of(3, 2)), (1.0, 0.5)),
    "one left out": ReferenceSet((reference_of(1), reference_of(3, 2)), (0.0, 1.0)),
    "averaged": ReferenceSet((reference_of(1), reference_of(3)), (1.0, 3.0), "average"),
    "per item": ReferenceSet((reference_of(1), reference_of(3, 2)), (1.0, 1.0), "one per batch item"),
    "regions": ReferenceSet(
        (reference_of(1), reference_of(3, 2)), (1.0, 1.0), "one per region", masks=torch.ones(2, 6, 4).tril()
    ),
}


def run_of(link, texts, own=None):
    """A run of two latents of 6 x 4, one entry per text; the last entry brings `own` along."""
    setting = Setting(batch=2, height=6, width=4, levels={"input.1.0": 1, "middle.0.0": 1})
    run = Run([LinkRun(link, 0, 1e9, 0.0, setting)])
    entries = [Entry(text, null=False) for text in texts]
    if own is not None:
        entries[-1] = Entry(texts[-1], False, {0: Own(own, (0.6,), 1.0)})
    run.prepare(entries, torch.float32, lambda link: CPU)
    rows = tuple(Row(entry, item) for entry in range(len(texts)) for item in range(2))
    return run, rows, run.assemble(Call(rows, 6, 4, CPU, torch.float32), None)[0]


@pytest.mark.parametrize("own", [None, reference_of(7, 4)], ids=["own off", "own on"])
@pytest.mark.parametrize("reference", list(REFERENCES))
@pytest.mark.parametrize("silenced", ["preservation", "personalization"])
@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_every_token_is_counted_to_the_adapter_that_made_it(mode, silenced, reference, own):
    """With to_v = 0 in one adapter its groups add nothing, the other's all there is."""
    network = network_of(mode)
    for address in network.block_widths:
        network.projection(address, silenced).to_v.weight.zero_()
    link = Link(network, None, REFERENCES[reference], (0.6,))
    run, rows, branches = run_of(link, [randn(1, 4, 20, seed=11), randn(1, 7, 20, seed=12)], own)
    block = block_of(branches, rows)
    groups = maps.adapter_groups([link])
    got = maps.measure_adapters(list(groups))(run.links, block)
    assert list(groups.values()) == ["detail", "semantic", "personalization"] and got.shape == (4, 3, 6)
    largest = dict(zip(groups.values(), got.amax(dim=(0, 2)).tolist()))
    acting = {"preservation": ["personalization"], "personalization": ["detail", "semantic"]}[silenced]
    assert all((value > 1e-3) == (name in acting) and (name in acting or value == 0) for name, value in largest.items())


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_words_of_the_personalization_adapter_are_those_of_the_text(mode):
    """All words together add what the adapter adds, for a shorter text beside a longer one, and for several references."""
    network = network_of(mode)
    link = Link(network, None, REFERENCES["concatenated"], (0.2,))
    run, rows, branches = run_of(link, [randn(1, 4, 20, seed=11), randn(1, 7, 20, seed=12)])
    block = block_of(branches, rows)
    alone = maps.measure_adapters(list(maps.adapter_groups([link])))(run.links, block)[:, 2:]
    for text, entry_rows in ((4, slice(0, 2)), (7, slice(2, 4))):
        together = maps.measure_words_added([range(text)], text)(run.links, block)
        torch.testing.assert_close(together[entry_rows], alone[entry_rows])
        single = maps.measure_words_added([[0], [1]], text)(run.links, block)
        assert (single[entry_rows].sum(dim=1) < together[entry_rows, 0] * 3).all() and single.gt(0).all()


def test_depth_takes_an_adapter_out_of_a_block_and_keeps_the_other_apart():
    network = network_of("outputs")
    depth = {
        "preservation": {"input.1.0": 0.0, "middle.0.0": 0.0},
        "personalization": {"input.1.0": 1.0, "middle.0.0": 0.0},
    }
    link = Link(network, None, REFERENCES["regions"], (0.6,), depth=depth)
    run, rows, branches = run_of(link, [randn(1, 4, 20, seed=11)])
    measure = maps.measure_adapters(list(maps.adapter_groups([link])))
    got = measure(run.links, block_of(branches, rows))
    assert got[:, :2].eq(0).all() and got[:, 2].max() > 1e-3
    assert measure(run.links, block_of(branches, rows, "middle.0.0")) is None


def test_groups_of_a_chain_carry_the_number_of_their_link_and_silent_links_have_none():
    network = network_of("outputs")
    links = [Link(network, None, REFERENCES["one"], (0.6,), strength) for strength in (1.0, 0.0, 0.5)]
    assert list(maps.adapter_groups(links).items()) == [
        ((0, "detail"), "1 detail"),
        ((0, "semantic"), "1 semantic"),
        ((0, "personalization"), "1 personalization"),
        ((2, "detail"), "3 detail"),
        ((2, "semantic"), "3 semantic"),
        ((2, "personalization"), "3 personalization"),
    ]
    assert list(maps.adapter_groups(links[1:]).values()) == ["detail", "semantic", "personalization"]


def test_words_get_their_share_of_the_texts_softmax():
    block = block_of({})
    weights = naive_weights(block.q, block.k, HEADS).mean(dim=1)
    got = maps.measure_words([[1], [0, 3]], 4)((), block)
    torch.testing.assert_close(got[:, 0], weights[..., 1])
    torch.testing.assert_close(got[:, 1], weights[..., 0] + weights[..., 3])
    torch.testing.assert_close(maps.measure_words([range(4)], 4)((), block), torch.ones(1, 1, 6))


def test_a_text_repeated_to_the_length_of_a_longer_one_keeps_its_shares():
    block = block_of({})
    repeated = block._replace(k=block.k.repeat(1, 3, 1), v=block.v.repeat(1, 3, 1))
    words = [[1], [0, 3]]
    torch.testing.assert_close(maps.measure_words(words, 4)((), repeated), maps.measure_words(words, 4)((), block))


# ---- from blocks to one map


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_a_map_laid_over_the_latent_keeps_constants_and_places(height, width, level):
    side = 2**level
    rows, columns = -(-height // side), -(-width // side)
    constant = maps.on_latent(torch.full((1, 1, rows, columns), 0.7), height, width)
    assert constant.shape == (1, 1, height, width)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7))
    grid = randn(1, 1, rows, columns)
    over = maps.on_latent(grid, height, width)[0, 0]
    if side == 1:
        torch.testing.assert_close(over, grid[0, 0])
    else:  # the cells in the middle of a token have its value, nearly: they are half a cell off
        top = [row * side + side // 2 - 1 for row in range(rows) if (row + 1) * side <= height]
        left = [column * side + side // 2 - 1 for column in range(columns) if (column + 1) * side <= width]
        near = over[top][:, left] - grid[0, 0, : len(top), : len(left)]
        assert near.numel() == 0 or near.abs().max() <= 2 * grid.abs().max() * (1 / side)


def test_a_block_run_at_another_size_is_stretched_over_the_latent():
    ramp = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 5, 6)
    over = maps.on_latent(ramp, 16, 20)[0, 0]
    assert over.shape == (16, 20) and over[0].diff().ge(0).all() and over[3, 0] == 0 and over[3, -1] == 5


def whole(value, groups=1, size=(2, 3)):
    return torch.full((1, groups, *size), float(value))


def test_maps_are_averaged_over_blocks_and_levels():
    mean = MapMean(2, 2, 2, 3)
    weights = {0: torch.ones(2, 2, 3)}
    for value, item in ((1, 0), (4, 0), (7, 1)):
        assert mean.add(whole(value, 2), [Row(0, item)], 2, 3, weights)
    result = mean.result()
    assert result.shape == (2, 2, 2, 3)
    assert result[:, 0].eq(2.5).all() and result[:, 1].eq(7).all()


def test_prompts_count_where_they_count_in_the_picture():
    mean = MapMean(1, 1, 2, 3)
    left = torch.zeros(1, 2, 3)
    left[..., 0] = 1.0
    mean.add(torch.cat([whole(5), whole(9)]), [Row(0, 0), Row(1, 0)], 2, 3, {0: left, 1: 1 - 0.5 * left})
    result = mean.result()[0, 0]
    torch.testing.assert_close(result[:, 0], torch.full((2,), (5 + 0.5 * 9) / 1.5))
    assert result[:, 1:].eq(9).all()


def test_parts_of_the_picture_go_to_their_places_and_overlap_as_a_mean():
    mean = MapMean(1, 1, 2, 4)
    weights = {0: torch.ones(1, 2, 4)}
    rows = (0, 1)
    mean.add(whole(2, size=(2, 3)), [Row(0, 0, (rows, (0, 1, 2)))], 2, 3, weights)
    mean.add(whole(6, size=(2, 2)), [Row(0, 0, (rows, (2, 3)))], 2, 2, weights)
    assert mean.result()[0, 0].tolist() == [[2, 2, 4, 6]] * 2


def test_unknown_tiles_and_prompts_that_do_not_count_leave_nothing():
    mean = MapMean(1, 1, 2, 4)
    assert not mean.add(whole(2, size=(2, 3)), [Row(0, 0)], 2, 3, {0: torch.ones(1, 2, 4)})
    assert not mean.add(whole(2, size=(2, 4)), [Row(1, 0)], 2, 4, {0: torch.ones(1, 2, 4)})
    assert mean.result().eq(0).all()


# ---- blocks, words, colours


@pytest.mark.parametrize(
    "text, expected",
    [
        ("all", ADDRESSES),
        ("input.1", ["input.1.0"]),
        ("OUTPUT, middle.0.1;input.10", ["input.10.0", "middle.0.1", "output.3.0", "output.11.0"]),
        ("middle\nall", ADDRESSES),
    ],
)
def test_blocks_are_chosen_by_their_beginning(text, expected):
    assert maps.choose_blocks(text, ADDRESSES) == tuple(expected)


@pytest.mark.parametrize(
    "text, message",
    [("", "blocks is empty"), (" , ", "blocks is empty"), ("output.4", "'output.4'.*blocks are input.1, ")],
)
def test_a_block_that_the_model_does_not_have_is_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        maps.choose_blocks(text, ADDRESSES)


PROMPT = [Word("a", (1,)), Word("red", (2,)), Word("fox", (3, 4)), Word(",", (5,)), Word("a", (6,)), Word("fox", (7,))]


def test_a_word_is_all_its_occurrences_and_punctuation_is_none():
    assert maps.every_word(PROMPT) == {"a": [1, 6], "red": [2], "fox": [3, 4, 7]}


def test_chosen_words_stand_together_in_the_prompt():
    wanted = {"red fox": ["red", "fox"], "fox": ["fox"], "fox,": ["fox", ","]}
    assert maps.chosen_words(PROMPT, wanted) == {"red fox": [2, 3, 4], "fox": [3, 4, 7], "fox,": [3, 4, 5]}
    for parts in (["dog"], ["fox", "red"], []):
        with pytest.raises(ValueError, match="words has 'dog'.*its words are a, red, fox"):
            maps.chosen_words(PROMPT, {"dog": parts})


def test_words_are_split_at_commas_and_lines():
    assert maps.split_words(" cat,  red  hat\n, cat，dog;") == ["cat", "red hat", "dog"]
    assert maps.split_words(" ,\n") == []
