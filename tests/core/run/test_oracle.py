"""Each row of a UNet call against the paper's formulas: with its text, its reference or the null reference, gate, strength, window,
mask, copy of a sweep and region. The oracle knows of a run nothing but what it was told."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_run import CPU, HEADS, LEVELS, NETWORKS, WIDTH, mask, randn, reference

from flexip_core.network.attention import decoupled_attention
from flexip_core.run.chain import Call, Entry, Link, Own, Row, Setting
from flexip_core.run.reference import ReferenceSet
from flexip_core.run.run import LinkRun, Run
from flexip_core.run.schedule import GateBatch, GateCurve

LATENTS, COPIES, HEIGHT, COLUMNS = 3, 2, 4, 5
BATCH = LATENTS * COPIES
START, END = 0.75, 0.25  # a window, in sigmas
SIGMAS = (1.0, START, 0.5, END, 0.0)
SETTING = Setting(BATCH, COPIES, HEIGHT, COLUMNS, LEVELS, lambda sigma: 1 - sigma)

# what the product is told, and γ of a row of the batch at a sigma
GATES = [
    ((0.6,), lambda item, sigma: 0.6),
    ((0.1, 0.9, 0.4, 0.0, 1.0, 0.7), lambda item, sigma: (0.1, 0.9, 0.4, 0.0, 1.0, 0.7)[item]),
    (GateCurve(((0.0, 1.0), (1.0, 0.0)), "falling"), lambda item, sigma: sigma),
    (GateBatch((0.2, 0.8), "repeat"), lambda item, sigma: (0.2, 0.8, 0.2)[item % LATENTS]),
    (GateBatch((0.0, 1.0), "interpolate"), lambda item, sigma: (0.0, 0.5, 1.0)[item % LATENTS]),
]
ONE, TWO, LONG, OTHER = reference(1), reference(2), reference(3, 2), reference(4)
SETS = [
    ReferenceSet((ONE,), (1.0,)),
    ReferenceSet((LONG,), (1.0,), negative=OTHER),
    ReferenceSet((ONE, LONG, TWO), (1.0, 2.0, 0.0)),
    ReferenceSet((ONE, TWO, OTHER), (1.0, 3.0, 0.0), "average"),
    ReferenceSet((ONE, LONG), (0.5, 2.0), "one per batch item", negative=TWO),
    ReferenceSet((ONE, LONG), (0.5, 2.0), "one per region", mask(7, 2, 5, 5)),
]
MASKS = [None, mask(5, 1, 8, 10), mask(6, 2, 3, 3)]  # of any size, one or a batch
FULL = dict.fromkeys(LEVELS, 1.0)
DEPTHS = [
    None,
    {"preservation": {"input.1.0": 0.0, "middle.0.0": 1.5}, "personalization": FULL},
    {"preservation": {**FULL, "middle.0.0": 0.0}, "personalization": {"input.1.0": 0.5, "middle.0.0": 0.0}},
]
STRENGTHS = [(), (0.5, 2.0, 0.0, 1.0, 0.3, 0.8)]
VIEWS = [(tuple(range(HEIGHT)), tuple(range(COLUMNS))), ((1, 2, 3), (0, 2))]
TEXTS = [randn(21, 1, 3, WIDTH), randn(22, LATENTS, 5, WIDTH), randn(23, 1, 3, WIDTH)]
NULL = (False, False, True)
MADE = randn(24, 2, 4, WIDTH)  # by a node that makes a conditioning itself: its text comes with the call


@dataclasses.dataclass
class Told:
    """A link, or what a prompt brings along for one."""

    references: ReferenceSet | None
    gates: int  # of GATES
    strength: float
    mode: str = "outputs"
    strengths: tuple[float, ...] = ()
    windowed: bool = False
    mask: torch.Tensor | None = None
    gate_mask: torch.Tensor | None = None
    depth: Any = None

    def link(self):
        return Link(
            NETWORKS[self.mode],
            None,
            self.references,
            GATES[self.gates][0],
            self.strength,
            start_percent=0.1 if self.windowed else 0.0,
            mask=self.mask,
            gate_mask=self.gate_mask,
            depth=self.depth,
            strengths=self.strengths,
        )


LINKS = st.builds(
    Told,
    references=st.sampled_from(SETS),
    gates=st.integers(0, len(GATES) - 1),
    strength=st.sampled_from([0.5, 1.0]),
    mode=st.sampled_from(list(NETWORKS)),
    strengths=st.sampled_from(STRENGTHS),
    windowed=st.booleans(),
    mask=st.sampled_from(MASKS),
    gate_mask=st.sampled_from(MASKS),
    depth=st.sampled_from(DEPTHS),
)
OWNS = st.one_of(
    st.none(), st.builds(Told, st.sampled_from([None, *SETS]), st.integers(0, len(GATES) - 1), st.sampled_from([0, 2]))
)


# The formulas


@functools.cache
def laid(masks, index, height, width):
    """One of the masks on a grid: the mean over all pixels that a cell touches, (height, width)."""
    one = masks[index].double()
    high, wide = one.shape
    span = lambda cell, cells, pixels: slice(cell * pixels // cells, -(-(cell + 1) * pixels // cells))
    rows = [[one[span(y, height, high), span(x, width, wide)].mean() for x in range(width)] for y in range(height)]
    return torch.tensor(rows, dtype=torch.float64)


@functools.cache
def per_token(masks, latent, view, level):
    """The factor of each image token of a block, (n, 1): the product of these masks at each cell that is shown, then the mean."""
    side = 2**level
    cells = torch.ones(len(view[0]), len(view[1]), dtype=torch.float64)
    for one in masks:
        if one is not None:
            cells = cells * laid(one, latent % len(one), HEIGHT, COLUMNS)[list(view[0])][:, list(view[1])]
    corners = itertools.product(range(0, cells.shape[0], side), range(0, cells.shape[1], side))
    return torch.stack([cells[y : y + side, x : x + side].mean() for y, x in corners]).view(-1, 1)


def attend(q, parts):
    """softmax(scale * q kT / sqrt(d) + bias) (scale * v), q (n, c), parts [(k, v, bias, scale (n, 1))] that share a softmax."""
    k, v = (torch.cat([part[i] for part in parts]).view(-1, HEADS, WIDTH // HEADS) for i in (0, 1))  # m h d
    bias = torch.cat([torch.full((len(part[0]),), part[2], dtype=torch.float64) for part in parts])
    scale = torch.cat([part[3].expand(-1, len(part[0])) for part in parts], dim=1)  # n m
    scores = torch.einsum("nhd,mhd->hnm", q.view(-1, HEADS, WIDTH // HEADS), k) * (WIDTH // HEADS) ** -0.5
    weights = torch.softmax(scores * scale + bias, dim=-1) * scale
    return torch.einsum("hnm,mhd->nhd", weights, v).reshape(len(q), WIDTH)


@functools.cache
def projected(network, adapter, address, source, text, row):
    """K, V (m, c) of one (reference, null or not) and one row of a text (b, t, c)."""
    one, null = source
    tokens = network.tokens(adapter, one.null if null else one.features, text[row : row + 1])
    return [t[0].double() for t in network.project(adapter, tokens)[address]]


def softmaxes(chosen, null, item):
    """[((reference, null or not) that share a softmax, their shares, averaged, factor of the strength, region)]"""
    sources = [(one, null) for one in chosen.references]
    if null and chosen.negative is not None:
        sources = [(chosen.negative, False)] * len(sources)
    if chosen.combine == "one per region":
        regions = [chosen.masks[number : number + 1] for number in range(len(sources))]
        return [([one], [1.0], False, weight, region) for one, weight, region in zip(sources, chosen.weights, regions)]
    if chosen.combine == "one per batch item":
        number = item % LATENTS % len(sources)
        return [([sources[number]], [1.0], False, chosen.weights[number], None)]
    used = [(one, weight) for one, weight in zip(sources, chosen.weights) if weight]
    return [([one for one, _ in used], [weight for _, weight in used], chosen.combine == "average", 1.0, None)]


def expected(told, own, address, q, text, null, item, view, sigma):
    """(n, c): what one link adds for one row, whose text is text[item]."""
    network, level, latent = NETWORKS[told.mode], LEVELS[address], item % LATENTS
    chosen = own.references if own is not None and own.references is not None else told.references
    gate = GATES[(own or told).gates][1](item, sigma) * per_token((told.gate_mask,), latent, view, level)
    strength = (told.strengths[item] if told.strengths else told.strength) * (own.strength if own is not None else 1.0)
    depths = [1.0 if told.depth is None else told.depth[name][address] for name in network.adapters]
    total = torch.zeros(len(q), WIDTH, dtype=torch.float64)
    for sources, shares, averaged, factor, region in softmaxes(chosen, null, item):
        sides = []
        for name, scale, depth in zip(network.adapters, (gate, 1 - gate), depths):
            pairs = [projected(network, name, address, source, text, item % len(text)) for source in sources]
            if averaged:
                pairs = [[sum(t * w for t, w in zip(ts, shares)) / sum(shares) for ts in zip(*pairs)]]
            biases = [0.0] if averaged else [math.log(share) for share in shares]
            sides.append([(k, v * depth, bias, scale) for (k, v), bias in zip(pairs, biases)])
        if told.mode == "tokens":
            added = attend(q, [*sides[0], *sides[1]])
        else:
            first, second = (attend(q, [(*part[:3], torch.ones_like(gate)) for part in side]) for side in sides)
            added = gate * first + (1 - gate) * second
        total += strength * factor * per_token((told.mask, region), latent, view, level) * added
    return total


# The product


def started(links, owns, dtype=torch.float32):
    """A run of two positives, one longer and with a text per latent, and a negative; `owns` is per prompt, by position."""
    entries = [
        Entry(
            text,
            null,
            {
                position: Own(told.references, GATES[told.gates][0], told.strength)
                for position, told in own.items()
                if told is not None
            },
        )
        for text, null, own in zip(TEXTS, NULL, owns)
    ]
    runs = [
        LinkRun(told.link(), i, *((START, END) if told.windowed else (9.0, 0.0)), SETTING)
        for i, told in enumerate(links)
    ]
    run = Run(runs)
    run.prepare(entries, dtype, lambda link: CPU)
    return run


def queries(rows, view, address):
    tokens = math.prod(-(-len(side) // 2 ** LEVELS[address]) for side in view)
    return randn(30, rows, tokens, WIDTH, dtype=torch.float64)


ROWS = st.one_of(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, BATCH - 1)), min_size=1, max_size=6),
    st.sampled_from(
        [[(entry, item) for entry in chunks for item in range(BATCH)] for chunks in ((0, 2), (1, 2), (1,))]
    ),
)


WHOLE = [(0, 0), (1, 4), (2, 5)]
NO_OWNS = [(None, None)] * 3


@given(
    st.lists(LINKS, min_size=1, max_size=2),
    st.lists(st.tuples(OWNS, OWNS), min_size=3, max_size=3),
    st.lists(st.tuples(ROWS, st.sampled_from(VIEWS), st.sampled_from(SIGMAS)), min_size=1, max_size=2),
    st.booleans(),
)
@example([Told(SETS[0], 0, 1.0, windowed=True)], NO_OWNS, [(WHOLE, VIEWS[0], sigma) for sigma in SIGMAS], False)
@example([Told(SETS[0], 2, 1.0)], NO_OWNS, [(WHOLE, VIEWS[0], sigma) for sigma in (1.0, 0.5, 1.0)], False)
@example([Told(SETS[2], 1, 1.0, "tokens")], NO_OWNS, [(WHOLE, VIEWS[1], 1.0)], True)
@example([Told(SETS[0], 0, 1.0)], [(Told(SETS[5], 0, 2), None), *NO_OWNS[1:]], [(WHOLE, VIEWS[0], 1.0)], False)
def test_each_row_of_a_call_gets_what_the_formulas_say(links, owns, calls, untagged):
    owns = [dict(enumerate(own[: len(links)])) for own in owns]
    run = started(links, owns)
    for rows, view, sigma in calls:
        named = [Row(*row, view) for row in rows]
        told_of = [(TEXTS[entry], NULL[entry], owns[entry], item) for entry, item in rows]
        if untagged:
            named += [row._replace(view=view) for row in run.untagged(MADE, 1, torch.float32)]
            told_of += [(MADE, True, {}, item) for item in range(len(MADE))]
        got, _ = run.assemble(Call(tuple(named), *map(len, view), CPU, torch.float32), sigma)
        for position, told in enumerate(links):
            active = not told.windowed or END <= sigma <= START
            for address, level in LEVELS.items():
                q = queries(len(named), view, address)
                grid = tuple(-(-len(side) // 2**level) for side in view)
                branches = got.get((position, address), ())
                assert active or not branches
                added = decoupled_attention(torch.zeros_like(q), q, branches, HEADS, grid)
                formulas = torch.stack(
                    [
                        expected(told, own.get(position), address, row, text, null, item, view, sigma)
                        for row, (text, null, own, item) in zip(q, told_of)
                    ]
                )
                torch.testing.assert_close(added, formulas * active, rtol=1e-4, atol=1e-5)


def row_of(branch, row, rows):
    """K and V of one row of a call."""
    return [t[row * t.shape[0] // rows] for t in (branch.k, branch.v)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", list(NETWORKS))
def test_a_row_with_its_own_gate_has_the_bits_of_a_run_with_that_gate(mode, dtype):
    """Also in half precision, where a rounded gate would be another picture."""
    together = Told(SETS[0], 1, 1.0, mode)
    call = Call(tuple(Row(0, item) for item in range(BATCH)), HEIGHT, COLUMNS, CPU, dtype)
    got, _ = started([together], [{}] * 3, dtype).assemble(call, None)
    for item in range(BATCH):
        link = dataclasses.replace(together.link(), gates=(GATES[1][1](item, None),))
        run = Run([LinkRun(link, 0, 9.0, 0.0, SETTING)])
        run.prepare([Entry(TEXTS[0], False)], dtype, lambda link: CPU)
        alone, _ = run.assemble(call._replace(rows=(Row(0, item),)), None)
        for key, parts in alone.items():
            for whole, part in zip(got[key], parts, strict=True):
                for a, b in zip(row_of(whole, item, BATCH), row_of(part, 0, 1)):
                    assert torch.equal(a, b)


def test_room_is_asked_for_k_and_v_and_twice_where_the_gate_changes():
    """Of the longest prompt, in float32: 2 tokens of the picture, and 5 of each of its texts, in both blocks."""
    once = (2 + 5 * LATENTS) * 2 * len(LEVELS) * WIDTH * 4
    one, rows, curve = (started([Told(SETS[0], gates, 1.0)], [{}] * 3).bytes_per_row() for gates in range(3))
    assert one == rows == once and curve == 2 * once
