"""A run's parts: whatever calls come in whatever order, each gets the tensors that it would get alone, under an honest name."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_run import CPU, HEADS, LEVELS, NETWORKS, WIDTH, Network, mask, randn, reference

from flexip_core.network.attention import (
    Branch,
    attention,
    block_grid,
    decoupled_attention,
    per_token,
    place_gated_attention,
)
from flexip_core.network.gate import Place, gated_branches, join_masks, stack_rows
from flexip_core.run import lru
from flexip_core.run import run as core_run
from flexip_core.run.chain import Call, Entry, Link, Own, Row, Setting
from flexip_core.run.layout import folded
from flexip_core.run.projection import text_key
from flexip_core.run.reference import COMBINE, ReferenceSet, combined
from flexip_core.run.run import LAYOUTS, LinkRun, Run
from flexip_core.run.schedule import GateBatch, GateCurve

BATCH, HEIGHT, LATENT_WIDTH = 3, 4, 5
REFERENCES = [reference(1), reference(2, 2), reference(3)]
ONE_PICTURE_EACH = (REFERENCES[0], reference(4), REFERENCES[2])
SETS = [
    REFERENCES[0],
    REFERENCES[1],
    *(
        ReferenceSet(
            ONE_PICTURE_EACH if combine == "average" else tuple(REFERENCES),
            (1.0, 2.0, 0.0),
            combine,
            mask(4, 3, 6, 6) if combine == "one per region" else None,
        )
        for combine in COMBINE
    ),
    ReferenceSet((REFERENCES[2],), (1.0,), "concatenate", None, REFERENCES[1]),
    ReferenceSet(tuple(REFERENCES[:2]), (0.5, 1.0), "one per region", mask(7, 2, 5, 5)),
]
CURVE = GateCurve(((0.0, 1.0), (1.0, 0.0)), "falling")
GATES = [(0.6,), (0.1, 0.5, 0.9), CURVE, GateBatch((0.2, 0.8), "repeat"), GateBatch((0.0, 1.0), "interpolate")]
MASKS = [None, mask(5, 1, 8, 10), mask(6, 2, 3, 3), torch.ones(1, 1, 1)]
DEPTHS = [
    None,
    {"preservation": {"input.1.0": 0.0, "middle.0.0": 1.0}, "personalization": dict.fromkeys(LEVELS, 1.0)},
    {"preservation": dict.fromkeys(LEVELS, 1.0), "personalization": {"input.1.0": 0.0, "middle.0.0": 1.0}},
    {"preservation": dict.fromkeys(LEVELS, 0.5), "personalization": {"input.1.0": 0.0, "middle.0.0": 2.0}},
    {name: {"input.1.0": 0.0, "middle.0.0": 1.0} for name in Network.adapters},
    {name: dict.fromkeys(LEVELS, 0.0) for name in Network.adapters},
]
LINKS = st.builds(
    Link,
    network=st.sampled_from(list(NETWORKS.values())),
    patcher=st.none(),
    reference=st.sampled_from(SETS),
    gates=st.sampled_from(GATES),
    strength=st.sampled_from([0.5, 1.0]),
    mask=st.sampled_from(MASKS),
    gate_mask=st.sampled_from(MASKS),
    depth=st.sampled_from(DEPTHS),
)
OWNS = st.builds(
    Own,
    st.sampled_from([None, *SETS]),
    st.sampled_from([gates for gates in GATES if gates != GATES[1]]),
    st.sampled_from([0.0, 1.5]),
)
THREE_REGIONS = Link(NETWORKS["outputs"], None, next(s for s in SETS[2:] if s.masks is not None), (0.4,))
SETTING = Setting(batch=BATCH, height=HEIGHT, width=LATENT_WIDTH, levels=LEVELS, percent_of=lambda sigma: 1 - sigma)
VIEW = ((1, 2, 3), (0, 2))
ROWS = st.tuples(st.integers(0, 2), st.integers(0, BATCH - 1))
CALLS = st.tuples(st.lists(ROWS, min_size=1, max_size=4), st.booleans())
SIGMAS = st.sampled_from([0.0, 0.25, 0.7, 1.0])


def entries(owns=({}, {}, {})):
    """A positive, a longer positive with a text per latent, and a negative."""
    texts = randn(21, 1, 3, WIDTH), randn(22, BATCH, 5, WIDTH), randn(23, 1, 3, WIDTH)
    return [Entry(text, number == 2, own) for number, (text, own) in enumerate(zip(texts, owns))]


def run_of(links, owns=({}, {}, {})):
    run = Run([LinkRun(link, position, 1.0, 0.0, SETTING) for position, link in enumerate(links)])
    run.prepare(entries(owns), torch.float32, lambda link: CPU)
    return run


def call_of(rows, cropped):
    height, width = (3, 2) if cropped else (HEIGHT, LATENT_WIDTH)
    whole = tuple(range(HEIGHT)), tuple(range(LATENT_WIDTH))
    return Call(tuple(Row(*row, VIEW if cropped else whole) for row in rows), height, width, CPU, torch.float32)


def added(branches, call, row=None):
    """What the blocks add to the same queries for every row: {(position, address): (rows or 1, n, c)}."""
    out = {}
    for key, parts in branches.items():
        grid = tuple(math.ceil(side / 2 ** LEVELS[key[1]]) for side in (call.height, call.width))
        q = randn(30, 1, grid[0] * grid[1], WIDTH).expand(len(call.rows), -1, -1)
        out[key] = decoupled_attention(torch.zeros_like(q), q, parts, HEADS, grid)
    return out


@given(LINKS, st.tuples(*[st.one_of(st.just({}), st.builds(lambda own: {0: own}, OWNS))] * 3), CALLS, SIGMAS)
@example(THREE_REGIONS, ({0: Own(SETS[-1], (0.6,), 1.0)}, {}, {}), ([(0, 0), (1, 1), (2, 0)], True), 0.7)
def test_each_row_of_a_call_gets_what_it_would_get_alone(link, owns, call, sigma):
    """Its own reference, gate, strength, text and masks, with whatever it shares a call, in any order."""
    rows, cropped = call
    run = run_of([link], owns)
    whole = call_of(rows, cropped)
    together = added(run.assemble(whole, sigma)[0], whole)
    for number, row in enumerate(rows):
        single = call_of([row], cropped)
        alone = added(run_of([link], owns).assemble(single, sigma)[0], single)
        assert alone.keys() == together.keys()
        for key in alone:
            torch.testing.assert_close(together[key][number], alone[key][0], rtol=1e-4, atol=1e-5)


@given(
    st.lists(LINKS, min_size=1, max_size=2),
    st.lists(st.tuples(CALLS, SIGMAS), min_size=2, max_size=8),
    st.sampled_from([0, lru.ROOM]),
)
def test_no_call_gets_what_was_kept_for_another(links, calls, room):
    run = run_of(links)
    for call, sigma in calls:
        call = call_of(*call)
        with mock.patch.object(lru, "ROOM", room):
            got, name = run.assemble(call, sigma)
        expected, fresh = run_of(links).assemble(call, sigma)
        assert name == fresh and got.keys() == expected.keys()
        for key in got:
            for a, b in zip(got[key], expected[key], strict=True):
                assert all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b))
    assert room or all(len(link._layouts) <= LAYOUTS for link in run.links)


def test_layouts_that_come_in_turns_are_assembled_once(monkeypatch):
    """Eight areas or context windows, step after step; without room the last used four stay."""
    link = Link(NETWORKS["outputs"], None, REFERENCES[0], (0.4,))
    calls = [call_of([(0, item)], False) for item in range(2 * LAYOUTS)]
    for room, expected in ((lru.ROOM, len(calls)), (0, 3 * len(calls))):
        monkeypatch.setattr(lru, "ROOM", room)
        run, made = run_of([link]), []
        monkeypatch.setattr(core_run, "folded", lambda *a, made=made, **kw: (made.append(a), folded(*a, **kw))[1])
        for call in 3 * calls:
            run.assemble(call, None)
        assert len(made) == expected


def test_a_mask_is_an_object_of_its_own_in_every_branch():
    """torch.compile would make one input of a tensor that it meets twice, and go on doing so when they differ."""
    run = run_of([Link(NETWORKS["outputs"], None, REFERENCES[0], (0.4,), mask=MASKS[1])])
    branches, _ = run.assemble(call_of([(0, 0), (2, 0)], False), None)
    places = [branch.place for parts in branches.values() for branch in parts]
    assert len(places) == len({id(place) for place in places}) == 2 * len(LEVELS)


def test_what_is_kept_is_bounded_by_bytes_and_the_last_used_stay(monkeypatch):
    entry = lru.ENTRY
    monkeypatch.setattr(lru, "ROOM", 100 * entry)
    values = lru.Lru(least=2)

    def put(key, size):
        values.make_room(key)
        values.put(key, key, size * entry)

    for key, size in (("a", 40), ("b", 40), ("c", 30)):
        put(key, size)
    assert values.get("a") == "a" and len(values) == 3 and values.bytes == 110 * entry
    put("d", 20)
    assert [values.get(key) for key in "abcd"] == ["a", None, "c", "d"] and values.bytes == 90 * entry
    put("a", 1000)  # in place of its own
    assert len(values) == 3 and values.bytes == 1050 * entry
    put("e", 0)  # an entry it is nevertheless
    assert [values.get(key) for key in "acde"] == ["a", None, None, "e"]


def structure(branches):
    """All that a compiled graph takes for granted, but the batch and the size of the image, which it reads off x.

    Also which tensors are one object: a graph has one input for them.
    """
    objects: dict[int, int] = {}
    return {key: [_structure(part, objects) for part in parts] for key, parts in branches.items()}


def _structure(part, objects):
    out = {}
    for name, t in part._asdict().items():
        if t is not None:
            rows = min(t.shape[0], 2) if name.startswith("place") else None
            out[name] = t.dtype, t.dim(), t.shape[1] if name in "kv" else rows, objects.setdefault(id(t), len(objects))
    return out


@given(LINKS, LINKS, CALLS, SIGMAS)
def test_runs_of_one_name_have_one_structure(first, second, call, sigma):
    """torch.compile goes by the name alone."""
    rows, cropped = call
    call = call_of(rows, cropped)
    (a, name), (b, other) = run_of([first]).assemble(call, sigma), run_of([second]).assemble(call, sigma)
    if first.network is second.network and structure(a) != structure(b):
        assert name != other


@given(LINKS, CALLS, SIGMAS)
def test_another_gate_strength_or_seed_keeps_the_name(link, call, sigma):
    """Nothing is compiled again for a number. (A gate of a row that differs from the others is another structure at most in its maps.)"""
    call = call_of(*call)
    numbers = dataclasses.replace(link, gates=(0.6,))
    other = dataclasses.replace(link, gates=(0.3,), strength=link.strength * 0.5)
    assert run_of([numbers]).assemble(call, sigma)[1] == run_of([other]).assemble(call, sigma)[1]


# The formulas, token by token


def naive(q, parts, scales):
    """Attention of one query over tokens whose K and V are scaled: q (c,), parts [(k, v, bias)], in float64."""
    d = WIDTH // HEADS
    out = torch.zeros(WIDTH, dtype=torch.float64)
    for h in range(HEADS):
        s = slice(h * d, (h + 1) * d)
        k = torch.cat([scale * k[:, s] for (k, _, _), scale in zip(parts, scales)])
        v = torch.cat([scale * v[:, s] for (_, v, _), scale in zip(parts, scales)])
        bias = torch.cat([b for _, _, b in parts])
        weights = torch.softmax(k @ q[s] / d**0.5 + bias, dim=0)
        out[s] = weights @ v
    return out


def bias_of(branch, row):
    """(m,): what is added to the scores, -inf for tokens that do not exist."""
    count = branch.k.shape[1]
    if branch.mask is None:
        return torch.zeros(count, dtype=torch.float64)
    given = branch.mask.expand(branch.k.shape[0], 1, 1, count)[row, 0, 0]
    if given.dtype == torch.bool:
        return torch.zeros(count, dtype=torch.float64).masked_fill(~given, -math.inf)
    return given


def branch(seed, rows, tokens, kind):
    k, v = (randn(seed + i, rows, tokens, WIDTH, dtype=torch.float64) for i in (0, 1))
    if kind == "bool":
        exists = torch.arange(tokens) < torch.arange(1, rows + 1).clamp(max=tokens).view(-1, 1)
        return Branch(k, v, exists.view(rows, 1, 1, tokens))
    if kind == "numbers":
        return Branch(k, v, randn(seed + 2, rows, 1, 1, tokens, dtype=torch.float64))
    return Branch(k, v)


KINDS = st.sampled_from(["none", "bool", "numbers"])


@given(
    st.sampled_from(["outputs", "tokens"]),
    st.tuples(KINDS, KINDS),
    st.sampled_from([(0.3,), (0.0, 1.0, 0.6)]),
    st.sampled_from([(1.3,), (0.0, 0.5, 2.0)]),
    st.sampled_from([(1.0, 1.0), (0.0, 2.0), (0.5, 0.0), (0.0, 0.0)]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 1, 3]),
)
def test_a_block_adds_the_formula_token_by_token(mode, kinds, gates, strengths, depth, strength_rows, gate_rows):
    """strength * [γ Attn(q, Kp, Vp) + (1-γ) Attn(q, Ks, Vs)], or strength * Attn(q, [γ Kp; (1-γ) Ks], [γ Vp; (1-γ) Vs])."""
    rows, grid = 3, (2, 3)
    p, s = branch(1, rows, 4, kinds[0]), branch(5, rows, 6, kinds[1])
    maps = [None if n is None else mask(9 + i, n, *grid).double() for i, n in enumerate((strength_rows, gate_rows))]
    q, base = randn(11, rows, 6, WIDTH, dtype=torch.float64), randn(12, rows, 6, WIDTH, dtype=torch.float64)
    got = decoupled_attention(base, q, gated_branches(mode, gates, strengths, p, s, depth, Place(*maps)), HEADS, grid)
    for row in range(rows):
        for token in range(6):
            here = [1.0 if m is None else float(m.expand(rows, *grid)[row].flatten()[token]) for m in maps]
            strength, gate = strengths[row % len(strengths)] * here[0], gates[row % len(gates)] * here[1]
            parts = [(b.k[row], f * b.v[row], bias_of(b, row)) for b, f in zip((p, s), depth)]
            if mode == "outputs":
                first, second = (naive(q[row, token], [part], [1.0]) for part in parts)
                expected = strength * (gate * first + (1 - gate) * second)
            else:
                expected = strength * naive(q[row, token], parts, [gate, 1 - gate])
            torch.testing.assert_close(got[row, token] - base[row, token], expected, rtol=1e-5, atol=1e-6)
            if strength == 0:
                assert torch.equal(got[row, token], base[row, token])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_whole_weight_counts_like_so_many_copies(first, second, texts):
    parts = [tuple(randn(seed, texts, tokens, WIDTH) for seed in (n, n + 1)) for n, tokens in ((1, 3), (4, 2))]
    items = [0, 1, 2, 1]
    weighed = combined("concatenate", (first, second), parts, items, items)[0]
    copies = combined("concatenate", (1,) * (first + second), [parts[0]] * first + [parts[1]] * second, items, items)[0]
    assert (weighed.mask is None) == (first == second) and copies.mask is None
    q = randn(9, 4, 5, WIDTH)
    torch.testing.assert_close(
        *(attention(q, b.k, b.v, HEADS, b.mask) for b in (weighed, copies)), rtol=1e-4, atol=1e-5
    )


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 5), KINDS), min_size=1, max_size=3))
def test_stacked_rows_of_different_length_and_mask_attend_as_alone(shapes):
    parts = [branch(10 * n, rows, tokens, kind) for n, (rows, tokens, kind) in enumerate(shapes)]
    stacked = stack_rows(parts)
    q = randn(99, stacked.k.shape[0], 4, WIDTH, dtype=torch.float64)
    alone = [attention(part_q, b.k, b.v, HEADS, b.mask) for part_q, b in zip(q.split([s[0] for s in shapes]), parts)]
    torch.testing.assert_close(attention(q, stacked.k, stacked.v, HEADS, stacked.mask), torch.cat(alone))


@given(KINDS, KINDS)
def test_joined_masks_keep_every_tokens_own(first, second):
    parts = [branch(1, 2, 3, first), branch(5, 2, 4, second)]
    joined = join_masks(parts)
    if first == second == "none":
        assert joined is None
        return
    whole = Branch(torch.zeros(2, 7, WIDTH, dtype=torch.float64), torch.zeros(2, 7, WIDTH), joined)
    for row in range(2):
        assert torch.equal(bias_of(whole, row), torch.cat([bias_of(part, row) for part in parts]))


def test_a_gate_per_place_equals_one_gate_where_all_places_have_it():
    p, s = branch(1, 2, 4, "numbers"), branch(5, 2, 6, "bool")
    q = randn(11, 2, 6, WIDTH, dtype=torch.float64)
    (one,) = gated_branches("tokens", (0.3,), (1.0,), p, s)
    (placed,) = gated_branches(
        "tokens", (0.6,), (1.0,), p, s, place=Place(None, torch.full((1, 2, 3), 0.5, dtype=torch.float64))
    )
    torch.testing.assert_close(
        place_gated_attention(q, placed, per_token(placed.place_gate, 6, (2, 3)), HEADS),
        attention(q, one.k, one.v, HEADS, one.mask),
    )


def test_maps_follow_a_block_that_runs_at_another_size_and_refuse_one_that_hides_it():
    maps = torch.zeros(1, 4, 6)
    maps[:, :, 3:] = 1
    assert per_token(maps, 6, (2, 3)).view(2, 3).tolist() == [[0, 0.5, 1]] * 2
    assert per_token(maps, 24, None).view(4, 6).tolist() == maps[0].tolist()
    for grid in (None, (2, 2)):
        with pytest.raises(RuntimeError, match="6 image tokens.*4 x 6"):
            per_token(maps, 6, grid)
    assert block_grid({"activations_shape": [1, 8, 4, 6]}) == (4, 6)
    assert block_grid({}) is None


def test_texts_of_the_same_bytes_in_another_shape_or_dtype_are_other_texts():
    numbers = randn(1, 1, 2, WIDTH).half()
    shapes = [numbers, numbers.view(2, 1, WIDTH), numbers.view(torch.bfloat16)]
    assert len({text_key(text) for text in shapes}) == len(shapes)
    assert text_key(numbers) == text_key(numbers.clone())
