"""Acly/comfyui-tooling-nodes: the regions of Krita AI Diffusion, which write into core's list of positives and negatives."""

from __future__ import annotations

import importlib.util

import pytest
import tiny

from . import couples


@pytest.fixture(scope="module")
def region(folder):
    """Of the whole pack only this, because the rest wants a server."""
    spec = importlib.util.spec_from_file_location("neighbour_region", folder / "region.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packs_every_row_of_two_regions_keeps_what_is_its_own(region):
    regions = None
    for text, mask in zip(couples.TEXTS, couples.masks()):
        regions = region.Region(regions, mask, text)
    put = lambda model: region.AttentionMask.execute(model, regions).args[0]
    couples.check(tiny.tiny_model(), put, "tooling-nodes")
