"""Other nodes in the same attn2 replace slots: before us, after us, around us (users.md rows 3 and 13).

ComfyUI's own nodes are in test_neighbours_core.py, what comes with a prompt or a kind of model in test_neighbours_conditioning.py,
real packs in test_real_packs/.
"""

import comfy.ldm.modules.attention as core_attention
import comfy.model_patcher
import pytest
import tiny
import torch
from flexip_pack.flexip_core.network.blocks import block_of
from flexip_pack.nodes import runtime

P, N = tiny.cond(1), tiny.cond(2)
ROLES = [(P[0][0], False), (N[0][0], True)]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def link(model):
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


def theirs(q, k, v, extra_options):
    return core_attention.optimized_attention(q, k, v, extra_options["n_heads"]) + 0.1 * q


class Plain:
    """An object in the slot that nobody can add to."""

    def __call__(self, q, k, v, extra_options):
        return theirs(q, k, v, extra_options)


class Adds(Plain):
    """As IPAdapter_plus, InstantID and PuLID have it."""

    def __init__(self):
        self.callbacks = []

    def add(self, callback, **kwargs):
        self.callbacks.append((callback, kwargs))

    def __call__(self, q, k, v, extra_options):
        out = theirs(q, k, v, extra_options)
        for callback, kwargs in self.callbacks:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


class Wraps:
    """A pack that looks for what is in the slot, as we do."""

    def __init__(self, previous):
        self.previous = previous

    def __call__(self, q, k, v, extra_options):
        return self.previous(q, k, v, extra_options) + 0.1 * q


KINDS = {"function": lambda: theirs, "object": Plain, "object with add": Adds}


def added(out, q, k, v, extra_options, weight, **kwargs):
    return weight * q


def patches_of(model):
    slots = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    return {id(patch): patch for patch in slots.values()}.values()


def everywhere(model, make):
    """A clone with a patch of theirs in the slot of every block."""
    model = model.clone()
    for kind, number, index in keys(model):
        model.set_model_attn2_replace(make(), kind, number, transformer_index=index)
    return model


def report_of(model):
    reports = []
    model.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    return tiny.ksample(model, P, N), reports[0]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_in_the_slots_before_is_added_to(model, link, kind):
    before = everywhere(model, KINDS[kind])
    got, report = report_of(runtime.attach(before, link))
    assert tiny.relative_error(got, tiny.ksample(tiny.naive_attach(before, [link], ROLES), P, N)) < 1e-5
    assert "9 of 9 blocks patched" in report and "WARNING" not in report


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_takes_the_slots_afterwards_wins_and_the_run_says_so(model, link, kind):
    got, report = report_of(everywhere(runtime.attach(model, link), KINDS[kind]))
    assert torch.equal(got, tiny.ksample(everywhere(model, KINDS[kind]), P, N))
    name = type(KINDS[kind]()).__name__
    assert "0 of 9 blocks patched" in report
    assert f"WARNING: another node took over 9 of 9 blocks after FlexIP ({name} x9)" in report


def test_a_pack_that_wraps_what_it_finds_is_added_to(model, link):
    gated = runtime.attach(model, link).clone()
    slots = gated.model_options["transformer_options"]["patches_replace"]["attn2"]
    for kind, number, index in keys(model):
        wrapped = Wraps(slots[kind, number, index])
        gated.set_model_attn2_replace(wrapped, kind, number, transformer_index=index)
    got, report = report_of(gated)
    before = everywhere(model, KINDS["function"])  # 0.1 q, too
    assert tiny.relative_error(got, tiny.ksample(tiny.naive_attach(before, [link], ROLES), P, N)) < 1e-5
    assert "took over 9 of 9 blocks after FlexIP (Wraps x9); unless it calls FlexIP" in report


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_is_added_to_our_object_is_added_to_what_was_there_before(model, link, kind):
    """users.md row 7, too: the model that they were added to is a clone, and its parent stays as it was."""
    before = everywhere(model, KINDS[kind]) if kind else model
    parent = runtime.attach(before, link)
    alone = tiny.ksample(parent, P, N)
    child = parent.clone()
    for patch in patches_of(child):
        patch.add(added, weight=0.2, sigma_start=1e9, sigma_end=0.0)
    expected = tiny.naive_attach(before, [link], ROLES)
    for patch in patches_of(expected):
        base = patch.previous or (lambda q, k, v, o: core_attention.optimized_attention(q, k, v, o["n_heads"]))
        patch.previous = lambda q, k, v, o, base=base: base(q, k, v, o) + 0.2 * q
    assert tiny.relative_error(tiny.ksample(child, P, N), tiny.ksample(expected, P, N)) < 1e-5
    assert torch.equal(tiny.ksample(parent, P, N), alone)


class Movable(Plain):
    """Holds tensors and a model; ComfyUI moves what it finds in a slot, loads its models, and cleans it up after the run."""

    def __init__(self, calls):
        self.calls = calls
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), tiny.CPU, tiny.CPU)

    def to(self, where):
        self.calls.append(("to", where))
        return self

    def models(self):
        self.calls.append(("models",))
        return [self.patcher]

    def cleanup(self):
        self.calls.append(("cleanup",))


def test_comfyui_still_moves_loads_and_cleans_up_what_sat_in_the_slots_before_us(model, link):
    """users.md row 8: `found at least two devices`."""
    calls = {"bare": [], "gated": []}
    before = {name: everywhere(model, lambda name=name: Movable(calls[name])) for name in calls}
    tiny.ksample(before["bare"], P, N)
    tiny.ksample(runtime.attach(before["gated"], link), P, N)
    cleans = hasattr(comfy.model_patcher.ModelPatcher, "model_patches_call_function")  # not in 0.16
    assert {"to", "models", *(["cleanup"] if cleans else [])} == {name for name, *_ in calls["bare"]}
    assert set(calls["gated"]) == set(calls["bare"])


