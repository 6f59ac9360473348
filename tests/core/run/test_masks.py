"""Masks from any size to one number per image token, cell by cell."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexip_core.pictures.crop import as_masks
from flexip_core.run.masks import for_rows, on_grid, on_latent

SIDES = st.integers(1, 40)
SIZES = st.tuples(SIDES, SIDES)
LATENTS = st.tuples(st.integers(1, 17), st.integers(1, 17))


def random_mask(seed, *shape):
    """A third black, a third white, the rest grey."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g) * 3 - 1).clamp(0, 1)


def touched(pixels, cells, cell):
    """Pixels that a cell shares some of its extent with."""
    return range(cell * pixels // cells, math.ceil((cell + 1) * pixels / cells))


@given(SIZES, LATENTS, st.integers(0, 99))
@example((3, 500), (8, 8), 0)
@example((1, 1), (9, 13), 1)
@example((4, 4), (8, 8), 2)
@example((512, 768), (64, 96), 3)
def test_a_latent_cell_is_the_mean_of_the_pixels_that_it_touches(size, latent, seed):
    mask = random_mask(seed, *size)
    cells = on_latent(mask[None], *latent)[0]
    assert cells.shape == latent
    for row in {0, latent[0] // 2, latent[0] - 1}:
        for column in range(latent[1]):
            seen = mask[list(touched(size[0], latent[0], row))][:, list(touched(size[1], latent[1], column))]
            assert float(cells[row, column]) == pytest.approx(float(seen.mean()), abs=1e-5)
            if not seen.any():
                assert cells[row, column] == 0


@given(SIZES, LATENTS)
def test_white_stays_exactly_one_and_black_exactly_zero(size, latent):
    assert (on_latent(torch.zeros(1, *size), *latent) == 0).all()
    assert (on_latent(torch.ones(1, *size), *latent) - 1).abs().max() < 1e-6


@given(LATENTS, st.integers(0, 3), st.integers(0, 99))
@example((9, 13), 2, 0)
@example((1, 1), 3, 1)
def test_a_token_is_the_mean_of_its_cells_on_the_grid_that_the_unet_has(latent, level, seed):
    cells = random_mask(seed, 2, *latent)
    tokens = on_grid(cells, level)
    image = torch.zeros(1, 1, *latent)
    for _ in range(level):  # as the UNet halves it
        image = torch.nn.functional.conv2d(image, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    assert tokens.shape == (2, *image.shape[2:])
    side = 2**level
    for row in range(tokens.shape[1]):
        for column in range(tokens.shape[2]):
            own = cells[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            torch.testing.assert_close(tokens[:, row, column], own.mean(dim=(1, 2)))
            assert ((tokens[:, row, column] == 0) == (own == 0).all(dim=2).all(dim=1)).all()


@given(st.data(), LATENTS, st.integers(1, 5), st.integers(0, 99))
def test_every_row_sees_its_own_part_of_its_own_mask(data, latent, masks, seed):
    """Areas, tiles and windows may lie anywhere and may skip rows and columns."""
    count = data.draw(st.integers(1, 4))
    height, width = data.draw(st.integers(1, latent[0])), data.draw(st.integers(1, latent[1]))
    whole = random_mask(seed, masks, *latent)
    views, items = [], []
    for _ in range(count):
        rows = data.draw(st.lists(st.integers(0, latent[0] - 1), min_size=height, max_size=height))
        columns = data.draw(st.lists(st.integers(0, latent[1] - 1), min_size=width, max_size=width))
        views.append((tuple(rows), tuple(columns)))
        items.append(data.draw(st.integers(0, 9)))
    seen = for_rows(whole, items, views, height, width)
    assert seen.shape == (count, height, width)
    for number, (item, (rows, columns)) in enumerate(zip(items, views)):
        expected = [[whole[item % masks][r][c] for c in columns] for r in rows]
        assert seen[number].tolist() == [[float(value) for value in line] for line in expected]


@given(LATENTS, LATENTS, st.integers(1, 3), st.integers(1, 4))
def test_without_a_view_the_mask_lies_over_all_that_a_call_shows(latent, call, masks, rows):
    whole = random_mask(1, masks, *latent)
    seen = for_rows(whole, range(rows), [None] * rows, *call)
    for number in range(rows):
        assert torch.equal(seen[number], on_latent(whole[number % masks][None], *call)[0])


@pytest.mark.parametrize(
    "shape, count", [((5, 7), 1), ((3, 5, 7), 3), ((3, 1, 5, 7), 3), ((3, 5, 7, 1), 3), ((1, 1, 1, 1), 1), ((1, 1), 1)]
)
def test_masks_of_two_to_four_dimensions_are_a_batch(shape, count):
    mask = random_mask(0, *shape)
    masks = as_masks(mask, "mask")
    assert masks.shape == (count, *(side for side in (5, 7) if 5 in shape)) or masks.shape == (count, 1, 1)
    assert torch.equal(masks.flatten(), mask.flatten())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_masks_of_any_type_become_numbers_from_zero_to_one(dtype):
    masks = as_masks(torch.tensor([[0, 1], [1, 0]]).to(dtype), "mask")
    assert masks.dtype == torch.float32 and masks.tolist() == [[[0, 1], [1, 0]]]
    assert as_masks(torch.tensor([[-2.0, 3.0]]), "mask").tolist() == [[[0, 1]]]


def test_the_users_mask_is_never_changed():
    mask = torch.tensor([[-2.0, 3.0, 0.5]])
    as_masks(mask, "mask")
    assert mask.tolist() == [[-2, 3, 0.5]]


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(5), "shape"),
        (torch.zeros(1, 1, 1, 5, 5), "shape"),
        (torch.zeros(0, 5), "no pixels"),
        (torch.tensor([[float("nan"), 1.0]]), "not numbers"),
        (torch.tensor([[float("inf"), 1.0]]), "not numbers"),
        ("white", "shape"),
    ],
    ids=["one dimension", "five", "empty", "nan", "infinite", "text"],
)
def test_what_is_no_mask_is_a_sentence(mask, message):
    with pytest.raises(ValueError, match=f"The mask .*{message}.*connect"):
        as_masks(mask, "The mask")
