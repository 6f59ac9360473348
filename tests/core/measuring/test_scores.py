"""Scores: the arithmetic by hand, the encoders against transformers and timm, the preprocessing against torchvision's,
and what is said about which file. Whole-size files of published layouts are views into a small pool, a few MB on disk.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

from flexip_core.encoders import scorer_files
from flexip_core.encoders.scorer_files import (
    by_preference,
    check,
    clip_scorer,
    dino_scorer,
    embed,
    load_image_tower,
    prepare,
)
from flexip_core.encoders.text_tower import load_text_tower, tokenize
from flexip_core.measuring import scores
from flexip_core.measuring.scores import Score, by_gate, cosine, image_scores, missing, plot, report
from flexip_core.network.config import ClipConfig, DinoConfig, FeatureNeed
from flexip_core.untrained import mini

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# --- arithmetic ---


def test_cosines_by_hand():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-6.0, -8.0]])
    expected = torch.tensor([[0.6, -1.0], [0.0, -0.8], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosine(a, b), expected)
    assert cosine(a, a).max() <= 1
    torch.testing.assert_close(image_scores(a, b), torch.tensor([-0.2, -0.4, 0.0], dtype=torch.float64))


def test_a_score_needs_a_reference():
    with pytest.raises(ValueError, match="no reference picture"):
        image_scores(torch.ones(2, 3), torch.ones(0, 3))


# A feature has a length near 1 or more; of what is shorter than 1e-12 `cosine` says 0, as of nothing.
numbers = st.floats(-9, 9).filter(lambda value: value == 0 or abs(value) > 1e-9)
vectors = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=4).map(torch.tensor)


@given(vectors, vectors, st.floats(0.1, 50))
def test_cosines_lie_between_minus_one_and_one_and_ignore_length(a, b, factor):
    found = cosine(a, b)
    assert found.abs().max() <= 1
    torch.testing.assert_close(cosine(factor * a, b), found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.t(), cosine(b, a))


def test_values_are_gathered_per_gate_in_the_samplers_order():
    low, high = by_gate((0.1, 0.3, 0.6, 0.8), (0.0, 1.0))
    assert (low.gate, low.values, high.gate, high.values) == (0.0, (0.1, 0.3), 1.0, (0.6, 0.8))
    assert low.mean == pytest.approx(0.2) and low.spread == pytest.approx(math.sqrt(0.02))
    assert by_gate((0.5,), (0.3,))[0].spread == 0.0


def test_a_gate_that_stands_twice_gets_the_values_of_both_places():
    found = by_gate((0.1, 0.2, 0.3, 0.4), (0.0, 1.0, 0.0, 1.0))
    assert [(at.gate, at.values) for at in found] == [(0.0, (0.1, 0.3)), (1.0, (0.2, 0.4))]


@pytest.mark.parametrize("images", [1, 3, 5])
def test_images_that_do_not_divide_among_the_gates_are_a_sentence(images):
    with pytest.raises(ValueError, match=f"got {images} images for 2 gates"):
        by_gate([0.0] * images, (0.0, 1.0))


A = Score("CLIP-I", (0.5, 0.7, 0.8, 0.9), "CLIP X (x.safetensors)", "NOT comparable.")
B = missing("DINO-I", "there is none.")


def test_the_report_names_models_and_what_is_missing():
    lines = report([A, B]).split("\n")
    assert lines[:3] == [
        "CLIP-I 0.725, DINO-I not available (means of 4 images).",
        "CLIP-I by CLIP X (x.safetensors): 0.500 to 0.900. NOT comparable.",
        "DINO-I not available: there is none.",
    ]
    assert lines[3:] == [f"image {i + 1}: CLIP-I {v:.3f}." for i, v in enumerate(A.values)]
    assert report([Score("CLIP-I", (0.5,), "X", "N.")]) == "CLIP-I 0.500.\nCLIP-I by X. N.\nimage 1: CLIP-I 0.500."
    assert report([B]) == "DINO-I not available.\nDINO-I not available: there is none."


def test_the_report_has_a_line_per_gate():
    other = dataclasses.replace(A, name="DINO-I", values=(0.1, 0.1, 0.2, 0.4))
    lines = report([A, other], (0.0, 0.25)).split("\n")
    assert lines[3:] == [
        "gate 0: CLIP-I 0.600 ± 0.141 (0.500, 0.700), DINO-I 0.100 ± 0.000 (0.100, 0.100).",
        "gate 0.25: CLIP-I 0.850 ± 0.071 (0.800, 0.900), DINO-I 0.300 ± 0.141 (0.200, 0.400).",
    ]
    assert report([A], (0.0, 0.1, 0.2, 0.3)).split("\n")[2:] == [
        f"gate {g:g}: CLIP-I {v:.3f}." for g, v in zip((0, 0.1, 0.2, 0.3), A.values)
    ]


def test_the_plot_has_a_panel_for_the_reference_and_one_for_the_prompt(monkeypatch):
    calls = []
    draw = scores.line_plot
    monkeypatch.setattr(scores, "line_plot", lambda series, **options: calls.append((series, options)) or draw(series, **options))  # fmt: skip
    both = [A, dataclasses.replace(A, name="DINO-I"), dataclasses.replace(A, name="CLIP-T")]
    two, one = plot(both, (1.0, 0.0)), plot([A, B])
    assert two.shape == (1, 2 * one.shape[1], one.shape[2], 3) and plot([B]) is None
    (identity, options), (prompt, _), (single, free) = calls
    assert [s.name for s in identity] == ["CLIP-I", "DINO-I"] and [s.name for s in prompt] == ["CLIP-T"]
    assert list(identity[0].xs) == [0.0, 1.0] and identity[0].ys == pytest.approx([0.85, 0.6])
    assert identity[0].spread[1] == pytest.approx((0.6 - math.sqrt(0.02), 0.6 + math.sqrt(0.02)))
    assert options["x_label"] == "gate" and options["x_range"] == (0.0, 1.0)
    assert list(single[0].xs) == [1, 2, 3, 4] and single[0].ys == A.values and free["x_label"] == "image"


# --- encoders against their makers' libraries ---

HF_CLIP = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, image_size=42)
SMALL_TEXT = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=49408)
HF_VIT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=224)


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter away from the values that a wrong layer would also give."""
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def hf_clip(act="gelu", **vision) -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        text_config={**SMALL_TEXT, "hidden_act": act, "eos_token_id": 49407},
        vision_config={**HF_CLIP, "patch_size": 14, "hidden_act": act, **vision},
        projection_dim=32,
    )
    return shaken(transformers.CLIPModel(config))


