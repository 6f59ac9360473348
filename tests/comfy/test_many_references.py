"""Several references: combined by weight, one per picture of the batch, one per region, and a negative one."""

import dataclasses

import naive
import pytest
import tiny
import torch
from flexip_pack.flexip_core.run.reference import COMBINE, Reference
from flexip_pack.flexip_core.run.schedule import GateBatch
from flexip_pack.nodes import runtime
from flexip_pack.nodes.combine import FlexIPCombineReferences, combine_references
from hypothesis import given, settings
from hypothesis import strategies as st

import nodes

TOLERANCE = 1e-5
P, N, M = (tiny.cond(seed) for seed in (1, 2, 3))
PROMPTS = [naive.Prompt(P[0][0][0], False), naive.Prompt(N[0][0][0], True)]
REFERENCES = [tiny.tiny_reference(seed, pictures) for seed, pictures in ((9, 1), (10, 2), (11, 3), (12, 1))]
REGIONS = torch.zeros(2, 16, 16)
REGIONS[0, :, :9] = 1
REGIONS[1, 4:, 6:] = 0.7  # overlaps the first


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


def sample(model, network, reference, batch=2, steps=1, gates=(0.6,), **kwargs):
    link = dataclasses.replace(
        tiny.link_for(network, tiny.tiny_reference(), **kwargs), reference=reference, gates=gates
    )
    return tiny.ksample(runtime.attach(model, link), P, N, noise=tiny.noise_for(batch), steps=steps)


def close(a, b, tolerance=TOLERANCE):
    return tiny.relative_error(a, b) < tolerance


CHOSEN = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0, 2.5])), min_size=1, max_size=3)


@pytest.mark.parametrize("combine", COMBINE)
def test_every_way_to_combine_equals_the_naive_reference(model, network, combine):
    @settings(max_examples=6)  # each runs the UNet and the naive reference
    @given(
        CHOSEN.filter(lambda chosen: any(weight for _, weight in chosen)),
        st.integers(1, 5),
        st.booleans(),
        st.booleans(),
    )
    def check(chosen, batch, negative, per_row):
        check_combined(model, network, combine, chosen, batch, negative, per_row)

    check()


def check_combined(model, network, combine, chosen, batch, negative, per_row):
    """`chosen`: (which reference, weight); `per_row`: gates and masks along the batch."""
    references = [REFERENCES[number] for number, _ in chosen]
    weights = [weight for _, weight in chosen]
    regions = torch.rand(len(chosen), 16, 16, generator=tiny.generator(3)) if combine == "one per region" else None
    if combine in ("average", "one per batch item"):  # picture by picture, each with the weight of its reference
        weights = [weight for reference, weight in zip(references, weights) for _ in range(reference.count)]
        references = [picture for reference in references for picture in reference.pictures]
    spec = naive.Spec(
        network,
        references,
        gates=[0.9, 0.2, 0.5] if per_row else [0.6],
        combine=combine,
        weights=weights,
        regions=regions,
        negative=REFERENCES[1] if negative else None,
        mask=torch.rand(2, 16, 16, generator=tiny.generator(4)) if per_row else None,
    )
    product = combine_references(
        [REFERENCES[number] for number, _ in chosen],
        tuple(weight for _, weight in chosen),
        combine,
        regions,
        spec.negative,
    )
    gates = GateBatch((0.9, 0.2, 0.5), "repeat") if per_row else (0.6,)
    link = dataclasses.replace(spec.link(gates), reference=product)
    noise = tiny.noise_for(batch)
    expected = tiny.ksample(
        naive.attach(model, [spec], PROMPTS, naive.Picture(batch, 8, 8)), P, N, noise=noise, steps=1
    )
    assert close(tiny.ksample(runtime.attach(model, link), P, N, noise=noise, steps=1), expected)


@pytest.mark.parametrize("negative", [None, REFERENCES[2]], ids=["", "negative"])
def test_weights_of_concatenate_count_like_copies(model, network, negative):
    a, b = REFERENCES[0], REFERENCES[1]
    combine = lambda parts, *weights: sample(
        model, network, combine_references(parts, weights, "concatenate", None, negative)
    )
    equal = combine([a, b], 1.0, 1.0)
    assert close(combine([a, b], 2.0, 1.0), combine([a, a, b], 1.0, 1.0, 1.0))
    assert close(combine([a, b], 2.0, 1.0), combine([a, b], 5.0, 2.5))
    assert torch.equal(combine([a, b], 0.0, 0.7), combine([b], 1.0))
    assert torch.equal(combine([a, b], 3.0, 3.0), equal) and torch.equal(combine([a, b]), equal)
    assert not close(combine([a, b], 2.0, 1.0), equal, 1e-4)


