"""Pairs by kind of data, dropped phrases, and data that cannot be trained on."""

import pytest
import torch
import training_fakes as fakes
from picture_pairs import PicturePairs, crops

from flexip_core.training.config import DropoutConfig
from flexip_core.training.data import INVARIANT, VARIANT, check_source, drop_phrases


def coloured(subjects, views=None):
    """Pictures whose red is the subject (-1: loose) and whose green is the picture's number."""
    n = len(subjects)
    pictures = torch.zeros(n, 3, 8, 8)
    pictures[:, 0] = torch.tensor(subjects, dtype=torch.float32).view(-1, 1, 1)
    pictures[:, 1] = torch.arange(n, dtype=torch.float32).view(-1, 1, 1)
    captions = torch.arange(n).view(-1, 1).expand(-1, 2)
    return PicturePairs(pictures, captions, torch.tensor(subjects), whole=1.0)


def kinds_of(value, n=400):
    return torch.full((n,), value)


def test_variant_pairs_are_two_views_of_one_subject_and_all_of_them_come():
    source = coloured([5, -1, 5, 2, 2, -1, 2])
    batch = source.batch(kinds_of(VARIANT), fakes.generator(0))
    subject, number = batch.targets[:, :2, 0, 0].T
    reference_subject, reference_number = batch.references[:, :2, 0, 0].T
    assert torch.equal(subject, reference_subject) and (subject >= 0).all()
    assert (number != reference_number).all()
    seen = {tuple(pair) for pair in torch.stack([reference_number, number], 1).int().tolist()}
    assert seen == {(0, 2), (2, 0), *((a, b) for a in (3, 4, 6) for b in (3, 4, 6) if a != b)}
    assert torch.equal(batch.captions[:, 0].float(), number), "the caption describes the target"
    share = (subject == 5).float().mean()
    assert 0.4 < share < 0.6, "subjects come alike, however many pictures they have"


def test_invariant_pairs_are_made_from_the_target_and_use_every_picture():
    source = coloured([5, -1, 5, 2, 2, -1, 2])
    batch = source.batch(kinds_of(INVARIANT), fakes.generator(0))
    assert torch.equal(batch.references, batch.targets)
    assert set(batch.targets[:, 1, 0, 0].int().tolist()) == set(range(7))


def test_an_invariant_reference_is_a_part_of_its_target():
    source = fakes.pairs()
    source.crop, source.whole = (0.25, 0.25), 0.0
    batch = source.batch(kinds_of(INVARIANT, 20), fakes.generator(1))
    assert (batch.references != batch.targets).flatten(1).any(1).all()
    assert batch.references.amax() <= batch.targets.amax() and batch.references.amin() >= batch.targets.amin()
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)
    part = crops(ramp, torch.tensor([0.25, 0.25]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(part[0, 0, 0, [0, -1]], torch.tensor([-1.0, 0.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(part[1, 0, 0, [0, -1]], torch.tensor([0.0, 1.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(crops(ramp, torch.ones(2), torch.rand(2, 2)), ramp)


def test_kinds_may_be_mixed_and_a_batch_leaves_the_pictures_as_they_are():
    source = coloured([0, 0, 1, 1])
    before = source.all.clone()
    kinds = torch.tensor([VARIANT, INVARIANT] * 20)
    source.whole = 0.0
    batch = source.batch(kinds, fakes.generator(0))
    same = (batch.targets[:, 1, 4, 4] - batch.references[:, 1, 4, 4]).abs() < 0.5
    assert torch.equal(same, kinds == INVARIANT)
    assert torch.equal(source.all, before) and torch.equal(batch.kinds, kinds)


def test_a_batch_is_a_function_of_its_generator():
    source, kinds = fakes.pairs(), torch.tensor([VARIANT, INVARIANT] * 8)
    torch.manual_seed(0)
    one = source.batch(kinds, fakes.generator(4))
    torch.manual_seed(1)
    again, other = source.batch(kinds, fakes.generator(4)), source.batch(kinds, fakes.generator(5))
    assert torch.equal(one.references, again.references) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.targets, other.targets)


def test_captions_may_be_texts():
    pictures, subjects = torch.zeros(2, 3, 4, 4), torch.tensor([0, 0])
    source = PicturePairs(pictures, [("a dog", "in snow"), ("a dog", "on grass", "at night")], subjects)
    captions = source.batch(kinds_of(VARIANT, 30), fakes.generator(0)).captions
    assert set(captions) == {("a dog", "in snow"), ("a dog", "on grass", "at night")}


def test_phrases_are_dropped_one_by_one_at_their_own_rates():
    n = 20000
    cfg = DropoutConfig(phrase=0.1, phrases={"ground": 0.5, "corner": 1.0})
    captions = torch.arange(1, 4).expand(n, -1)
    got = drop_phrases(captions, fakes.PHRASES, cfg, fakes.generator(0))
    gone = got == 0
    assert ((got == captions) | gone).all()
    rates = gone.double().mean(0)
    torch.testing.assert_close(rates, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), atol=0.012, rtol=0)
    both = (gone[:, 0] & gone[:, 1]).double().mean()
    assert abs(both - rates[0] * rates[1]) < 0.01, "independent of each other"


def test_phrases_of_texts_are_dropped_too():
    captions = [("a dog", "in snow"), ("a cat",)] * 3000
    got = drop_phrases(captions, (), DropoutConfig(phrase=0.3), fakes.generator(0))
    assert {c for c in got[::2]} == {("a dog", "in snow"), ("a dog",), ("in snow",), ()}
    kept = sum(map(len, got)) / sum(map(len, captions))
    assert abs(kept - 0.7) < 0.02
    assert drop_phrases(captions, (), DropoutConfig(phrase=0), fakes.generator(0)) == captions


@pytest.mark.parametrize(
    "subjects, changes, message",
    [
        ([0, 0, 1], {}, "subject '1' has one picture"),
        ([-1, -1], {}, "there is no subject for variant data"),
        ([], dict(mix=0.0), "there is no picture for invariant data"),
        ([0, 0], dict(dropout=DropoutConfig(phrases={"hue": 0.5})), "dropout.phrases names 'hue'"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_a_sentence(subjects, changes, message):
    source = coloured(subjects)
    with pytest.raises(ValueError, match=message) as error:
        check_source(source, fakes.config("run", **changes))
    assert "\n" not in str(error.value)


def test_only_what_the_mix_needs_must_be_there():
    check_source(coloured([-1]), fakes.config("run", mix=0.0))
    check_source(coloured([0, 0]), fakes.config("run", mix=1.0))


def test_pictures_captions_and_subjects_must_be_as_many():
    with pytest.raises(ValueError, match="2 pictures, 1 captions and 2 subject numbers"):
        PicturePairs(torch.zeros(2, 3, 4, 4), [("a",)], torch.zeros(2))
