"""cubiq/PuLID_ComfyUI: its Apply node with random weights. What finds and reads faces is a stand-in, so insightface and facexlib
need not be installed; the attention, its projections and the way onto the model are the pack's own.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import tiny
import torch
from flexip_pack.nodes import runtime

from . import layouts

METHODS = ["neutral", "style", "fidelity"]


@pytest.fixture(scope="module", autouse=True)
def face_tools():
    """Modules that the pack imports at its top and that most testers lack."""
    names = {
        "insightface.app": ["FaceAnalysis"],
        "facexlib.parsing": ["init_parsing_model"],
        "facexlib.utils.face_restoration_helper": ["FaceRestoreHelper"],
    }
    made = []
    for name, members in names.items():
        parts = name.split(".")
        for part in (".".join(parts[: n + 1]) for n in range(len(parts))):
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                made.append(part)
        for member in members:
            setattr(sys.modules[name], member, None)
    yield
    for name in made:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(**layouts.SDXL)


@pytest.fixture(scope="module")
def link(model):
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


class Face:
    bbox, embedding = np.array([0.0, 0.0, 9.0, 9.0]), np.ones(512, dtype=np.float32)


class Faces:
    det_model = types.SimpleNamespace(input_size=None)

    def get(self, image):
        return [Face()]


class Helper:
    """FaceRestoreHelper with one face in every picture."""

    def __init__(self, **kwargs):
        self.cropped_faces = [np.zeros((16, 16, 3), dtype=np.uint8)]

    clean_all = read_image = get_face_landmarks_5 = align_warp_face = lambda self, *args, **kwargs: None
    face_parse = None


class EvaClip(torch.nn.Module):
    image_size, image_mean, image_std = 16, (0.5,) * 3, (0.5,) * 3

    def forward(self, pixels, **kwargs):
        return torch.ones(1, 768), [torch.ones(1, 4, 8)]


@pytest.fixture(scope="module")
def put(face_tools, pack, model):
    module = sys.modules[f"{pack.__name__}.pulid"]
    module.FaceRestoreHelper = Helper
    module.init_parsing_model = lambda **kwargs: lambda face: (torch.zeros(1, 19, 16, 16),)

    class Pulid(module.PulidModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.ip_layers = module.To_KV(layouts.random_pairs(model))

        def get_image_embeds(self, face, hidden):
            return torch.randn(1, 5, 2048, generator=tiny.generator(int(face.abs().sum() > 0)))

    pulid = Pulid().requires_grad_(False)

    def put(model, method="neutral", weight=0.7):
        picture = torch.rand(1, 16, 16, 3)
        return module.ApplyPulid().apply_pulid(model, pulid, EvaClip(), Faces(), picture, weight, 0.0, 1.0, method)[0]

    return put


@pytest.mark.parametrize("method", METHODS)
def test_packs_theirs_and_ours_in_both_orders(model, link, put, method):
    """After FlexIP, "style" and "fidelity" make theirs orthogonal to text + ours, not to the text alone: their callbacks get what
    the block has so far. The expected picture of that order says so."""
    theirs = put(model, method)
    expected = layouts.sample(tiny.naive_attach(theirs, [link], layouts.roles(model)), steps=1)
    got = layouts.sample(runtime.attach(theirs, link), steps=1)
    assert layouts.error(got, expected, f"{method}: theirs, then FlexIP") < 1e-5
    expected_after = layouts.sample(layouts.theirs_after_ours(model, link, theirs), steps=1)
    after = layouts.sample(put(runtime.attach(model, link), method), steps=1)
    assert layouts.error(after, expected_after, f"{method}: FlexIP, then theirs") < 1e-5
    between = layouts.error(after, got, f"{method}: the two orders")
    assert between < 1e-5 if method == "neutral" else between > 1e-5
    assert layouts.error(expected, layouts.sample(theirs, steps=1), f"{method}: theirs alone") > 1e-3
    alone = layouts.sample(runtime.attach(model, link), steps=1)
    assert layouts.error(expected, alone, f"{method}: FlexIP alone") > 1e-3


def test_packs_another_weight_on_a_cached_gated_model_adds_to_a_clone(model, link, put):
    gated = runtime.attach(model, link)
    alone = layouts.sample(gated, steps=1)
    first, second, third = (layouts.sample(put(gated, weight=weight), steps=1) for weight in (0.3, 0.9, 0.3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(layouts.sample(gated, steps=1), alone)
