"""Nodes that change the rows between the model call and a block's attention, as Attention Couple does in several packs.

The patches here are this test's own, each with one habit of theirs. What is expected comes from naive.py, told by the patch itself
which row each one came from.
"""

import comfy.context_windows
import looking
import naive
import pytest
import tiny
import torch
from comfy_extras import nodes_context_windows
from flexip_pack.nodes import patches, runtime

P, N = tiny.cond(1), tiny.cond(2)
PROMPTS = {0: naive.Prompt(P[0][0][0], null=False), 1: naive.Prompt(N[0][0][0], null=True)}
REGIONS = [tiny.cond(5)[0][0], tiny.cond(6)[0][0]]
TOLD = "told by the test"  # in a block's options: rows before, their kinds, and which rows each one came from


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def network(model):
    return tiny.tiny_network(model)


def couple(model, order, text=lambda row, copy, k: k, merge=None):
    """A clone whose blocks see the rows `order(kinds, rows)`, each a tuple (row, copy), and merge them again by `merge`, or else
    take the mean of what came from the same row and 0 for rows that were dropped."""
    model = model.clone()

    def before(q, k, v, options):
        chosen = order(options["cond_or_uncond"], len(q))
        rows = [row for row, _ in chosen]
        options[TOLD] = len(q), tuple(options["cond_or_uncond"]), rows
        k = torch.cat([text(row, copy, k[row : row + 1]) for row, copy in chosen])
        return move(q, rows), k, k

    def after(out, options):
        count, _, rows = options[TOLD]
        merged = [[one for one, source in zip(out, rows) if source == row] for row in range(count)]
        return torch.stack([torch.stack(parts).mean(0) if parts else torch.zeros_like(out[0]) for parts in merged])

    model.set_model_attn2_patch(before)
    model.set_model_attn2_output_patch(after)
    return model


def move(q, rows):
    return torch.cat([q[row : row + 1] for row in rows])


def chunks(kinds, rows):
    count = rows // len(kinds)
    return [(kind, list(range(number * count, (number + 1) * count))) for number, kind in enumerate(kinds)]


def regions(kinds, rows):
    """Positive rows once more per region, chunk after chunk (cgem156, A8R8, ppm)."""
    copies = {0: range(1 + len(REGIONS)), 1: range(1)}
    return [(row, copy) for kind, chunk in chunks(kinds, rows) for copy in copies[kind] for row in chunk]


def each_twice(kinds, rows):
    return [(row, copy) for row in range(rows) for copy in range(2)]


def turned_round(kinds, rows):
    return [(row, 0) for row in reversed(range(rows))]


def negatives_last(kinds, rows):
    return [(row, 0) for _, chunk in sorted(chunks(kinds, rows)) for row in chunk]


def positives_alone(kinds, rows):
    return [(row, 0) for kind, chunk in chunks(kinds, rows) if kind == 0 for row in chunk]


ORDERS = [regions, each_twice, turned_round, negatives_last, positives_alone]


def put(model, order):
    return couple(model, order, lambda row, copy, k: k if copy == 0 else REGIONS[copy - 1].to(k))


class MovedPicture(naive.Picture):
    def __call__(self, options, row, rows, prompt):
        before, _, moved = options[TOLD]
        return super().__call__(options, moved[row], before, prompt)


class MovedBlock(naive.Block):
    """The rows' prompts cannot be told from their texts, which are the regions'."""

    def __call__(self, q, k, v, extra_options):
        before, kinds, moved = extra_options[TOLD]
        of_rows = [kind for kind, chunk in chunks(kinds, before) for _ in chunk]
        self.kinds = [of_rows[row] for row in moved]
        return super().__call__(q, k, v, extra_options)

    def match(self, key, row):
        return PROMPTS[self.kinds[row]]


def expected(model, specs, batch):
    model = naive.attach(model, specs, [], MovedPicture(batch, 8, 8))
    for block in model.model_options["transformer_options"]["patches_replace"]["attn2"].values():
        block.__class__ = MovedBlock
    return model


