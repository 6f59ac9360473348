"""Every preset and every list gives the strengths that its documentation says, for both adapters separately."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.network.adapters import ADAPTERS
from flexip_core.run.depth import LIST, PRESETS, STRONGEST, BlockStrengths, Spec, parse, spec


def layout(transformers: int = 1, **levels: dict[int, int]) -> dict[str, int]:
    """kind={block number: level} -> levels per address, in the order of execution."""
    return {
        f"{kind}.{number}.{index}": level
        for kind in ("input", "middle", "output")
        for number, level in levels.get(kind, {}).items()
        for index in range(transformers)
    }


SD15 = layout(
    input={1: 0, 2: 0, 4: 1, 5: 1, 7: 2, 8: 2},
    middle={0: 3},
    output={3: 2, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1, 9: 0, 10: 0, 11: 0},
)
SDXL = layout(  # two transformers in each block where the model has two or ten
    transformers=2,
    input={4: 1, 5: 1, 7: 2, 8: 2},
    middle={0: 2},
    output={0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1},
)
TINY = layout(input={1: 0, 3: 1}, middle={0: 1}, output={0: 1, 1: 1, 2: 0, 3: 0})
MODELS = {"SD1.5": SD15, "SDXL": SDXL, "tiny": TINY}
KINDS = ("input", "middle", "output")


def strengths(choice: str, levels: dict[str, int], text: str = "") -> dict[str, float]:
    chosen = spec("preservation", choice, text)
    return BlockStrengths(chosen, Spec("all")).resolve(levels)["preservation"]


def listed(text: str, levels: dict[str, int]) -> dict[str, float]:
    return strengths(LIST, levels, text)


def acting(resolved: dict[str, float]) -> dict[str, float]:
    """Blocks that act, with their strength; all transformers of a block must agree."""
    blocks: dict[str, set[float]] = {}
    for address, strength in resolved.items():
        blocks.setdefault(address.rpartition(".")[0], set()).add(strength)
    assert all(len(values) == 1 for values in blocks.values())
    return {block: values.pop() for block, values in blocks.items() if values != {0.0}}


def ones(kind: str, *numbers: int) -> dict[str, float]:
    return {f"{kind}.{number}": 1.0 for number in numbers}


DOCUMENTED = {
    ("SD1.5", "composition only"): {"input.7": 0.25, "input.8": 1.0},
    ("SD1.5", "style only"): ones("input", 1, 2, 4, 5) | ones("output", 5, 6, 7, 8, 9, 10, 11),
    ("SD1.5", "coarse"): ones("input", 7, 8) | ones("middle", 0) | ones("output", 3, 4, 5),
    ("SD1.5", "fine"): ones("input", 1, 2, 4, 5) | ones("output", 6, 7, 8, 9, 10, 11),
    ("SDXL", "composition only"): ones("input", 8),
    ("SDXL", "style only"): ones("output", 1),
    ("SDXL", "coarse"): ones("input", 7, 8) | ones("middle", 0) | ones("output", 0, 1, 2),
    ("SDXL", "fine"): ones("input", 4, 5) | ones("output", 3, 4, 5),
    ("tiny", "composition only"): ones("input", 3),
    ("tiny", "style only"): ones("output", 0, 1),
    ("tiny", "coarse"): ones("input", 3) | ones("middle", 0) | ones("output", 0, 1),
    ("tiny", "fine"): ones("input", 1) | ones("output", 2, 3),
}


@pytest.mark.parametrize("model, preset", DOCUMENTED)
def test_a_preset_acts_in_exactly_the_documented_blocks(model: str, preset: str) -> None:
    resolved = strengths(preset, MODELS[model])
    assert list(resolved) == list(MODELS[model])
    assert acting(resolved) == DOCUMENTED[model, preset]


@pytest.mark.parametrize("model", MODELS)
def test_the_preset_all_is_1_in_every_block(model: str) -> None:
    assert strengths("all", MODELS[model]) == dict.fromkeys(MODELS[model], 1.0)


@pytest.mark.parametrize("model", MODELS)
def test_coarse_and_fine_together_are_all_blocks_once(model: str) -> None:
    coarse, fine = strengths("coarse", MODELS[model]), strengths("fine", MODELS[model])
    assert {address: coarse[address] + fine[address] for address in coarse} == dict.fromkeys(MODELS[model], 1.0)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=20).filter(lambda levels: len(set(levels)) > 1))
def test_coarse_is_deeper_than_fine_and_gets_the_odd_level(depths: list[int]) -> None:
    levels = {f"output.{number}.0": level for number, level in enumerate(depths)}
    coarse = {levels[address] for address, strength in strengths("coarse", levels).items() if strength}
    fine = {levels[address] for address, strength in strengths("fine", levels).items() if strength}
    assert min(coarse) > max(fine) and coarse | fine == set(depths)
    assert len(coarse) - len(fine) in (0, 1)


def test_a_distilled_model_without_a_middle_is_known_by_its_other_blocks() -> None:
    ssd_1b = {address: level for address, level in SDXL.items() if not address.startswith("middle")}
    assert acting(strengths("style only", ssd_1b)) == ones("output", 1)
    assert acting(strengths("composition only", ssd_1b)) == ones("input", 8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", MODELS)
def test_the_two_adapters_are_independent(model: str, preset: str) -> None:
    levels = MODELS[model]
    chosen, other = spec("preservation", preset, ""), spec("personalization", LIST, "input=0.3, all=2")
    resolved = BlockStrengths(chosen, other).resolve(levels)
    swapped = BlockStrengths(other, chosen).resolve(levels)
    assert set(resolved) == set(ADAPTERS)
    assert resolved["preservation"] == swapped["personalization"] == strengths(preset, levels)
    assert resolved["personalization"] == swapped["preservation"]
    assert resolved["personalization"] == {a: 0.3 if a.startswith("input") else 2.0 for a in levels}


def test_the_list_of_the_documentation() -> None:
    resolved = acting(listed("input.4=0.5, output=1, middle=0, all=0.2", SD15))
    others = {"input.1": 0.2, "input.2": 0.2, "input.5": 0.2, "input.7": 0.2, "input.8": 0.2}
    assert resolved == {"input.4": 0.5} | others | ones("output", *range(3, 12))


def test_a_beginning_covers_whole_parts_of_an_address_only() -> None:
    assert acting(listed("output.1=0.5, all=0", SD15 | {"output.1.0": 2})) == {"output.1": 0.5}
    assert listed("output.1.1=0.5, all=0", SDXL) == {a: 0.5 * (a == "output.1.1") for a in SDXL}


def test_later_entries_win_and_all_stands_anywhere() -> None:
    assert acting(listed("all=0; output=2; output.3=1", TINY)) == {f"output.{n}": 2.0 for n in (0, 1, 2)} | ones(
        "output", 3
    )
    assert acting(listed("output.3=1\noutput=2\nall=0", TINY)) == {f"output.{n}": 2.0 for n in range(4)}
    assert listed("all=3, all=0.5", TINY) == dict.fromkeys(TINY, 0.5)


def test_unnamed_blocks_get_1() -> None:
    assert listed("middle=0", SD15) == {a: float(not a.startswith("middle")) for a in SD15}


@pytest.mark.parametrize(
    "text",
    [
        "input.4=0.5,output=2",
        " Input.4 = .5 ;; OUTPUT = 2.0 ;\n",
        "input.4=5e-1\n\noutput=2",
        "input.4＝0.5，output=2、",
    ],
)
def test_a_list_is_read_as_people_write_it(text: str) -> None:
    assert parse(text, "x") == (("input.4", 0.5), ("output", 2.0))


NAMES = st.one_of(
    st.just("all"),
    st.sampled_from(KINDS),
    st.sampled_from(sorted({a.rpartition(".")[0] for a in SDXL})),
    st.sampled_from(sorted(SDXL)),
)
ENTRIES = st.lists(st.tuples(NAMES, st.floats(0, STRONGEST, allow_subnormal=False)), min_size=1, max_size=12)


@given(ENTRIES, st.sampled_from([",", ";", "\n", " ,\n"]))
def test_any_list_gives_each_block_the_last_entry_that_names_it(
    entries: list[tuple[str, float]], separator: str
) -> None:
    text = separator.join(f"{name}={strength!r}" for name, strength in entries)
    assert parse(text, "x") == tuple(entries)
    for address, got in listed(text, SDXL).items():
        kind, number, _ = address.split(".")
        of_block = [s for name, s in entries if name in (kind, f"{kind}.{number}", address)]
        of_all = [s for name, s in entries if name == "all"]
        assert got == (of_block or of_all or [1.0])[-1]


@given(st.text(alphabet="abcdefilmnoptu.=,; \n0123456789-+_\u0663", max_size=40))
def test_any_text_is_a_list_or_one_sentence_that_names_the_input(text: str) -> None:
    try:
        entries = parse(text, "FlexIPBlocks: preservation_list")
    except ValueError as error:
        assert str(error).startswith("FlexIPBlocks: preservation_list ")
    else:
        assert entries and all(0 <= strength <= STRONGEST for _, strength in entries)


@pytest.mark.parametrize(
    "entry",
    ["input.4", "input.4=", "=1", "inptu.4=1", "down_blocks.2=1", "input.4.0.0=1", "input..4=1", "input.=1"]
    + ["all.0=1", "input.4=half", "input.4=-0.1", "input.4=5.01", "input.4=nan", "input.4=inf", "input=1=2", "0.5"],
)
def test_a_wrong_entry_is_quoted_with_what_was_expected(entry: str) -> None:
    with pytest.raises(ValueError, match="FlexIPBlocks: personalization_list has") as caught:
        spec("personalization", LIST, f"output=1, {entry}")
    assert repr(entry) in str(caught.value) and "from 0 to 5" in str(caught.value)


@pytest.mark.parametrize("text", ["", " \n", ",;"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="preservation_list is empty"):
        spec("preservation", LIST, text)


def test_a_list_is_read_only_when_the_choice_is_list() -> None:
    assert spec("preservation", "fine", "nonsense") == Spec("fine")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="personalization 'finest' is not a preset. Choose one of all, "):
        spec("personalization", "finest", "")


def test_an_address_that_the_model_does_not_have_is_named_beside_those_it_has() -> None:
    chosen = BlockStrengths(Spec("all"), spec("personalization", LIST, "input.4=1, input.3=0, output.0.7=1, all=0"))
    with pytest.raises(ValueError) as caught:
        chosen.resolve(SDXL)
    assert str(caught.value) == (
        "FlexIPBlocks: personalization_list names input.3, output.0.7, where this model has no cross-attention; its blocks are "
        "input.4.0-1, input.5.0-1, input.7.0-1, input.8.0-1, middle.0.0-1, "
        "output.0.0-1, output.1.0-1, output.2.0-1, output.3.0-1, output.4.0-1, output.5.0-1."
    )
    with pytest.raises(ValueError, match="its blocks are input.1.0, input.3.0, middle.0.0, output.0.0, "):
        listed("middle.1=1", TINY)


@pytest.mark.parametrize("preset", ["coarse", "fine"])
def test_coarse_and_fine_need_two_sizes(preset: str) -> None:
    with pytest.raises(
        ValueError, match=f"preservation is '{preset}', but all cross-attention blocks of this model work"
    ):
        strengths(preset, dict.fromkeys(TINY, 1))


@pytest.mark.parametrize("preset, kind", [("composition only", "input"), ("style only", "output")])
def test_composition_and_style_need_blocks_on_their_side(preset: str, kind: str) -> None:
    others = {address: level for address, level in TINY.items() if not address.startswith(kind)}
    with pytest.raises(ValueError, match=f"preservation is '{preset}', but this model has no .* in its {kind} blocks"):
        strengths(preset, others)


def test_in_words_names_every_block_and_transformers_where_they_differ() -> None:
    levels = layout(transformers=5, input={4: 1, 5: 1}, middle={0: 2}, output={1: 2})
    chosen = BlockStrengths(
        spec("preservation", LIST, "output.1.1=0.5, output.1.3=2, output.1.4=2, middle=0"), Spec("fine")
    )
    assert chosen.in_words(levels) == [
        "preservation: 2 in output.1.3-4; 1 in input.4, input.5, output.1.0, output.1.2; 0.5 in output.1.1; 0 elsewhere",
        "personalization: 1 in input.4, input.5; 0 elsewhere",
    ]
    nothing = BlockStrengths(Spec("all"), spec("personalization", LIST, "all=0"))
    assert nothing.in_words(levels) == ["preservation: 1 in every block", "personalization: 0 elsewhere"]


def test_equal_choices_are_equal_values() -> None:
    one, other = (
        BlockStrengths(spec("preservation", LIST, text), Spec("fine")) for text in ("input=1,all=0", "input=1; all=0")
    )
    assert one == other and len({one, other}) == 1
