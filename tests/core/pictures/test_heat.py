"""Values as colours, alone and over a picture."""

import torch

from flexip_core.pictures.heat import heat, overlay


def test_heat_runs_from_dark_to_light_and_never_back():
    colours = heat(torch.linspace(-0.1, 1.1, 200))
    assert colours.shape == (200, 3) and colours.min() >= 0 and colours.max() <= 1
    lightness = colours @ torch.tensor([0.299, 0.587, 0.114])
    assert lightness.diff().ge(-1e-6).all() and lightness[0] < 0.02 and lightness[-1] > 0.9


def test_the_picture_stays_visible_under_the_heat():
    pictures = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 1.0):
        over = overlay(pictures, torch.full((2, 4, 5), value))
        assert over.shape == pictures.shape and over.min() >= 0 and over.max() <= 1
        grey = pictures @ torch.tensor([0.299, 0.587, 0.114])
        assert torch.corrcoef(torch.stack([over[..., 1].flatten(), grey.flatten()]))[0, 1] > 0.99