def hf_vit(patch=16, **changes) -> transformers.ViTModel:
    config = transformers.ViTConfig(**{**HF_VIT, **changes}, patch_size=patch, layer_norm_eps=1e-6)
    return shaken(transformers.ViTModel(config, add_pooling_layer=False))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def pictures(count=3, height=90, width=61, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def embedded(scorer, images):
    with torch.no_grad():
        return embed(load_image_tower(scorer), prepare(scorer, images))


def with_activation(scorer, quick_gelu):
    cfg = dict(scorer.encoder.vision_cfg, quick_gelu=quick_gelu)
    return dataclasses.replace(scorer, encoder=dataclasses.replace(scorer.encoder, vision_cfg=cfg))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_clip_embeddings_equal_transformers(tmp_path, act):
    model, images = hf_clip(act), pictures()
    scorer = with_activation(clip_scorer("x", saved(model, tmp_path)), act == "quick_gelu")
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=prepare(scorer, images)).pooler_output
    torch.testing.assert_close(embedded(scorer, images), expected, atol=1e-4, rtol=1e-4)
    other = embedded(with_activation(scorer, act == "gelu"), images)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("patch", [8, 16])
def test_dino_v1_of_transformers_equals_transformers(tmp_path, patch):
    model, images = hf_vit(patch), pictures(2)
    scorer = dino_scorer("x", saved(model, tmp_path))
    with torch.no_grad():
        expected = model(pixel_values=prepare(scorer, images)).last_hidden_state[:, 0]
    assert prepare(scorer, images).shape == (2, 3, 224, 224)
    torch.testing.assert_close(embedded(scorer, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_dino_v1_of_the_hub_and_of_timm_equals_timm(tmp_path, nested):
    """The two have the same names. The hub's whole checkpoints hold a student and a teacher, with their heads."""
    model = shaken(timm.create_model("vit_small_patch16_224.dino", num_classes=0, embed_dim=128, depth=3, num_heads=2))
    state = model.state_dict()
    if nested:
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        head = {"head.mlp.0.weight": torch.ones(3, 128), "head.last_layer.weight_g": torch.ones(3, 1)}
        state = {
            f"{role}.{prefix}{key}": value
            for role, prefix, part in (
                ("student", "module.backbone.", other),
                ("teacher", "backbone.", state),
                ("teacher", "", head),
            )
            for key, value in part.items()
        }
    save_file(state, tmp_path / "hub.safetensors")
    scorer, images = dino_scorer("x", tmp_path / "hub.safetensors"), pictures(2)
    with torch.no_grad():
        expected = model(prepare(scorer, images))
    torch.testing.assert_close(embedded(scorer, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, args",
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0}),
    ],
)
def test_dinov2_equals_timm_at_224_px(tmp_path, name, args):
    model = timm.create_model(name, img_size=224, num_classes=0, embed_dim=128, depth=3, num_heads=2, **args)
    save_file(shaken(model).state_dict(), tmp_path / "v2.safetensors")
    scorer, images = dino_scorer("x", tmp_path / "v2.safetensors"), pictures(2)
    with torch.no_grad():
        expected = model.forward_features(prepare(scorer, images))[:, 0]
    torch.testing.assert_close(embedded(scorer, images), expected, atol=1e-5, rtol=1e-5)