def spec_for(network, batch):
    gates = [(index + 1) / (batch + 1) for index in range(batch)]
    mask = torch.rand(batch, 8, 8, generator=tiny.generator(batch))
    return naive.Spec(network, [tiny.tiny_reference()], gates, strength=0.8, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch, cfg", [(1, 7.0), (3, 7.0), (2, 1.0)])
def test_every_row_keeps_gate_and_mask_and_reference_of_the_row_it_came_from(model, network, order, batch, cfg):
    """From a sweep's equal noise, where comparing the rows would tell nothing."""
    spec, noise = spec_for(network, batch), tiny.noise_for(1).repeat(batch, 1, 1, 1)
    wanted = tiny.ksample(expected(put(model, order), [spec], batch), P, N, noise=noise, cfg=cfg)
    before = tiny.ksample(runtime.attach(put(model, order), spec.link()), P, N, noise=noise, cfg=cfg)
    after = tiny.ksample(put(runtime.attach(model, spec.link()), order), P, N, noise=noise, cfg=cfg)
    assert tiny.relative_error(before, wanted) < 1e-5 and torch.equal(before, after)
    assert tiny.relative_error(wanted, tiny.ksample(put(model, order), P, N, noise=noise, cfg=cfg)) > 1e-3


def test_positive_and_negative_together_and_one_after_the_other_give_the_same_picture(model, network, monkeypatch):
    spec, noise = spec_for(network, 2), tiny.noise_for(2)
    coupled = put(runtime.attach(model, spec.link()), regions)
    together = tiny.ksample(coupled, P, N, noise=noise)
    monkeypatch.setattr(coupled.model, "memory_required", lambda shape, **more: 1e18)  # as on a full card
    assert tiny.relative_error(tiny.ksample(coupled, P, N, noise=noise), together) < 1e-5


def test_sixteen_gates_give_the_pictures_that_each_gives_alone(model, network):
    gates = tuple(index / 15 for index in range(16))
    link = lambda *gates: tiny.link_for(network, tiny.tiny_reference(), gates)
    noise = tiny.noise_for(1)
    together = tiny.ksample(put(runtime.attach(model, link(*gates)), regions), P, N, noise=noise.repeat(16, 1, 1, 1))
    for index in (0, 7, 15):
        alone = tiny.ksample(put(runtime.attach(model, link(gates[index])), regions), P, N, noise=noise)
        assert tiny.relative_error(together[index : index + 1], alone) < 1e-5


def test_context_windows_over_a_batch_with_gates_and_masks_per_frame(model, network):
    windowed = nodes_context_windows.ContextWindowsManualNode.execute(
        model,
        3,
        1,
        comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        1,
        False,
        comfy.context_windows.ContextFuseMethods.PYRAMID,
        0,
        False,
    ).args[0]
    spec, noise = spec_for(network, 5), tiny.noise_for(5)
    wanted = tiny.ksample(expected(put(windowed, regions), [spec], 5), P, N, noise=noise)
    got = tiny.ksample(put(runtime.attach(windowed, spec.link()), regions), P, N, noise=noise)
    assert tiny.relative_error(got, wanted) < 1e-5


def test_two_gates_one_after_another_and_only_in_a_window(model, network):
    """The second link alone acts in the first step, the first in none but the second."""
    first = naive.Spec(network, [tiny.tiny_reference()], [0.7], window=(0.4, 1.0))
    second = naive.Spec(tiny.tiny_network(model, "tokens", seed=5), [tiny.tiny_reference(11)], [0.2], window=(0.0, 0.6))
    wanted = expected(put(model, regions), [first, second], 1)
    got = put(runtime.attach(runtime.attach(model, first.link()), second.link()), regions)
    assert tiny.relative_error(tiny.ksample(got, P, N, steps=3), tiny.ksample(wanted, P, N, steps=3)) < 1e-5


def test_a_patch_that_writes_into_the_list_of_prompts_and_is_called_once(model, network):
    """Krita's inserts the kinds of the copies into core's own list and takes them out afterwards."""
    link, calls = tiny.link_for(network, tiny.tiny_reference()), []

    def writing(model):
        model = put(model, regions)
        patches = model.model_options["transformer_options"]["patches"]
        (before,), (after,) = patches["attn2_patch"], patches["attn2_output_patch"]

        def insert(q, k, v, options):
            calls.append(options["block"])
            result, kinds = before(q, k, v, options), options["cond_or_uncond"]
            options["kinds before"] = list(kinds)
            kinds[:] = [kind for kind in kinds for _ in range(1 if kind else 1 + len(REGIONS))]
            return result

        def take_out(out, options):
            options["cond_or_uncond"][:] = options["kinds before"]
            return after(out, options)

        patches["attn2_patch"], patches["attn2_output_patch"] = [insert], [take_out]
        return model

    assert torch.equal(
        tiny.ksample(writing(runtime.attach(model, link)), P, N),
        tiny.ksample(put(runtime.attach(model, link), regions), P, N),
    )
    assert len(calls) == 2 * 9, "two steps, nine blocks"


def test_patches_that_move_no_rows_get_what_they_got(model, network, monkeypatch):
    """NegPip and hypernetworks change k and v; ControlLLLite adds to q and counts how often it is called."""
    calls = []

    def adds(q, k, v, options):
        calls.append(1)
        return q + 0.1 * q.mean(dim=1, keepdim=True), k, v

    link = tiny.link_for(network, tiny.tiny_reference(), (0.1, 0.9))
    theirs, noise = model.clone(), tiny.noise_for(2)
    theirs.set_model_attn2_patch(lambda q, k, v, options: (q, k[:, 0::2], v[:, 1::2]))
    theirs.set_model_attn2_patch(adds)
    before = tiny.ksample(runtime.attach(theirs, link), P, N, noise=noise)
    assert len(calls) == 2 * 9
    monkeypatch.setattr(runtime.patches, "followed", lambda options, *rest: options)
    assert torch.equal(tiny.ksample(runtime.attach(theirs, link), P, N, noise=noise), before)


def test_without_such_a_patch_the_options_are_passed_on_as_they_are(model, network):
    options = {"patches": {"input_block_patch": [lambda h, options: h]}}
    assert patches.followed(options, runtime.KEY, None, None, None) is options


def test_nothing_that_clones_share_is_changed(model, network):
    gated = put(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference())), regions)
    shared = gated.model_options["transformer_options"]["patches"]
    before = {name: list(several) for name, several in shared.items()}
    tiny.ksample(gated, P, N)
    assert shared is gated.model_options["transformer_options"]["patches"] and shared == before


