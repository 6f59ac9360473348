"""The mini world: captions say what pictures show, tests show what training never does, pairs are what the gate is to tell apart."""

from __future__ import annotations

import colorsys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.mini_world import world
from flexip_core.mini_world.pairs import WorldPairs
from flexip_core.training.data import INVARIANT, VARIANT


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rendering_is_a_function_of_the_generator():
    scene = world.draw_subjects(20, generator(1))
    first, second = (world.render(scene, generator(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, world.render(scene, generator(3))[0])


def test_pictures_show_the_two_hues_of_their_subject():
    scene = world.draw_subjects(200, generator(4))
    pictures, inside = world.render(scene, generator(5))
    for picture, mask, hues in zip(pictures, inside[:, 0], scene.hues):
        rows = mask.nonzero()[:, 0]
        colours = (picture * 0.5 + 0.5)[:, mask].T.tolist()
        seen = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in colours])
        for row, hue in ((rows.min(), hues[0]), (rows.max(), hues[1])):
            apart = (seen[rows == row] - hue).abs()
            assert torch.minimum(apart, 1 - apart).max() < 2e-3


def test_subjects_stand_in_their_corner():
    scene = world.draw_subjects(200, generator(6))
    weights = world.render(scene, generator(7))[1][:, 0].float()
    axis, total = torch.arange(16.0), weights.sum((1, 2))
    y, x = weights.sum(2) @ axis / total, weights.sum(1) @ axis / total
    assert torch.equal(x > 7.5, (scene.corner % 2).bool())
    assert torch.equal(y > 7.5, scene.corner >= 2)


def test_moving_changes_ground_and_corner_and_nothing_else():
    scene = world.draw_subjects(500, generator(8))
    moved = world.move(scene, generator(9))
    assert (moved.ground != scene.ground).all() and (moved.corner != scene.corner).all()
    assert moved.ground.max() == 5 and moved.corner.max() == 3 and moved.ground.min() == moved.corner.min() == 0
    assert torch.equal(moved.hues, scene.hues) and torch.equal(moved.shape, scene.shape)


def test_tests_show_only_subjects_that_training_never_does():
    pairs, g = WorldPairs(), generator(10)
    trained = world.draw_subjects(5000, g)
    assert not world.is_held_out(trained.hues).any()
    tests = world.test_set(200, 11)
    assert world.is_held_out(tests.seen.hues).all()
    assert pairs.views()["every subject"] >= 2 and pairs.pictures() > 0
    # the held-out part of the plane is a sixth: neither a corner of it nor nearly all
    assert 0.1 < world.is_held_out(torch.rand(5000, 2, generator=g)).float().mean() < 0.25


def test_the_two_hues_of_a_subject_differ():
    hues = world.draw_subjects(2000, generator(12)).hues
    apart = (hues[:, 0] - hues[:, 1]).abs()
    assert torch.minimum(apart, 1 - apart).min() > 0.19


def test_prompts_never_name_the_hue_and_conflict_with_the_reference():
    tests = world.test_set(100, 13)
    conflict, omit = tests.prompts("conflict"), tests.prompts("omit")
    assert (conflict[:, world.HUE] == 0).all() and (omit[:, world.HUE] == 0).all()
    assert (omit[:, [world.GROUND, world.CORNER]] == 0).all()
    assert torch.equal(omit[:, world.SHAPE], world.captions(tests.seen)[:, world.SHAPE])
    reference = world.captions(tests.seen)
    for slot in (world.GROUND, world.CORNER):
        assert (conflict[:, slot] != reference[:, slot]).all() and (conflict[:, slot] > 0).all()


captions = st.tuples(
    *(
        st.one_of(st.just(0), st.integers(world.FIRST[slot], world.FIRST[slot] + len(world.WORDS[slot]) - 1))
        for slot in world.SLOTS
    )
)


@given(captions)
def test_a_caption_survives_being_written_and_read(caption):
    caption = torch.tensor(caption)
    assert torch.equal(world.read_words(world.in_words(caption)), caption)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A RED disc, Top-Left, on sand", "a red disc on sand, top left"),
        ("a photo of my (blue:1.2) cross in the jungle", "a blue cross"),
        ("disc, no: a square", "a square"),
        ("crossing the nightmare", "a"),
        ("", "a"),
    ],
)
def test_prompts_are_read_as_people_write_them(text, words):
    assert world.in_words(world.read_words(text)) == words


def test_every_word_has_its_own_number():
    numbers = {world.FIRST[slot] + index for slot in world.SLOTS for index in range(len(world.WORDS[slot]))}
    assert numbers == set(range(1, world.VOCABULARY))


def test_variant_pairs_show_the_subject_elsewhere_and_invariant_ones_the_target():
    kinds = torch.tensor([VARIANT, INVARIANT] * 200)
    batch = WorldPairs().batch(kinds, generator(14))
    same = (batch.targets - batch.references).abs().flatten(1)
    invariant, variant = same[kinds == INVARIANT], same[kinds == VARIANT]
    whole = invariant.amax(1) == 0
    assert 0.6 < whole.float().mean() < 0.95
    assert (variant.mean(1) > 0.05).all()
    cut = batch.references[kinds == INVARIANT][~whole]
    assert (cut[:, :, 0, 0] == 1).float().mean() > 0.9  # white around the subject


def test_a_batch_is_a_function_of_its_generator():
    kinds = torch.tensor([VARIANT, INVARIANT] * 8)
    first, second = (WorldPairs().batch(kinds, generator(15)) for _ in range(2))
    for name in ("targets", "references", "captions", "kinds"):
        assert torch.equal(getattr(first, name), getattr(second, name))
