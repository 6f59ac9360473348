"""pamparamm/ComfyUI-ppm: its Attention Couple for UNets."""

from __future__ import annotations

import importlib.util
import sys

import comfy.model_management
import pytest
import tiny
import torch

from . import couples


@pytest.fixture(scope="module")
def unet_couple(folder):
    """Of the whole pack only this, because the rest follows the newest ComfyUI."""
    name, place = "neighbour_ppm", folder / "src" / "attention_couple"
    for part in ("common", "unet_couple"):
        spec = importlib.util.spec_from_file_location(f"{name}.{part}", place / f"{part}.py")
        sys.modules[f"{name}.{part}"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_packs_every_row_of_three_regions_keeps_what_is_its_own(unet_couple):
    device = comfy.model_management.get_torch_device()
    left, right = couples.masks()
    masks = torch.stack([left, right, left * 0.5])

    def put(model):
        """As its node does it."""
        model = model.clone()
        before = unet_couple.unet_attn2_couple_wrapper(
            tiny.cond(1), list(couples.TEXTS), 3, False, device, torch.float32
        )
        model.set_model_attn2_patch(before)
        model.set_model_attn2_output_patch(unet_couple.unet_attn2_output_couple_wrapper(masks / masks.sum(dim=0)))
        return model

    couples.check(tiny.tiny_model(), put, "ppm")
