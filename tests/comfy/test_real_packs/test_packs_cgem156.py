"""laksjdjf/cgem156-ComfyUI: its Attention Couple."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import tiny

from . import couples


@pytest.fixture(scope="module")
def node(folder):
    """Of the whole pack only this, because the rest wants a folder of ComfyUI's and more libraries."""
    root = ModuleType("neighbour_cgem156")
    root.__path__, root.ROOT_NAME = [str(folder)], ""
    sys.modules[root.__name__] = root
    for name in ("scripts", "scripts.attention_couple"):
        part = ModuleType(f"{root.__name__}.{name}")
        part.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[part.__name__] = part
    return __import__(f"{root.__name__}.scripts.attention_couple.node", fromlist=["AttentionCouple"]).AttentionCouple


def test_packs_every_row_of_two_regions_keeps_what_is_its_own(node):
    left, right = couples.masks()
    text = couples.TEXTS[1]
    put = lambda model: node().attention_couple_simple(model, left, cond_1=text, mask_1=right)[0]
    couples.check(tiny.tiny_model(), put, "cgem156")