def test_concatenate_of_pictures_is_like_one_encode_of_all_for_the_preservation(model):
    """The personalization reads all [CLS] of one encode as one context, and each reference of several apart."""
    network, pictures = tiny.tiny_network(model), REFERENCES[2]
    together = sample(model, network, pictures, gates=(1.0,))
    apart = sample(model, network, combine_references(list(pictures.pictures), (), "concatenate"), gates=(1.0,))
    assert close(apart, together)


def test_average_of_equal_references_is_one_and_goes_from_one_to_the_other(model, network):
    a, same, b = REFERENCES[0], tiny.tiny_reference(9), REFERENCES[3]
    average = lambda parts, *weights: sample(model, network, combine_references(parts, weights, "average"))
    one = sample(model, network, a)
    assert close(average([a, same, a], 1.0, 2.0, 0.5), one)
    assert close(average([a, b], 1.0, 0.0), one) and close(average([a, b], 0.0, 1.0), sample(model, network, b))
    assert close(average([a, b], 3.0, 1.0), average([a, b], 1.5, 0.5))
    assert not close(average([a, b], 1.0, 1.0), one, 1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_one_per_batch_item_is_a_single_run_with_that_reference(model, network, batch):
    """Pictures count one by one, whichever reference they came with; they repeat, and each has its reference's weight."""
    parts, weights = [REFERENCES[1], REFERENCES[0]], (0.5, 2.0)
    pictures = [(picture, 0.5) for picture in parts[0].pictures] + [(parts[1], 2.0)]
    reference = combine_references(parts, weights, "one per batch item")
    noise = tiny.noise_for(batch)
    link = dataclasses.replace(tiny.link_for(network, parts[0]), reference=reference)
    together = tiny.ksample(runtime.attach(model, link), P, N, noise=noise)
    for row in range(batch):
        picture, weight = pictures[row % 3]
        alone = runtime.attach(model, tiny.link_for(network, picture, strength=weight))
        assert close(together[row : row + 1], tiny.ksample(alone, P, N, noise=noise[row : row + 1]))


def test_one_per_region_is_a_chain_of_applies_with_masks(model, network):
    parts, weights = [REFERENCES[0], REFERENCES[1]], (0.8, 1.5)
    regions = sample(model, network, combine_references(parts, weights, "one per region", REGIONS), batch=3)
    chain = model
    for part, weight, mask in zip(parts, weights, REGIONS):
        chain = runtime.attach(chain, tiny.link_for(network, part, strength=weight, mask=mask[None]))
    assert close(regions, tiny.ksample(chain, P, N, noise=tiny.noise_for(3), steps=1))


def test_regions_go_with_a_mask_a_gate_mask_and_gates_per_row(model, network):
    g = tiny.generator(5)
    spec = naive.Spec(
        network,
        [REFERENCES[0], REFERENCES[2]],
        gates=[0.1, 0.9],
        combine="one per region",
        regions=REGIONS,
        mask=torch.rand(2, 18, 26, generator=g),
        gate_mask=torch.rand(3, 9, 13, generator=g),
        depth={
            "preservation": {address: 1.5 for address in network.block_widths},
            "personalization": {address: 0.5 * (address[0] != "m") for address in network.block_widths},
        },
    )
    noise = tiny.noise_for(3, 9, 13)
    expected = tiny.ksample(naive.attach(model, [spec], PROMPTS, naive.Picture(3, 9, 13)), P, N, noise=noise, steps=1)
    assert close(
        tiny.ksample(runtime.attach(model, spec.link(GateBatch((0.1, 0.9), "repeat"))), P, N, noise=noise, steps=1),
        expected,
    )


def test_an_area_prompt_sees_its_part_of_every_region(model, network):
    box = (2, 3, 5, 4)
    positive = nodes.ConditioningSetArea().append(P, 4 * 8, 5 * 8, 3 * 8, 2 * 8, 1.0)[0] + M
    declared = [
        naive.Prompt(P[0][0][0], False, box),
        naive.Prompt(M[0][0][0], False),
        naive.Prompt(N[0][0][0], True, box),
    ]
    spec = naive.Spec(network, REFERENCES[:2], combine="one per region", regions=REGIONS)
    noise = tiny.noise_for(2, 9, 8)
    expected = tiny.ksample(
        naive.attach(model, [spec], declared, naive.Picture(2, 9, 8)), positive, N, noise=noise, steps=1
    )
    assert close(tiny.ksample(runtime.attach(model, spec.link()), positive, N, noise=noise, steps=1), expected)


def test_a_place_of_no_region_keeps_the_text_attention_bit_for_bit(model, network):
    reference = combine_references(REFERENCES[:2], (), "one per region", REGIONS)
    link = dataclasses.replace(tiny.link_for(network, REFERENCES[0]), reference=reference)

    def look(address, out, bare, grid):
        nowhere = torch.zeros(grid, dtype=torch.bool)
        nowhere[: grid[0] // 4, -(grid[1] // 4) :] = True  # the upper right corner
        assert torch.equal(out[:, nowhere.flatten()], bare[:, nowhere.flatten()])
        assert not torch.equal(out, bare)

    tiny.ksample(naive.watch_blocks(runtime.attach(model, link), look), P, N, steps=1)


def test_a_negative_reference_is_what_the_negative_prompt_sees_and_nothing_else(model, network):
    """With the null reference as negative nothing changes; without cfg it is never read."""
    a, b = REFERENCES[0], REFERENCES[3]
    nothing = Reference(a.null, a.null, a.encoders)
    plain = sample(model, network, a)
    assert close(sample(model, network, combine_references([a], (), "concatenate", None, nothing)), plain)
    away = sample(model, network, combine_references([a], (), "concatenate", None, b))
    assert not close(away, plain, 1e-4)
    without_cfg = [
        tiny.ksample(
            runtime.attach(model, dataclasses.replace(tiny.link_for(network, a), reference=reference)), P, N, cfg=1.0
        )
        for reference in (a, combine_references([a], (), "concatenate", None, b))
    ]
    assert torch.equal(*without_cfg)


def report_line(model, network, reference, start, **kwargs):
    reports = []
    link = dataclasses.replace(tiny.link_for(network, REFERENCES[0], **kwargs), reference=reference)
    gated = runtime.attach(model, link)
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    tiny.ksample(gated, P, N, steps=1)
    return next(line for line in reports[0].splitlines() if line.startswith(start)).rstrip(".")


def combined_by_node(parts, combine="concatenate", weights="", **kwargs):
    return FlexIPCombineReferences.execute(
        {f"reference_{i}": part for i, part in enumerate(parts)}, combine, weights, **kwargs
    ).args[0]


def test_other_weights_gates_strengths_or_ways_to_combine_project_nothing_again(model, network):
    parts = [tiny.tiny_reference(seed) for seed in (31, 32)]
    line = lambda reference, **kwargs: report_line(model, network, reference, "K/V", **kwargs)
    assert line(combined_by_node(parts)) == "K/V: 8 projected, 0 reused"
    for combine in ("concatenate", "average", "one per batch item", "one per region"):
        masks = {"masks": REGIONS} if combine == "one per region" else {}
        reference = combined_by_node(parts, combine, "0.3, 2", **masks)
        assert line(reference, gate=0.1, strength=0.4) == "K/V: 0 projected, 8 reused"
    assert line(parts[0]) == "K/V: 0 projected, 4 reused"


@pytest.mark.parametrize("combine", ["average", "one per batch item"])
def test_other_weights_for_pictures_that_are_taken_apart_project_nothing_again(model, network, combine):
    part = tiny.tiny_reference(33, pictures=2)
    line = lambda weights: report_line(model, network, combined_by_node([part], combine, weights), "K/V")
    assert line("1") == "K/V: 8 projected, 0 reused"
    assert line("2") == "K/V: 0 projected, 8 reused"


def test_the_report_counts_references_pictures_and_tokens(model, network):
    reference = combined_by_node(REFERENCES[:3], weights="1, 0.5, 2", negative=REFERENCES[3])
    line = report_line(model, network, reference, "reference:")
    assert (
        line
        == "reference: 6 picture(s) in 3 references, concatenate, weights 1, 0.5, 2, with a negative reference, tokens 42 + 231"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"parts": []}, "no reference is wired"),
        ({"weights": "1"}, "1 weights for 2 references"),
        ({"weights": "0, 0"}, "all weights are 0"),
        ({"weights": "1, -1"}, "weights must be numbers from 0 to 10"),
        ({"combine": "one per region"}, "needs masks"),
        ({"combine": "one per region", "masks": torch.ones(3, 8, 8)}, "3 masks for 2 references"),
        ({"masks": torch.ones(2, 8, 8)}, "only used by one per region"),
        ({"parts": [REFERENCES[0], dataclasses.replace(REFERENCES[1], needs=("other",))]}, "different adapters"),
        ({"negative": dataclasses.replace(REFERENCES[1], needs=("other",))}, "different adapters"),
        ({"parts": [combine_references(REFERENCES[:2], (), "average"), REFERENCES[0]]}, "another FlexIP Combine"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_cannot_be_combined_is_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=f"FlexIPCombineReferences: .*{message}"):
        combined_by_node(**{"parts": REFERENCES[:2], **arguments})
