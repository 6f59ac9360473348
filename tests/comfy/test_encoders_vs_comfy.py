"""Our towers and preprocessing against ComfyUI's own, on the same weights and pictures.

Needs a ComfyUI tree in the environment variable COMFYUI_TREE (the folder's conftest puts it on the path).
"""

from __future__ import annotations

import comfy.clip_model
import comfy.clip_vision
import open_clip
import pytest
import torch
from flexip_pack.flexip_core.encoders.towers import load_tower
from flexip_pack.flexip_core.network.config import ClipConfig, DinoConfig
from flexip_pack.flexip_core.pictures.crop import normalise, prepare
from test_load_and_encode import core_vision

VISION = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 14, "image_size": 56}
CLIP = ClipConfig("tiny", 24, VISION)
CORE_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
DINO_ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CORE_DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def core_model(config: dict) -> comfy.clip_vision.ClipVisionModel:
    """A core CLIP_VISION with random weights (core leaves them uninitialised)."""
    model = core_vision(config)
    torch.manual_seed(0)
    for parameter in model.model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3 + (0.5 if parameter.ndim == 1 else 0))
    return model


def pixels(tower: torch.nn.Module, images: torch.Tensor, crop: str = "center") -> torch.Tensor:
    squares = torch.stack([prepare(image, None, crop, tower.image_size) for image in images])
    return normalise(squares, tower.mean, tower.std)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.float().std() > 0.05
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def test_clip_from_a_core_object_equals_core():
    core, images = core_model(CORE_CLIP), torch.rand(2, 70, 90, 3)
    tower = load_tower(CLIP, core.get_sd())
    theirs = core.encode_image(images, crop=True)
    assert_close(tower(pixels(tower, images)), theirs["image_embeds"])
    assert_close(tower.penultimate(pixels(tower, images)), theirs["penultimate_hidden_states"])
    assert_close(tower(pixels(tower, images, "squash")), core.encode_image(images, crop=False)["image_embeds"])


def test_a_clip_file_of_open_clip_equals_core_with_the_same_file():
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    file = {key: value.half() for key, value in open_clip.CLIP(24, VISION, text).state_dict().items()}
    core, images = core_model(CORE_CLIP), torch.rand(2, 56, 56, 3)
    visual = {key: value for key, value in file.items() if key.startswith("visual.")}
    missing, unexpected = core.load_sd(comfy.clip_vision.convert_to_transformers(visual, "visual."))
    assert not missing and not unexpected
    tower = load_tower(CLIP, file)
    assert_close(tower(pixels(tower, images)), core.encode_image(images)["image_embeds"])


def test_dino_from_a_core_object_equals_core_at_518_px():
    core, images = core_model(CORE_DINO), torch.rand(1, 518, 518, 3)
    tower = load_tower(DinoConfig("vit_small_patch14_dinov2", 32, 518, DINO_ARGS), core.get_sd())
    assert_close(tower(pixels(tower, images)), core.encode_image(images)["last_hidden_state"][:, 1:])


def test_a_core_dino_runs_at_another_size_and_stays_as_it_is():
    core, images = core_model(CORE_DINO), torch.rand(1, 230, 224, 3)
    state = {key: value.clone() for key, value in core.get_sd().items()}
    before = core.encode_image(images)["last_hidden_state"].clone()
    tower = load_tower(DinoConfig("vit_small_patch14_dinov2", 32, 224, DINO_ARGS), core.get_sd())
    assert tower(pixels(tower, images)).shape == (1, 256, 32)
    tower.to(torch.float64)
    assert all(torch.equal(value, state[key]) for key, value in core.get_sd().items())
    assert torch.equal(core.encode_image(images)["last_hidden_state"], before)


@pytest.mark.parametrize("size", [224, 518])
@pytest.mark.parametrize("shape", [(224, 224), (300, 451), (997, 640), (100, 90), (1, 1), (3, 40), (40, 641)])
def test_center_and_squash_equal_cores_preprocessing(shape, size):
    torch.manual_seed(1)
    images = torch.rand(2, *shape, 3)
    for crop, flag in (("center", True), ("squash", False)):
        theirs = comfy.clip_model.clip_preprocess(images, size=size, crop=flag)
        squares = torch.stack([prepare(image, None, crop, size) for image in images])
        ours = normalise(squares, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
