"""Scenes, captions and layers of the world of characters, on eight characters that lie in the repository."""

from __future__ import annotations

import eight_characters
import pytest
import torch

from flexip_core.characters import codec, drawings, render, scenes, words


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def layers() -> drawings.Drawings:
    return drawings.load(eight_characters.FILE)


def shown(**other: int) -> scenes.Scenes:
    """The eight, staged plainly; `other` words for all of them."""
    staged = scenes.stage(eight_characters.people(), generator(0), own_style=1.0)
    plain = {"pattern": 0, "place": 0, **other}
    return staged.but(
        expression=eight_characters.expressions(),
        **{slot: torch.full((8,), number) for slot, number in plain.items()},
    )


def colour(hexes: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(hexes))) / 255 * 2 - 1


def share_of(picture: torch.Tensor, hexes: str) -> float:
    """Share of the pixels (3, h, w) that have this colour."""
    return ((picture - colour(hexes).view(3, 1, 1)).abs().amax(0) < 0.03).float().mean().item()


def test_skin_clothes_and_ground_have_their_colours(layers):
    staged = shown(ground=0, clothes=3, style=0, place=1)
    for picture, skin in zip(render.render(layers, staged), staged["skin"].tolist()):
        assert share_of(picture, words.SKINS[skin]) > 0.02
        assert share_of(picture, words.CLOTHES["green"]) > 0.01
        assert share_of(picture, words.GROUNDS["white"]) > 0.1


def test_ink_has_no_colours_on_the_figure(layers):
    pictures = render.render(layers, shown(ground=0, style=words.STYLES.index("ink")))
    assert (pictures.amax(1) - pictures.amin(1)).max() < 0.05


def test_every_style_draws_the_same_character_otherwise(layers):
    drawn = [render.render(layers, shown(style=number)) for number in range(len(words.STYLES))]
    for one in range(len(drawn)):
        for other in range(one):
            assert (drawn[one] - drawn[other]).abs().mean() > 0.02


def test_the_head_fills_a_third_wherever_it_is(layers):
    skin = 0
    for place in range(len(words.PLACES)):
        staged = shown(place=place, ground=5, style=0, skin=skin, hair=words.HAIR.index("noHair1"), glasses=0, beard=0)
        picture = render.render(layers, staged)[0]
        rows = ((picture - colour(words.SKINS[skin]).view(3, 1, 1)).abs().amax(0) < 0.1).any(1)
        assert rows.sum() > picture.shape[1] / 3


def test_captions_say_what_is_shown_and_are_read_back():
    staged = scenes.stage(scenes.characters(300, generator(1)), generator(2))
    captions = words.prompts(scenes.captions(staged))
    assert (captions[:, -len(words.IDENTITY) :] == 0).all()
    for caption in captions:
        assert torch.equal(words.read_words(words.in_words(caption)), caption)


def test_words_of_a_person_are_understood_in_any_order():
    caption = words.read_words("pencil sketch of a person, smiling, on yellow with dots, in a green shirt")
    assert words.in_words(caption) == "a person smiling, in a green shirt, pencil sketch, on yellow with dots"
    assert not words.read_words("nothing that the world knows").any()


def test_no_training_character_is_held_out_and_none_has_held_out_hair():
    everyone = {split: scenes.characters(2000, generator(3), split) for split in ("train", "test", "hard", "judge")}
    assert not scenes.is_held_out(everyone["train"]).any() and not scenes.has_hard_hair(everyone["train"]).any()
    assert scenes.is_held_out(everyone["test"]).all() and not scenes.has_hard_hair(everyone["test"]).any()
    assert scenes.is_held_out(everyone["hard"]).all() and scenes.has_hard_hair(everyone["hard"]).all()
    assert not scenes.is_held_out(everyone["judge"]).any() and scenes.has_hard_hair(everyone["judge"]).any()
    for part in ("skin", "hair colour", "glasses", "beard"):  # every value on both sides
        assert everyone["train"][part].unique().equal(everyone["test"][part].unique())


def test_held_out_are_one_in_ten():
    any_characters = {
        part: torch.randint(len(words.WORDS[part]), (50_000,), generator=generator(4)) for part in words.IDENTITY
    }
    assert 0.09 < scenes.is_held_out(any_characters).float().mean() < 0.11


def test_latents_keep_the_drawing(layers):
    staged = scenes.stage(eight_characters.people(), generator(5)).but(expression=eight_characters.expressions())
    pictures = render.render(layers, staged)
    learned = codec.Codec.learned(render.render(layers, shown()))
    error = (learned.decode(learned.encode(pictures)) - pictures).square().mean()
    assert 10 * torch.log10(4 / error) > 28  # dB; of all components 37 with the world's 512 pictures


def test_drawings_of_another_version_are_refused(tmp_path, layers):
    fewer = drawings.Drawings({**layers.layers, "face": layers.layers["face"][:-1]})
    drawings.save(fewer, tmp_path / "fewer.npz")
    with pytest.raises(ValueError, match="holds no face of shape"):
        drawings.load(tmp_path / "fewer.npz")
    with pytest.raises(ValueError, match="is missing; unpack @dicebear/open-peeps 9.4.3"):
        drawings.make(tmp_path)