def test_dinov2_of_transformers_with_518_px_positions_runs_at_224_px(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    scorer = dino_scorer("x", saved(shaken(transformers.Dinov2Model(config)), tmp_path))
    got = embedded(scorer, pictures(2))
    assert scorer.title.startswith("DINOv2") and got.shape == (2, 128)
    assert (got.norm(dim=1) > 1).all() and (got[0] - got[1]).norm() > 1e-3


# --- preprocessing ---


def published_transform(resize, crop):
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose([transforms.Resize(resize, bicubic), transforms.CenterCrop(crop), transforms.ToTensor()])


@pytest.mark.parametrize("size", [(90, 61), (300, 517), (224, 224), (33, 57), (1000, 301)])
@pytest.mark.parametrize(
    "make, resize, mean",
    [
        (lambda path: clip_scorer("x", saved(hf_clip(image_size=224), path)), 224, [0.48145466, 0.4578275, 0.40821073]),
        (lambda path: dino_scorer("x", saved(hf_vit(), path)), 256, [0.485, 0.456, 0.406]),
    ],
)
def test_pictures_are_prepared_as_published(tmp_path, size, make, resize, mean):
    """Up to one pixel of place (roundings of odd sizes) and one step of 8 bits (PIL rounds once more)."""
    scorer = make(tmp_path)
    smooth = np.random.default_rng(0).integers(0, 255, (*(-(-s // 16) for s in size), 3)).astype(np.uint8)
    picture = Image.fromarray(smooth).resize(size[::-1], Image.Resampling.BICUBIC)
    expected = published_transform(resize, 224)(picture)
    got = prepare(scorer, torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None])[0]
    found_mean, std = scorer_files.towers.normalisation(scorer.encoder)
    got = got * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    places = [torch.roll(expected, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert min((got - place)[:, 2:-2, 2:-2].abs().mean() for place in places) < 1.5 / 255
    if size == (224, 224):
        assert (got - expected).abs().max() < 1.5 / 255
    assert list(found_mean) == mean and (scorer.resize, scorer.crop) == (resize, 224)


# --- whole-size files ---


def published(shapes, path, dtype=torch.float32, rounded=True, seed=0):
    """A file with tensors of these shapes (or of a model's). `rounded`: every value is a half precision number."""
    if isinstance(shapes, torch.nn.Module):
        shapes = {key: tuple(value.shape) for key, value in shapes.state_dict().items()}
    pool = torch.randn(80_000, generator=torch.Generator().manual_seed(seed)) * 0.05
    pool = (pool.half().float() if rounded else pool).to(dtype)
    tensors = {}
    for number, (key, shape) in enumerate(shapes.items()):
        rows, row = math.prod(shape[:-1]), math.prod(shape[-1:])
        step = min(row, max(1, (len(pool) - row) // rows))  # rows overlap, so that a small pool is enough
        room = len(pool) - (step * (rows - 1) + row)
        strides = [step * math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
        tensors[key] = torch.as_strided(pool, shape, [*strides, 1][: len(shape)], number * 7919 % (room + 1))
    torch.save(tensors, path)
    return path


def on_meta(make):
    with torch.device("meta"):
        return make()


def openai_b32() -> transformers.CLIPModel:
    return on_meta(lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config={"eos_token_id": 49407}, projection_dim=512)))  # fmt: skip


def dino_s16():
    """facebook/dino-vits16: the names are those of transformers' convert_dino_to_pytorch.py."""
    width = 384
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 197, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linear = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (width, width)}
    linear |= {"intermediate.dense": (4 * width, width), "output.dense": (width, 4 * width)}
    for i in range(12):
        for name, shape in linear.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"encoder.layer.{i}.{name}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def timm_meta(name, **args):
    return on_meta(lambda: timm.create_model(name, num_classes=args.pop("num_classes", 0), **args))


def test_openais_clip_is_known_by_its_rounded_weights(tmp_path):
    openai = clip_scorer("a.ckpt", published(openai_b32(), tmp_path / "a.ckpt"))
    laion = clip_scorer("b.ckpt", published(openai_b32(), tmp_path / "b.ckpt", rounded=False))
    half = clip_scorer("c.ckpt", published(openai_b32(), tmp_path / "c.ckpt", torch.float16))
    assert openai.label == "OpenAI CLIP ViT-B/32 (a.ckpt)" and openai.standard and openai.quick_gelu
    assert laion.label == "CLIP ViT-B/32 (b.ckpt)" and not laion.standard and not laion.quick_gelu
    assert half.label == "CLIP ViT-B/32 (c.ckpt)" and half.standard and half.quick_gelu and half.assumed
    assert openai.note("CLIP-T") == "Comparable with published CLIP-T that used OpenAI's CLIP ViT-B/32 on the same pictures and prompts."  # fmt: skip
    assert laion.note("CLIP-I").startswith("NOT comparable with published CLIP-I, which use OpenAI's CLIP ViT-B/32;")
    assert "with GELU, as LAION's" in laion.note("CLIP-I") and "taken for OpenAI's" in half.note("CLIP-I")
    assert [s.name for s in by_preference([laion, half, openai])] == ["a.ckpt", "c.ckpt", "b.ckpt"]


def test_openais_clip_at_its_real_size_equals_transformers(tmp_path):
    path, model = published(openai_b32(), tmp_path / "b32.ckpt"), openai_b32()
    tensors = torch.load(path, mmap=True)
    model.load_state_dict(tensors, assign=True)
    for tower in (model.vision_model, model.text_model):  # counters are no parameters
        tower.embeddings.position_ids = torch.arange(tower.embeddings.position_embedding.weight.shape[0])[None]
    scorer, prompts = clip_scorer("b32", path), tokenize(["a cat on the moon", "two dogs"], 77)
    images, text = pictures(1), load_text_tower("b32", path, scorer.text, scorer.quick_gelu)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=prepare(scorer, images)).pooler_output
        read = model.eval().get_text_features(input_ids=prompts).pooler_output
        torch.testing.assert_close(embedded(scorer, images), seen, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(text(prompts), read, atol=1e-4, rtol=1e-3)
    assert seen.std() > 1e-3 and read.std() > 1e-3


def test_dino_v1_small_is_the_standard(tmp_path):
    scorer = dino_scorer("d.ckpt", published(dino_s16(), tmp_path / "d.ckpt"))
    assert scorer.label == "DINO v1 ViT-S/16 (d.ckpt)" and scorer.standard
    assert scorer.note("DINO-I").startswith("Comparable with published DINO-I that used DINO v1 ViT-S/16")
    assert "no classifier" in scorer.note("DINO-I")
    check(scorer)


@pytest.mark.parametrize(
    "name, title",
    [
        ("vit_small_patch16_224.dino", "DINO v1 ViT-S/16"),
        ("vit_small_patch8_224.dino", "DINO v1 ViT-S/8"),
        ("vit_base_patch16_224.dino", "DINO v1 ViT-B/16"),
        ("vit_small_patch14_dinov2", "DINOv2 ViT-S/14"),
        ("vit_base_patch14_dinov2", "DINOv2 ViT-B/14"),
        ("vit_large_patch14_dinov2", "DINOv2 ViT-L/14"),
        ("vit_base_patch14_reg4_dinov2", "DINOv2 ViT-B/14 with 4 registers"),
    ],
)
def test_every_published_dino_is_known_and_only_one_is_the_standard(tmp_path, name, title):
    scorer = dino_scorer("x", published(timm_meta(name), tmp_path / "x.ckpt"))
    check(scorer)
    assert scorer.title == title and scorer.standard == (title == "DINO v1 ViT-S/16")
    assert scorer.note("DINO-I").startswith("Comparable" if scorer.standard else "NOT comparable")


def test_clip_l14_is_known_with_its_activation_and_is_not_the_standard(tmp_path):
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    for size, title in ((224, "OpenAI CLIP ViT-L/14"), (336, "OpenAI CLIP ViT-L/14 at 336 px")):
        config = transformers.CLIPVisionConfig(**vision, image_size=size, projection_dim=768)
        path = published(on_meta(lambda: transformers.CLIPVisionModelWithProjection(config)), tmp_path / "l.ckpt")  # noqa: B023
        scorer = clip_scorer("l", path)
        check(scorer)
        assert scorer.title == title and scorer.quick_gelu and not scorer.standard and scorer.crop == size
        assert scorer.text is None and "has no text tower" in scorer.no_text
        assert scorer.note("CLIP-I").startswith("NOT comparable")


def test_the_largest_comes_first_where_there_is_no_standard_and_names_break_ties(tmp_path):
    small, large, twin = (
        dino_scorer(name, published(timm_meta(f"vit_{size}_patch14_dinov2"), tmp_path / name))
        for name, size in (("b", "small"), ("z", "base"), ("a", "small"))
    )
    assert [s.name for s in by_preference([small, large, twin])] == ["z", "a", "b"]


def test_a_clip_with_its_text_tower_is_preferred_to_a_larger_one_without(tmp_path):
    full = clip_scorer("full", saved(hf_clip(), tmp_path))
    config = transformers.CLIPVisionConfig(**{**HF_CLIP, "num_hidden_layers": 6}, patch_size=14, projection_dim=32)
    images_only = clip_scorer("images", saved(transformers.CLIPVisionModelWithProjection(config), tmp_path))
    assert [s.name for s in by_preference([images_only, full])] == ["full", "images"]


# --- marks for the adapters' own encoders ---


def needs(*encoders):
    return tuple(FeatureNeed(f"n{i}", e, "embedding", e.width) for i, e in enumerate(encoders))


def test_scores_by_an_encoder_that_the_adapters_read_are_marked(tmp_path):
    mini.make_mini_encoders(tmp_path)
    clip = clip_scorer(mini.MINI_CLIP_FILE, tmp_path / mini.MINI_CLIP_FILE)
    dino = dino_scorer(mini.MINI_DINO_FILE, tmp_path / mini.MINI_DINO_FILE)
    check(clip), check(dino)
    both = needs(mini.MINI_CLIP, dataclasses.replace(mini.MINI_DINO, image_size=280))
    assert clip.is_read_by(both) and dino.is_read_by(both)
    assert not clip.is_read_by(needs(mini.MINI_DINO)) and not dino.is_read_by(needs(DinoConfig(), ClipConfig()))
    for scorer, name in ((clip, "CLIP-I"), (clip, "CLIP-T"), (dino, "DINO-I")):
        note = scorer.note(name, read_by_adapters=True)
        assert note.startswith(f"NOT comparable with published {name}: the adapters read this encoder themselves")


def test_the_usual_encoders_of_adapters_say_so_even_without_adapters(tmp_path):
    large = dino_scorer("l", published(timm_meta("vit_large_patch14_dinov2"), tmp_path / "l.ckpt"))
    base = dino_scorer("b", published(timm_meta("vit_base_patch14_dinov2"), tmp_path / "b.ckpt"))
    assert "adapters usually read this encoder" in large.note("DINO-I")
    assert "adapters usually read" not in base.note("DINO-I")


# --- files that cannot score ---


def dumped(state, tmp_path):
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def clip_state(**changes):
    return hf_clip().state_dict() | changes


def vit_state(prefix="", **changes):
    """As transformers saves it; in memory the names differ."""
    with tempfile.TemporaryDirectory() as folder:
        state = load_file(saved(hf_vit(), Path(folder)))
    return {prefix + key: value for key, value in state.items()} | changes


@pytest.mark.parametrize(
    "make, words",
    [
        (vit_state, "vision transformer .*, not a CLIP.*openai/clip-vit-base-patch32"),
        (lambda: torch.nn.Linear(3, 3).state_dict(), "no image encoder that FlexIP knows, not a CLIP"),
        (lambda: {k: v for k, v in clip_state().items() if k != "visual_projection.weight"}, "need the projection"),
        (lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**{**HF_CLIP, "hidden_size": 96}, patch_size=14)).state_dict(), "unusual width 96"),
        (lambda: {f"visual.trunk.{k}": v for k, v in timm.create_model("vit_tiny_patch16_224", depth=1).state_dict().items()}, "around a timm tower"),
        (lambda: {k: v for k, v in clip_state().items() if "post_layernorm.bias" not in k}, "lacks 1 tensors .*another file"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_clip_for_scores_is_a_sentence(tmp_path, make, words):
    path = dumped(make(), tmp_path)
    with pytest.raises(ValueError, match=f"^f.safetensors .*{words}.*\\.$") as error:
        check(clip_scorer("f.safetensors", path))
    assert "adapters" not in str(error.value)


def timm_vit(name="vit_small_patch16_224", **args):
    return timm.create_model(name, **{"embed_dim": 128, "depth": 1, "num_heads": 2, "num_classes": 0, **args}).state_dict()  # fmt: skip


@pytest.mark.parametrize(
    "make, words",
    [
        (clip_state, "is CLIP ViT with 14 px patches .*, not a DINO.*dino_deitsmall16_pretrain.pth"),
        (lambda: timm_vit(num_classes=5), "has a classifier, which DINO's files do not have"),
        (lambda: vit_state(**{"pooler.dense.weight": torch.zeros(1)}), "has a pooler, which"),
        (lambda: vit_state("vit.", **{"classifier.weight": torch.zeros(1)}), "has a classifier"),
        (lambda: timm_vit("vit_small_patch32_224"), "not a DINO"),
        (lambda: timm_vit(embed_dim=96), "unusual size"),
        (lambda: {k: v for k, v in timm_vit().items() if k != "blocks.0.norm2.bias"}, "lacks 1 tensors"),
        (lambda: timm_vit() | {"decoder_embed.weight": torch.zeros(2, 2)}, "extra tensors .decoder_embed"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_dino_is_a_sentence(tmp_path, make, words):
    path = dumped(make(), tmp_path)
    with pytest.raises(ValueError, match=f"^f.safetensors .*{words}.*\\.$") as error:
        check(dino_scorer("f.safetensors", path))
    assert "adapters" not in str(error.value)


def test_a_damaged_file_names_itself(tmp_path):
    (tmp_path / "f.safetensors").write_text("<!DOCTYPE html>")
    for make in (clip_scorer, dino_scorer):
        with pytest.raises(ValueError, match="f.safetensors .*web page"):
            make("f.safetensors", tmp_path / "f.safetensors")


def test_plain_transformers_vits_stay_unknown_to_the_adapters(tmp_path):
    header = scorer_files.read_header(saved(hf_vit(), tmp_path))
    assert scorer_files.layouts.identify(header) is None
    assert scorer_files.layouts.identify_vit(header).layout == "transformers vit"
    assert len(load_file(tmp_path / "model.safetensors")) == len(header.shapes)