def adds_rows(q, k, v, options):
    return torch.cat([q, torch.zeros_like(q[:1])]), torch.cat([k, k[:1]]), torch.cat([v, v[:1]])


def test_rows_of_another_nodes_own_are_refused_by_its_name(model, network):
    other = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    other.set_model_attn2_patch(adds_rows)
    with pytest.raises(RuntimeError, match="the patch adds_rows makes 3 rows of 2.*Take that node or FlexIP off"):
        tiny.ksample(other, P, N)


def test_rows_that_change_where_flexip_does_not_see_it_are_refused(model, network):
    other = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))

    def late(executor, x, t, context, y, control, options, **kwargs):
        return executor(x, t, context, y, control, {**options, "patches": {"attn2_patch": [adds_rows]}}, **kwargs)

    other.add_wrapper_with_key("diffusion_model", "late", late)
    with pytest.raises(RuntimeError, match="a block has 3 rows where the model was called with 2"):
        tiny.ksample(other, P, N)


@pytest.mark.parametrize("show", ["adapters", "words (personalization)"])
def test_maps_of_a_model_whose_rows_are_repeated(model, network, show):
    """Every copy has its text from the positive prompt, so that nothing but the rows may differ."""
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    words = {} if show == "adapters" else {"clip": looking.FakeClip(), "prompt": "a cat"}
    plain = looking.raw(gated, show, **words)
    assert tiny.relative_error(looking.raw(couple(gated, each_twice), show, **words), plain) < 1e-5
