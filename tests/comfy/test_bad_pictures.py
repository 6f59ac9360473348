"""Pictures that are not what they should be (row 18 of the users' table: reference-image traps): each node says in one sentence
which input is wrong, or does the right thing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad import (  # noqa: F401 - fixtures among them
    INF,
    NAN,
    adapters,
    encode,
    find_gate,
    finite,
    folders,
    gated,
    look,
    model,
    own_folders,
    picture,
    refused,
    spoiled,
)
from flexip_pack.flexip_core.pictures.crop import CROPS
from flexip_pack.nodes.score import FlexIPScore
from pairs import in_turn

BAD_PICTURES = {
    "nan": (spoiled(NAN, 1, 40, 60, 3), "not numbers"),
    "infinite": (spoiled(INF, 1, 40, 60, 3), "not numbers"),
    "nan in the second picture": (torch.cat([picture(1, 8, 8, 3), spoiled(NAN, 1, 8, 8, 3)]), "not numbers"),
    "nan in half precision": (spoiled(NAN, 1, 8, 8, 3).half(), "not numbers"),
    "no width": (picture(1, 8, 0, 3), ""),
    "no height": (picture(1, 0, 8, 3), ""),
    "no channels": (picture(1, 8, 8, 0), "channels"),
    "two channels": (picture(1, 8, 8, 2), "channels"),
    "five channels": (picture(1, 8, 8, 5), "channels"),
    "channels first": (picture(1, 3, 8, 8), "channels"),
    "a picture without a batch": (picture(8, 8, 3), "channels"),
    "a video": (picture(1, 2, 8, 8, 3), "channels"),
    "bytes": (torch.full((1, 8, 8, 3), 200, dtype=torch.uint8), ""),
    "whole numbers": (torch.ones(1, 8, 8, 3, dtype=torch.int64), ""),
    "yes and no": (torch.ones(1, 8, 8, 3, dtype=torch.bool), ""),
    "no picture": (picture(0, 8, 8, 3), "picture"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_bad_pictures_are_refused_wherever_a_picture_goes_in(adapters, gated, what):
    image, words = BAD_PICTURES[what]
    texts = [
        refused("EncodeReference", encode, adapters, image),
        refused("FlexIPScore", FlexIPScore.execute, image, picture()),
        refused("FlexIPScore", FlexIPScore.execute, picture(), image),
        refused("FlexIPAttentionMaps", look, gated, image=image),
        refused("FlexIPAutoGate", find_gate, gated, reference_image=image),
    ]
    assert all(words in text for text in texts), texts
    for text, name in zip(texts[1:], ("images", "reference_image", "image", "reference_image")):
        assert f" {name} " in text, text


GOOD_PICTURES = {
    "one pixel": picture(1, 1, 1, 3),
    "one row": picture(1, 1, 300, 3),
    "one column": picture(1, 300, 1, 3),
    "16384 x 16": picture(1, 16, 16384, 3),
    "16 x 16384": picture(1, 16384, 16, 3),
    "16384 x 1": picture(1, 1, 16384, 3),
    "grey": picture(1, 20, 20, 1),
    "transparent": picture(1, 20, 20, 4),
    "double precision": picture(1, 20, 20, 3, dtype=torch.float64),
    "half precision": picture(1, 20, 20, 3, dtype=torch.float16),
    "brain precision": picture(1, 20, 20, 3, dtype=torch.bfloat16),
    "above one": 3 * picture(1, 20, 20, 3),
    "negative": picture(1, 20, 20, 3) - 2,
    "the largest numbers": torch.full((1, 20, 20, 3), torch.finfo(torch.float32).max),
    "not in one piece": picture(1, 3, 20, 20).movedim(1, -1),
}


@pytest.mark.parametrize(
    "what, crop", in_turn(list(GOOD_PICTURES), CROPS) + in_turn(list(GOOD_PICTURES), (*CROPS[2:], *CROPS[:2]))
)
def test_odd_pictures_give_finite_features_in_every_crop(adapters, what, crop):
    image = GOOD_PICTURES[what]
    assert finite(encode(adapters, image, crop, (torch.ones(1, 8, 8),)))


def test_odd_pictures_count_as_what_they_show(adapters):
    """Values outside 0 to 1 are cut off, precision is no difference, an empty wire beside a picture is none."""
    base = picture(1, 30, 30, 3)
    expected = encode(adapters, base).features["cls"]
    for same in (base.double(), [picture(0, 5, 5, 3), base]):
        torch.testing.assert_close(encode(adapters, same).features["cls"], expected)
    white = encode(adapters, torch.ones(1, 30, 30, 3)).features["cls"]
    torch.testing.assert_close(encode(adapters, torch.full((1, 30, 30, 3), 7.0)).features["cls"], white)


@pytest.mark.parametrize("what", ["one pixel", "16384 x 16", "16384 x 1", "grey", "half precision", "above one"])
def test_odd_pictures_are_scored(own_folders, what):
    image = GOOD_PICTURES[what]
    clip_i, dino_i = FlexIPScore.execute(image, image).args[1:3]
    assert clip_i == pytest.approx([1.0], abs=1e-5) and dino_i == pytest.approx([1.0], abs=1e-5)


# side, channels, crop of each picture -> peak memory of preparing it, in pictures of that size
BIG = """
import pathlib, sys, torch
from flexip_core.pictures.crop import prepare

def kilobytes(key):
    return int(pathlib.Path("/proc/self/status").read_text().split(key)[1].split()[0])

for side, channels, crop in zip(map(int, sys.argv[1::3]), map(int, sys.argv[2::3]), sys.argv[3::3]):
    picture = torch.full((side, side, channels), 0.5)
    prepare(picture[:64, :64], torch.ones(4, 4), crop, 224)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = kilobytes("VmRSS:")
    out = prepare(picture, torch.ones(4, 4), crop, 224)
    assert out.shape == (224, 224, 3) and out.isfinite().all()
    print((kilobytes("VmHWM:") - before) * 1024 / picture.nbytes)
"""
linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' account of memory")


def copies(*pictures: tuple[int, int, str]) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [str(part) for one in pictures for part in one]
    result = subprocess.run(
        [sys.executable, "-c", BIG, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return list(map(float, result.stdout.split()))


@linux
def test_big_pictures_are_scaled_down_without_copies_of_them():
    """Of 16384 x 16384 px each copy takes 3.2 GB. With transparency one is made, of which the blended picture is most."""
    rgb, subject, grey, alpha = copies((3000, 3, "center"), (3000, 3, "subject"), (3000, 1, "pad"), (3000, 4, "squash"))
    assert max(rgb, subject) <= 0.2 and grey <= 0.4 and alpha <= 1.6


@pytest.mark.long
@linux
def test_16384_x_16384_px_are_scaled_down_without_copies():
    assert copies((16384, 1, "pad"))[0] <= 0.1
