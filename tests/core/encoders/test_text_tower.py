"""CLIP's text tower: equal to transformers' and open_clip's in every layout, and a sentence where there is none."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexip_core.encoders import layouts
from flexip_core.encoders.text_tower import (
    VOCABULARY,
    TextShape,
    count_tokens,
    find_text_tower,
    load_text_tower,
    tokenize,
)
from flexip_core.files.weights import read_header

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PROMPTS = ["a red cat", "Two DOGS, (sitting) on the moon!", "", "word " * 200]
HF_VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1, image_size=28)
HF_TEXT = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=VOCABULARY,
    bos_token_id=VOCABULARY - 2,
    eos_token_id=VOCABULARY - 1,
)
VISION = dict(width=64, layers=1, head_width=64, patch_size=14, image_size=28)
TEXT = dict(width=128, heads=2, layers=3, mlp_ratio=1.5)


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter away from the values that a wrong layer would also give."""
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def hf_clip(act: str = "gelu", **text) -> transformers.CLIPModel:
    return shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**HF_TEXT, "hidden_act": act, **text},
                vision_config={**HF_VISION, "patch_size": 14, "hidden_act": act},
                projection_dim=32,
            )
        )
    )


def open_clip_full(quick_gelu: bool = False, custom: bool = False, **text):
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return shaken(kind(32, VISION, {**TEXT, **text}, quick_gelu=quick_gelu))


def found(path, shapes=None):
    shapes = shapes or read_header(path).shapes
    return find_text_tower("clip.safetensors", shapes, layouts.identify(shapes))


def saved(tensors, tmp_path, name="clip.safetensors"):
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, tmp_path / name)
    return tmp_path / name


def embeddings(path, quick_gelu: bool, prompts=PROMPTS) -> torch.Tensor:
    file = found(path)
    tower = load_text_tower("clip.safetensors", path, file, quick_gelu)
    with torch.no_grad():
        return tower(tokenize(prompts, file.shape.context))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_embeddings_equal_transformers(tmp_path, act):
    model = hf_clip(act)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokenize(PROMPTS, 77)).pooler_output
    got = embeddings(tmp_path / "model.safetensors", act == "quick_gelu")
    assert got.shape == (4, 32) and expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (embeddings(tmp_path / "model.safetensors", act != "quick_gelu") - expected).abs().max() > 1e-3


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_embeddings_equal_open_clip_in_both_of_its_layouts(tmp_path, custom, prefix):
    model = open_clip_full(custom=custom)
    path = saved({prefix + key: value for key, value in model.state_dict().items()}, tmp_path)
    with torch.no_grad():
        expected = model.encode_text(tokenize(PROMPTS, 77))
    torch.testing.assert_close(embeddings(path, False), expected, atol=1e-5, rtol=1e-5)


def test_old_transformers_files_and_half_precision_are_read(tmp_path):
    model = hf_clip()
    model.save_pretrained(tmp_path)
    tensors = {key: value.half() for key, value in load_file(tmp_path / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    path = saved(tensors, tmp_path, "old.safetensors")
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokenize(PROMPTS, 77)).pooler_output
    got = embeddings(path, False)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def test_sizes_come_from_the_file(tmp_path):
    path = saved(open_clip_full(context_length=40).state_dict(), tmp_path)
    assert found(path).shape == TextShape(width=128, depth=3, mlp=192, context=40, out=32)
    assert embeddings(path, False).shape == (4, 32)


def test_long_prompts_are_cut_off_and_can_be_counted():
    tokens = tokenize(["word " * 200, "word"], 77)
    assert tokens.shape == (2, 77) and tokens[0, -1] == VOCABULARY - 1 == tokens[1, 2]
    assert count_tokens("word") == 3 and count_tokens("word " * 200) == 202


def clip_vision_only(tmp_path):
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF_VISION, patch_size=14))
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def without(state, *names):
    return {key: value for key, value in state.items() if not any(name in key for name in names)}


@pytest.mark.parametrize(
    "make, words",
    [
        (clip_vision_only, "has no text tower.*openai/clip-vit-base-patch32"),
        (lambda t: open_clip_full().visual.state_dict(), "has no text tower"),
        (lambda t: open_clip_full(vocab_size=300).state_dict(), "vocabulary of 300 tokens.*49408"),
        (lambda t: without(open_clip_full().state_dict(), "text_projection"), "incomplete text tower"),
        (lambda t: without(open_clip_full().state_dict(), "positional_embedding") | {"visual.positional_embedding": torch.zeros(5, 64)}, "incomplete text tower"),
        (lambda t: open_clip_full().state_dict() | {"text_projection": torch.zeros(128, 24)}, "width 24 beside.*32"),
        (lambda t: open_clip_full(width=96).state_dict(), "unusual width 96"),
    ],
)  # fmt: skip
def test_a_file_without_a_usable_text_tower_is_a_sentence(tmp_path, make, words):
    shapes = {key: tuple(value.shape) for key, value in make(tmp_path).items()}
    with pytest.raises(ValueError, match=f"^clip.safetensors .*{words}.*\\.$"):
        found(None, shapes)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: without(s, "transformer.resblocks.1.ln_1.bias"), r"missing or unknown tensors \(transformer"),
        (
            lambda s: s | {"transformer.resblocks.1.extra": torch.zeros(1)},
            "missing or unknown tensors.*extra, 1 in all",
        ),
        (lambda s: s | {"ln_final.bias": torch.zeros(7)}, r"ln_final.bias has the shape \(7,\) instead of \(128,\)"),
    ],
)
def test_a_text_tower_that_does_not_fill_is_a_sentence(tmp_path, change, words):
    path = saved(change(without(open_clip_full().state_dict(), "nothing")), tmp_path)
    with pytest.raises(ValueError, match=f"^clip.safetensors .*{words}.*\\.$"):
        embeddings(path, False)


def test_the_tower_is_frozen_in_eval_mode_and_moves_with_its_mask(tmp_path):
    path = saved(open_clip_full().state_dict(), tmp_path)
    tower = load_text_tower("clip.safetensors", path, found(path), False)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    tensors = [*tower.parameters(), *tower.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"} and tuple(tower.model.attn_mask.shape) == (77, 77)
    assert tower.to(torch.float64).model.attn_mask.dtype == torch.float64