def test_what_moves_by_becoming_another_object_moves_for_that_device_only(model, link):
    """ComfyUI calls `to` per GPU, and on both keys of a block; what a pack adds later still reaches the key that core reads."""

    class Elsewhere(Plain):
        def __init__(self, where):
            self.where = where

        def to(self, where):
            return self if where == self.where else Elsewhere(where)

    gated = runtime.attach(everywhere(model, lambda: Elsewhere("here")), link)
    slots = gated.model_options["transformer_options"]["patches_replace"]["attn2"]
    patch = slots["input", 1, 0]
    assert patch.to("there").previous.where == "there" and patch.previous.where == "here"
    slots.update({key: patch.to("there") for key, patch in slots.items()})
    child, alone = gated.clone(), tiny.ksample(gated.clone(), P, N)
    slots = child.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert slots["input", 1] is slots["input", 1, 0]
    slots["input", 1].add(added, weight=0.5)
    assert not torch.equal(tiny.ksample(child, P, N), alone)


def test_between_two_links_of_a_chain_the_later_one_acts_on_what_took_the_slots(model, link):
    other = tiny.link_for(tiny.tiny_network(model, "tokens", seed=5), tiny.tiny_reference(11), 0.9)
    taken = everywhere(runtime.attach(model, link), KINDS["object"])
    got, report = report_of(runtime.attach(taken, other))
    expected = tiny.ksample(tiny.naive_attach(everywhere(model, KINDS["object"]), [other], ROLES), P, N)
    assert tiny.relative_error(got, expected) < 1e-5
    first, second = report.split("\n\n")
    assert "0 of 9 blocks patched" in first and "9 of 9 blocks patched" in second and "WARNING" not in second


def keys(model):
    return [block_of(address) for address in tiny.config_for(model).blocks]


@pytest.mark.parametrize("three_part", [True, False], ids=["three-part key", "two-part key"])
def test_a_patch_that_was_there_before_still_acts(model, link, three_part):
    before = model.clone()
    for kind, number, index in keys(model):
        before.set_model_attn2_replace(theirs, kind, number, transformer_index=index if three_part else None)
    got, report = report_of(runtime.attach(before, link))
    assert tiny.relative_error(got, tiny.ksample(tiny.naive_attach(before, [link], ROLES), P, N)) < 1e-5
    assert tiny.relative_error(got, tiny.ksample(runtime.attach(model, link), P, N)) > 1e-3
    assert "WARNING" not in report


def test_of_patches_under_the_two_part_key_only_those_put_on_after_us_are_never_called(model, link):
    """In blocks of two layers, too, where ours sit under three-part keys alone."""
    before = model.clone()
    for kind, number in {key[:2] for key in keys(model)}:
        before.set_model_attn2_replace(Adds(), kind, number)
    after = runtime.attach(before, link).clone()
    assert "WARNING" not in report_of(after)[1]
    after.set_model_attn2_replace(Plain(), "input", 3)
    assert "WARNING: Plain was put on 1 blocks after FlexIP" in report_of(after)[1]


@pytest.mark.parametrize("three_part", [True, False], ids=["three-part key", "two-part key"])
def test_blocks_that_a_later_node_takes_are_counted_in_the_report(model, link, three_part):
    after = runtime.attach(model, link).clone()
    kind, number, index = keys(model)[0]
    after.set_model_attn2_replace(theirs, kind, number, transformer_index=index if three_part else None)
    reports = []
    after.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    tiny.ksample(after, P, N)
    # under the two-part key theirs is never called: core looks the three-part key up first, and ours is there
    assert ("WARNING: another node took over 1 of" in reports[0]) == three_part
    assert ("WARNING: function was put on 1 blocks after FlexIP" in reports[0]) == (not three_part)


def test_single_layer_blocks_are_registered_under_both_keys_as_one_object(model, link):
    slots = runtime.attach(model, link).model_options["transformer_options"]["patches_replace"]["attn2"]
    assert slots["input", 1] is slots["input", 1, 0]
    assert ("input", 3) not in slots and {("input", 3, 0), ("input", 3, 1)} <= set(slots)
    child = runtime.attach(model, link).clone().model_options["transformer_options"]["patches_replace"]["attn2"]
    assert child["input", 1] is child["input", 1, 0]


def test_what_ip_adapter_packs_add_to_our_object_acts_within_its_sigmas(model, link):
    gated = runtime.attach(model, link)
    expected = tiny.ksample(gated, P, N, steps=4)
    outcomes = []
    for start, end in ((1e9, 0.0), (0.5, 0.4999), (1e9, 1.0)):
        child = gated.clone()
        slots = child.model_options["transformer_options"]["patches_replace"]["attn2"]
        for patch in {id(p): p for p in slots.values()}.values():
            patch.add(added, weight=0.1, sigma_start=start, sigma_end=end)
        outcomes.append(tiny.ksample(child, P, N, steps=4))
    always, never, early = outcomes
    assert torch.equal(never, expected)
    assert not torch.equal(always, expected) and not torch.equal(early, expected) and not torch.equal(early, always)
    assert torch.equal(tiny.ksample(gated, P, N, steps=4), expected)


def test_a_node_that_drops_our_options_gives_the_bare_picture_and_a_warning(model, link, caplog):
    gated = runtime.attach(model, link)
    del gated.model_options["transformer_options"][runtime.LINKS]
    with caplog.at_level("WARNING"):
        assert torch.equal(tiny.ksample(gated, P, N), tiny.ksample(model, P, N))
    assert "FlexIP does nothing" in caplog.text
