"""ramyma/A8R8_ComfyUI_nodes: its Attention Couple."""

from __future__ import annotations

import tiny

from . import couples


def test_packs_every_row_of_two_regions_keeps_what_is_its_own(pack):
    nodes = pack.NODE_CLASS_MAPPINGS
    regions = [
        nodes["AttentionCoupleRegion"]().attention_couple_region(text, mask, 1.0)[0]
        for text, mask in zip(couples.TEXTS, couples.masks())
    ]

    def put(model):
        side = couples.SIDE
        return nodes["AttentionCouple"]().attention_couple(model, 0.3, tiny.cond(1), side, side, regions, False)[0]

    couples.check(tiny.tiny_model(), put, "A8R8")
