"""Reference pictures become squares without a wrong aspect, whatever their shape, and nonsense is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.pictures.crop import CROPS, GROUND, normalise, prepare

GREY = torch.tensor(GROUND)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


def disc(height: int, width: int, radius: float) -> torch.Tensor:
    """A white disc in the middle of a black picture: shows a wrong aspect."""
    y, x = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width)[None] - (width - 1) / 2
    return ((y**2 + x**2).sqrt() < radius).float()[..., None].expand(-1, -1, 3)


def extent(square: torch.Tensor, level: float = 0.75) -> tuple[int, int]:
    """Height and width of what is brighter than `level`."""
    bright = square.amax(-1) > level
    return int(bright.any(1).sum()), int(bright.any(0).sum())


def box_mask(height: int, width: int, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    channels=st.sampled_from([1, 3, 4]),
    size=st.sampled_from([1, 14, 32]),
    crop=st.sampled_from(CROPS),
    mask_dims=st.integers(0, 4),
    mask_height=st.integers(1, 40),
    mask_width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_picture_becomes_a_square_of_legal_colours(
    height, width, channels, size, crop, mask_dims, mask_height, mask_width, seed
):
    image = picture(height, width, channels, seed)
    mask = picture(mask_height, mask_width, 1, seed)[..., 0] if mask_dims >= 2 else None
    while mask is not None and mask.ndim < mask_dims:
        mask = mask[None]
    if crop == "subject" and mask is None and channels != 4:
        with pytest.raises(ValueError, match="connect a mask"):
            prepare(image, mask, crop, size)
        return
    before = image.clone()
    square = prepare(image, mask, crop, size)
    assert square.shape == (size, size, 3) and square.dtype == torch.float32
    assert 0 <= square.min() and square.max() <= 1
    assert torch.equal(image, before)
    assert torch.equal(square, prepare(image, mask, crop, size))
    if channels == 1:
        assert torch.allclose(square[..., 0], square[..., 2])


@given(height=st.integers(1, 60), width=st.integers(1, 60), value=st.floats(0, 1), crop=st.sampled_from(CROPS[:3]))
def test_a_plain_picture_stays_plain(height, width, value, crop):
    square = prepare(torch.full((height, width, 3), value), None, crop, 28)
    away = (square - value).abs() > 1e-4
    if crop == "pad":  # only the ground may differ, in whole bars
        away &= (square - GREY).abs() > 1e-4
        blend = away.any(-1)
        assert not blend.any()
    else:
        assert not away.any()


@pytest.mark.parametrize("height, width", [(120, 60), (60, 120), (60, 60), (180, 61)])
def test_no_crop_but_squash_changes_the_proportions(height, width):
    image = disc(height, width, 20)
    subject = image[..., 0]
    for crop in CROPS:
        tall, wide = extent(prepare(image, subject, crop, 112))
        if crop == "squash":
            assert abs(tall / wide - width / height) < 0.15
        else:
            assert abs(tall - wide) <= 2, (crop, tall, wide)


def test_center_keeps_the_middle_and_loses_the_ends():
    image = torch.zeros(40, 120, 3)
    image[:, :40, 0], image[:, 40:80, 1], image[:, 80:, 2] = 1, 1, 1
    middle = prepare(image, None, "center", 40)
    assert middle[:, 3:-3, 1].min() > 0.99 and middle[:, 3:-3, [0, 2]].max() < 0.01
    whole = prepare(image, None, "pad", 120)
    assert torch.equal(whole[40:80], image) and torch.all(whole[:40] == GREY) and torch.all(whole[80:] == GREY)


@pytest.mark.parametrize("crop", CROPS)
def test_shrinking_averages_instead_of_skipping_pixels(crop):
    stripes = (torch.arange(256) % 8 == 0).float()[:, None, None].expand(-1, 256, 3)  # one bright line in eight
    square = prepare(stripes, torch.ones(2, 2), crop, 32)
    assert (square - 1 / 8)[2:-2].abs().max() < 0.01


def test_transparent_pixels_show_the_neutral_ground_whatever_their_colour():
    image = torch.ones(20, 20, 4)
    image[..., 1:3] = 0
    image[:, 10:, 3] = 0
    image[0, 0, 3] = 0.5
    square = prepare(image, None, "center", 20)
    assert torch.all(square[:, 10:] == GREY)
    assert torch.equal(square[5, 5], torch.tensor([1.0, 0, 0]))
    assert torch.equal(square[0, 0], torch.tensor([0.75, 0.25, 0.25]))


def test_a_wired_mask_leaves_the_other_crops_alone():
    image, mask = picture(30, 50), torch.zeros(30, 50)
    for crop in ("center", "pad", "squash"):
        assert torch.equal(prepare(image, mask, crop, 28), prepare(image, None, crop, 28))


@pytest.mark.parametrize("top, left", [(0, 0), (40, 10), (70, 170), (35, 90)])
def test_the_subject_is_whole_and_has_its_margin(top, left):
    image, mask = torch.zeros(100, 200, 3), box_mask(100, 200, top, top + 30, left, left + 20)
    image[mask > 0] = 1
    square = prepare(image, mask, "subject", 78)  # 30 px + 2 x 15 % = 39 px, shown twice as large
    tall, wide = extent(square, 0.5)
    assert abs(tall - 60) <= 2 and abs(wide - 40) <= 2
    assert square.max() > 0.99 and not torch.any((square - GREY).abs().amax(-1)[2:-2, 2:-2].eq(0))  # no ground inside


def test_the_subject_square_is_padded_only_where_the_picture_ends():
    image = torch.ones(20, 200, 3)
    square = prepare(image, box_mask(20, 200, 0, 20, 50, 110), "subject", 78)  # 78 px wide, the picture only 20 high
    assert torch.all(square[:28] == GREY) and torch.all(square[-28:] == GREY)
    assert torch.all(square[30:-30] == 1)


def test_a_mask_of_another_size_is_stretched_to_the_picture():
    image, mask = picture(80, 160), box_mask(80, 160, 40, 60, 80, 120)
    small = box_mask(8, 8, 4, 6, 4, 6)
    whole = prepare(image, mask, "subject", 28)
    assert torch.equal(whole, prepare(image, small, "subject", 28))
    for shaped in (small[None], small[None, None], small[None, ..., None], small[None].double(), small.bool()):
        assert torch.equal(whole, prepare(image, shaped, "subject", 28))


def test_a_faint_or_soft_mask_counts_by_its_brightest_part():
    image, mask = picture(50, 50), box_mask(50, 50, 10, 20, 10, 20)
    soft = 0.1 * mask + 0.02 * (1 - mask)
    assert torch.equal(prepare(image, soft, "subject", 28), prepare(image, mask, "subject", 28))


def test_alpha_is_the_subject_unless_a_mask_is_wired():
    alpha, mask = box_mask(60, 60, 5, 25, 5, 25), box_mask(60, 60, 30, 50, 30, 50)
    image = torch.cat([picture(60, 60), alpha[..., None]], -1)
    by_alpha = prepare(image, None, "subject", 28)
    assert torch.equal(by_alpha, prepare(image, alpha, "subject", 28))
    by_mask = prepare(image, mask, "subject", 28)  # all transparent there
    assert torch.allclose(by_mask[3:], GREY) and not torch.allclose(by_alpha[3:], GREY)


@pytest.mark.parametrize("shape", [(16384, 1, 3), (1, 16384, 4), (1, 1, 1), (2, 4096, 3)])
@pytest.mark.parametrize("crop", CROPS)
def test_strips_and_single_pixels_work(shape, crop):
    assert prepare(torch.rand(shape), torch.ones(4, 4), crop, 28).shape == (28, 28, 3)


def test_long_strips_keep_their_middle():
    image = torch.zeros(2, 4097, 3)
    image[:, 2048] = 1
    column = prepare(image, None, "center", 28).mean((0, 2))
    assert column.argmax() in (13, 14) and abs(column[:14].sum() - column[14:].sum()) < 0.05


GOOD = torch.rand(8, 8, 3)
NAN = torch.full((8, 8), float("nan"))


@pytest.mark.parametrize(
    "image, mask, crop, words",
    [
        (GOOD.clone().fill_(float("inf")), None, "center", ["not numbers", "another picture"]),
        (torch.full((8, 8, 4), float("nan")), None, "pad", ["not numbers"]),
        (GOOD, NAN, "subject", ["mask", "not numbers"]),
        (GOOD, NAN, "center", ["mask", "not numbers"]),
        (GOOD[None], None, "center", ["(1, 8, 8, 3)", "connect an image"]),
        (GOOD[..., 0], None, "center", ["(8, 8)"]),
        (GOOD[..., :2], None, "center", ["(8, 8, 2)"]),
        (torch.rand(8, 8, 5), None, "center", ["(8, 8, 5)"]),
        (GOOD[:0], None, "center", ["empty", "8 x 0"]),
        ((GOOD * 255).byte(), None, "center", ["0 to 1"]),
        ("cat.png", None, "center", ["connect an image"]),
        (GOOD, torch.ones(8), "subject", ["mask", "(8,)"]),
        (GOOD, torch.ones(0, 8), "subject", ["mask has no pixels"]),
        (GOOD, "mask", "subject", ["mask", "str"]),
        (GOOD, torch.zeros(8, 8), "subject", ["mask is empty", "another crop"]),
        (torch.cat([GOOD, torch.zeros(8, 8, 1)], -1), None, "subject", ["empty"]),
        (GOOD, None, "subject", ["connect a mask", "another crop"]),
        (GOOD, None, "zoom", ["'zoom'", "center, pad, squash, subject"]),
    ],
)
def test_what_is_no_picture_or_mask_gets_one_sentence(image, mask, crop, words):
    with pytest.raises(ValueError) as error:
        prepare(image, mask, crop, 28)
    text = str(error.value)
    assert all(word in text for word in words) and text.endswith(".") and "\n" not in text, text


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_a_senseless_size_is_refused(size):
    with pytest.raises(ValueError, match="whole number"):
        prepare(GOOD, None, "center", size)


def test_normalise_rounds_to_eight_bit_and_puts_channels_first():
    images = torch.tensor([[[[0.0, 0.5, 1.0]]], [[[0.501, 2.0, -1.0]]]])
    pixels = normalise(images, (0.0, 0.5, 0.5), (1.0, 0.5, 0.25))
    assert pixels.shape == (2, 3, 1, 1)
    expected = torch.tensor([[0, (128 / 255 - 0.5) / 0.5, 2.0], [128 / 255, 1.0, -2.0]])
    torch.testing.assert_close(pixels[:, :, 0, 0], expected)
