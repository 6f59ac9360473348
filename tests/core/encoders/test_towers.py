"""The towers give what transformers, timm and open_clip give for the same weights, from every layout of file."""

from __future__ import annotations

import copy
import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexip_core.encoders import towers
from flexip_core.encoders.layouts import describe, identify
from flexip_core.encoders.towers import check_fits, describe_model, image_size, load_tower, wanted_shape
from flexip_core.files.weights import read_header
from flexip_core.network.config import ClipConfig, DinoConfig

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VISION = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 14, "image_size": 56}
CLIP = ClipConfig("tiny", 24, VISION)
HF_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu",
}
DINO_ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DINO = DinoConfig("vit_small_patch14_dinov2", 32, 518, DINO_ARGS)
DINO_REG = DinoConfig("vit_small_patch14_reg4_dinov2", 32, 518, DINO_ARGS)
HF_DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("an encoder tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, so that a swapped, missing or unscaled one shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.ndim == 1 else 0))
    return model.eval()


def saved(tmp_path: Path, tensors: dict) -> Path:
    path = tmp_path / "encoder.safetensors"
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path


def hf_clip(**changes):
    return shaken(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF_CLIP, **changes)))


def as_open_clip(hf: torch.nn.Module, tmp_path: Path) -> dict:
    """A full open_clip CLIP with the weights of a transformers model, copied module by module."""
    model = open_clip.CLIP(24, VISION, {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1})
    ours, theirs = model.visual, hf.vision_model
    pairs = [
        (ours.conv1, theirs.embeddings.patch_embedding),
        (ours.ln_pre, theirs.pre_layrnorm),
        (ours.ln_post, theirs.post_layernorm),
    ]
    with torch.no_grad():
        for block, layer in zip(ours.transformer.resblocks, theirs.encoder.layers, strict=True):
            attention = layer.self_attn
            pairs += [
                (block.ln_1, layer.layer_norm1),
                (block.ln_2, layer.layer_norm2),
                (block.mlp.c_fc, layer.mlp.fc1),
                (block.mlp.c_proj, layer.mlp.fc2),
                (block.attn.out_proj, attention.out_proj),
            ]
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            block.attn.in_proj_weight.copy_(torch.cat([p.weight for p in qkv]))
            block.attn.in_proj_bias.copy_(torch.cat([p.bias for p in qkv]))
        for target, source in pairs:
            target.load_state_dict(source.state_dict())
        ours.class_embedding.copy_(theirs.embeddings.class_embedding)
        ours.positional_embedding.copy_(theirs.embeddings.position_embedding.weight)
        ours.proj.copy_(hf.visual_projection.weight.T)
    return model.state_dict()


def as_transformers(hf: torch.nn.Module, tmp_path: Path) -> dict:
    hf.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("layout", [as_open_clip, as_transformers])
def test_clip_embedding_and_penultimate_equal_transformers(tmp_path, layout):
    hf, pixels = hf_clip(), torch.randn(2, 3, 56, 56)
    tower = load_tower(CLIP, saved(tmp_path, layout(hf, tmp_path)))
    with torch.no_grad():
        theirs = hf(pixels, output_hidden_states=True)
        ours, penultimate = tower(pixels), tower.penultimate(pixels)
        both = tower.features(pixels, {"embedding", "penultimate"})
    assert torch.equal(both["embedding"], ours) and torch.equal(both["penultimate"], penultimate)
    assert theirs.image_embeds.std() > 0.1
    torch.testing.assert_close(ours, theirs.image_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(penultimate, theirs.hidden_states[-2], atol=1e-4, rtol=1e-4)
    assert penultimate.shape == (2, 1 + 16, 32)


def test_quick_gelu_follows_the_config_because_no_file_shows_it(tmp_path):
    hf, pixels = hf_clip(), torch.randn(1, 3, 56, 56)
    quick = copy.deepcopy(hf)
    for layer in quick.vision_model.encoder.layers:
        layer.mlp.activation_fn = transformers.activations.ACT2FN["quick_gelu"]
    tensors = as_transformers(hf, tmp_path)
    with torch.no_grad():
        ours = load_tower(ClipConfig("tiny", 24, {**VISION, "quick_gelu": True}), tensors)(pixels)
        torch.testing.assert_close(ours, quick(pixels).image_embeds, atol=1e-4, rtol=1e-4)
        assert (ours - hf(pixels).image_embeds).abs().max() > 1e-3
    named = towers.build_clip_tower(ClipConfig("ViT-L-14-quickgelu", 768), "meta")
    assert "QuickGELU" in repr(named) and "QuickGELU" not in repr(towers.build_clip_tower(ClipConfig(), "meta"))


def hf_dino(**changes):
    return shaken(transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINO, **changes)))


def hf_dino_reg():
    return shaken(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**HF_DINO)))


def as_meta(hf: torch.nn.Module, tmp_path: Path) -> dict:
    """Meta's names, from facebookresearch/dinov2, dinov2/models/vision_transformer.py."""
    embeddings = hf.embeddings
    state = {
        "cls_token": embeddings.cls_token,
        "pos_embed": embeddings.position_embeddings,
        "mask_token": embeddings.mask_token,
        "norm.weight": hf.layernorm.weight,
        "norm.bias": hf.layernorm.bias,
        "patch_embed.proj.weight": embeddings.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": embeddings.patch_embeddings.projection.bias,
    }
    if hasattr(embeddings, "register_tokens"):
        state["register_tokens"] = embeddings.register_tokens
    for i, layer in enumerate(hf.encoder.layer):
        at, mlp = layer.attention, layer.mlp
        parts = {"norm1": layer.norm1, "norm2": layer.norm2, "attn.proj": at.o_proj}
        if hasattr(mlp, "fc1"):
            parts |= {"mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
        else:
            parts["mlp.w3"] = mlp.down_proj
        for kind in ("weight", "bias"):
            state |= {f"blocks.{i}.{name}.{kind}": getattr(part, kind) for name, part in parts.items()}
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [getattr(p, kind) for p in (at.q_proj, at.k_proj, at.v_proj)]
            )
            if not hasattr(mlp, "fc1"):
                state[f"blocks.{i}.mlp.w12.{kind}"] = torch.cat(
                    [getattr(p, kind) for p in (mlp.gate_proj, mlp.up_proj)]
                )
        state |= {
            f"blocks.{i}.ls1.gamma": layer.layer_scale1.lambda1,
            f"blocks.{i}.ls2.gamma": layer.layer_scale2.lambda1,
        }
    return {key: value.detach() for key, value in state.items()}


def as_timm(hf: torch.nn.Module, tmp_path: Path) -> dict:
    """What timm saves after it has read Meta's file."""
    cfg = DINO_REG if hasattr(hf.embeddings, "register_tokens") else DINO
    model = timm.create_model(cfg.model, img_size=518, num_classes=0, **DINO_ARGS)
    state = timm.models.vision_transformer.checkpoint_filter_fn(as_meta(hf, tmp_path), model)
    model.load_state_dict(state)
    return model.state_dict()


@pytest.mark.parametrize("layout", [as_transformers, as_meta, as_timm])
@pytest.mark.parametrize("cfg, make", [(DINO, hf_dino), (DINO_REG, hf_dino_reg)], ids=["plain", "registers"])
def test_dino_patch_tokens_equal_transformers_at_518_px(tmp_path, cfg, make, layout):
    hf, pixels = make(), torch.randn(1, 3, 518, 518)
    tower = load_tower(cfg, saved(tmp_path, layout(hf, tmp_path)))
    with torch.no_grad():
        theirs, ours = hf(pixels).last_hidden_state, tower(pixels)
    assert ours.shape == (1, 37 * 37, 32) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs[:, -37 * 37 :], atol=1e-4, rtol=1e-4)


DINOV3 = DinoConfig("vit_small_patch16_dinov3_qkvb", 48, 224, {"embed_dim": 48, "depth": 2, "num_heads": 2})


def hf_dinov3(**changes):
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DINOv3ViTConfig(**sizes, image_size=224, patch_size=16, num_register_tokens=4, **changes)
    return shaken(transformers.DINOv3ViTModel(config))


def bare(hf: torch.nn.Module, tmp_path: Path) -> dict:
    return hf.state_dict()


def as_meta_dinov3(hf: torch.nn.Module, tmp_path: Path) -> dict:
    """Meta's names, from facebookresearch/dinov3, dinov3/models/vision_transformer.py and layers; bias_mask holds k's at zero."""
    embeddings = hf.embeddings
    state = {
        "cls_token": embeddings.cls_token,
        "storage_tokens": embeddings.register_tokens,
        "mask_token": embeddings.mask_token[0],
        "rope_embed.periods": torch.ones(6),
        "patch_embed.proj.weight": embeddings.patch_embeddings.weight,
        "patch_embed.proj.bias": embeddings.patch_embeddings.bias,
        "norm.weight": hf.norm.weight,
        "norm.bias": hf.norm.bias,
    }
    for i, layer in enumerate(hf.model.layer):
        at, mlp = layer.attention, layer.mlp
        parts = {"norm1": layer.norm1, "norm2": layer.norm2, "attn.proj": at.o_proj}
        if hasattr(mlp, "gate_proj"):
            parts |= {"mlp.w1": mlp.gate_proj, "mlp.w2": mlp.up_proj, "mlp.w3": mlp.down_proj}
        else:
            parts |= {"mlp.fc1": mlp.up_proj, "mlp.fc2": mlp.down_proj}
        state |= {
            f"blocks.{i}.{name}.{k}": getattr(part, k) for name, part in parts.items() for k in ("weight", "bias")
        }
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([p.weight for p in (at.q_proj, at.k_proj, at.v_proj)])
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([at.q_proj.bias, torch.full((48,), 9.0), at.v_proj.bias])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(144)
        state[f"blocks.{i}.ls1.gamma"], state[f"blocks.{i}.ls2.gamma"] = (
            layer.layer_scale1.lambda1,
            layer.layer_scale2.lambda1,
        )
    return {key: value.detach() for key, value in state.items()}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("layout", [as_transformers, bare, as_meta_dinov3])
def test_dinov3_patch_tokens_equal_transformers(tmp_path, layout, gated):
    hf, pixels = hf_dinov3(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu"), torch.randn(1, 3, 224, 224)
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else DINOV3.model
    path = saved(tmp_path, layout(hf, tmp_path))
    assert describe(identify(read_header(path))).startswith("DINOv3 ViT")
    tower = load_tower(dataclasses.replace(DINOV3, model=name), path)
    with torch.no_grad():
        theirs, ours = hf(pixels).last_hidden_state[:, 5:], tower(pixels)
    assert ours.shape == (1, 196, 48) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dinov3_is_refused_by_its_name_where_dinov2_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"is DINOv3 ViT .*4 registers\), but these adapters need DINOv2"):
        load_tower(DINO, saved(tmp_path, as_transformers(hf_dinov3(), tmp_path)))


def test_a_clip_in_scaled_float8_gives_what_its_products_give(tmp_path):
    hf, pixels = hf_clip(), torch.randn(1, 3, 56, 56)
    tensors, products = dict(as_transformers(hf, tmp_path)), {}
    for key, value in list(tensors.items()):
        products[key] = value
        if key.endswith("fc1.weight"):
            tensors[key] = (value / 0.5).to(torch.float8_e4m3fn)
            tensors[key.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
            products[key] = tensors[key].float() * 0.5
    with torch.no_grad():
        ours, theirs = load_tower(CLIP, saved(tmp_path, tensors))(pixels), load_tower(CLIP, products)(pixels)
        assert torch.equal(ours, theirs) and not torch.equal(
            ours, load_tower(CLIP, as_transformers(hf, tmp_path))(pixels)
        )


def test_another_quantisation_is_refused_by_the_true_reason(tmp_path):
    tensors = dict(as_transformers(hf_clip(), tmp_path))
    key = next(key for key in tensors if key.endswith("fc1.weight"))
    tensors[key] = tensors[key].to(torch.int8)
    tensors[key.replace(".weight", ".weight_scale")] = torch.ones(128)
    with pytest.raises(ValueError, match=r"is the right encoder but quantised in a way that FlexIP does not read"):
        load_tower(CLIP, saved(tmp_path, tensors))


@pytest.mark.parametrize("layout", [as_transformers, as_meta])
def test_the_gated_mlp_of_dinov2_giant_equals_transformers(tmp_path, layout):
    hf, pixels = hf_dino(use_swiglu_ffn=True), torch.randn(1, 3, 518, 518)
    # timm's giant has the ratio 5.33 for width 1536 -> 4096; for width 32 transformers rounds to 88, ratio 5.5
    cfg = DinoConfig("vit_giant_patch14_dinov2", 32, 518, {**DINO_ARGS, "mlp_ratio": 5.5})
    with torch.no_grad():
        ours = load_tower(cfg, layout(hf, tmp_path))(pixels)
        torch.testing.assert_close(ours, hf(pixels).last_hidden_state[:, 1:], atol=1e-4, rtol=1e-4)


def test_positions_are_resampled_by_timms_rule(tmp_path):
    pixels = torch.randn(1, 3, 224, 224)
    native = shaken(timm.create_model(DINO.model, img_size=518, num_classes=0, **DINO_ARGS))
    path = saved(tmp_path, native.state_dict())
    tower = load_tower(DinoConfig(DINO.model, 32, 224, DINO_ARGS), path)
    native.set_input_size((224, 224))  # timm's own way to another size
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), native.forward_features(pixels)[:, 1:], atol=1e-5, rtol=1e-5)
    assert tower.image_size == 224 and tower(pixels).shape == (1, 256, 32)


def test_rotary_vits_get_their_unsaved_tables(tmp_path):
    cfg = DinoConfig("vit_small_patch16_dinov3", 48, 224, {"embed_dim": 48, "depth": 2, "num_heads": 2})
    model = shaken(timm.create_model(cfg.model, img_size=224, num_classes=0, **cfg.args))
    tower = load_tower(cfg, saved(tmp_path, model.state_dict()))
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        theirs = model.forward_features(pixels)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(tower(pixels), theirs, atol=1e-5, rtol=1e-5)
    assert tower(pixels).shape == (1, 196, 48)


def test_a_tensor_left_on_the_meta_device_is_reported(tmp_path, monkeypatch):
    cfg = DinoConfig("vit_small_patch16_dinov3", 48, 224, {"embed_dim": 48, "depth": 2, "num_heads": 2})
    model = timm.create_model(cfg.model, img_size=224, num_classes=0, **cfg.args)
    monkeypatch.setattr(towers, "_has_unsaved_buffers", lambda _: False)
    with pytest.raises(RuntimeError, match="rope.periods"):
        load_tower(cfg, model.state_dict())


def test_open_clip_towers_around_timm_work(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    model = shaken(open_clip.timm_model.TimmModel("vit_tiny_patch16_224", 24, pool="token", proj="linear"))
    tower = load_tower(
        ClipConfig("tiny-timm", 24, vision),
        saved(tmp_path, {f"visual.{key}": value for key, value in model.state_dict().items()}),
    )
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), model(pixels), atol=1e-5, rtol=1e-5)
        hidden = tower.penultimate(pixels)
        both = tower.features(pixels, {"embedding", "penultimate"})
        assert torch.equal(both["embedding"], tower(pixels)) and torch.equal(both["penultimate"], hidden)
        last = model.trunk.blocks[-1](hidden)
        torch.testing.assert_close(
            model.head(model.trunk.forward_head(model.trunk.norm(last))), model(pixels), atol=1e-4, rtol=1e-4
        )
    assert hidden.shape == (1, 197, 192)


@pytest.mark.parametrize(
    "cfg, mean, size",
    [
        (ClipConfig(), (0.48145466, 0.4578275, 0.40821073), 224),
        (ClipConfig("ViT-L-14-336", 768), (0.48145466, 0.4578275, 0.40821073), 336),
        (ClipConfig("ViT-B-16-SigLIP", 768), (0.5, 0.5, 0.5), 224),
        (ClipConfig("ViT-H-14-CLIPA", 1024), (0.485, 0.456, 0.406), 224),
        (DinoConfig(), (0.485, 0.456, 0.406), 224),
    ],
    ids=lambda v: getattr(v, "model", None),
)
def test_towers_know_how_pixels_must_be_prepared(cfg, mean, size):
    build = towers.build_clip_tower if isinstance(cfg, ClipConfig) else towers.build_dino_tower
    tower = build(cfg, "meta")
    assert tower.mean == mean and len(tower.std) == 3
    assert tower.image_size == image_size(cfg) == size


def test_loaded_towers_are_frozen_in_eval_mode_and_in_the_asked_dtype(tmp_path):
    path = saved(tmp_path, {key: value.half() for key, value in hf_clip().state_dict().items()})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tower = load_tower(CLIP, path, dtype)
        assert not any(module.training for module in tower.modules())
        assert {p.dtype for p in tower.parameters()} == {dtype}
        assert not any(p.requires_grad or p.is_meta for p in tower.parameters())
        assert tower(torch.randn(1, 3, 56, 56)).dtype == dtype  # pixels follow the module


def test_pickled_files_load_like_safetensors(tmp_path):
    hf, pixels = hf_clip(), torch.randn(1, 3, 56, 56)
    torch.save({"state_dict": hf.state_dict()}, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        torch.testing.assert_close(
            load_tower(CLIP, tmp_path / "pytorch_model.bin")(pixels), hf(pixels).image_embeds, atol=1e-4, rtol=1e-4
        )


def test_a_shared_state_dict_is_not_changed(tmp_path):
    shared = as_transformers(hf_dino_reg(), tmp_path)
    before = {key: value.clone() for key, value in shared.items()}
    tower = load_tower(DinoConfig(DINO_REG.model, 32, 224, DINO_ARGS), shared)
    tower.to(torch.float64)
    assert shared.keys() == before.keys() and all(torch.equal(shared[k], before[k]) for k in before)
    assert all(value.dtype == torch.float32 for value in shared.values())


def tiny_clip(**changes) -> dict:
    return open_clip.CLIP(
        24, {**VISION, **changes}, {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    ).state_dict()


def without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


def dino_state(**changes) -> dict:
    return timm.create_model(DINO.model, num_classes=0, **{"img_size": 56, **DINO_ARGS, **changes}).state_dict()


@pytest.mark.parametrize(
    "cfg, make, words",
    [
        (CLIP, lambda: tiny_clip(layers=4), ["4 layers", "3 layers", "tiny"]),
        (CLIP, lambda: tiny_clip(width=64), ["64 wide", "32 wide"]),
        (CLIP, lambda: tiny_clip(image_size=28), ["28 px", "56 px"]),
        (CLIP, dino_state, ["DINOv2", "CLIP"]),
        (DINO, tiny_clip, ["CLIP", "DINOv2"]),
        (DINO, lambda: dino_state(embed_dim=64), ["64 wide", "32 wide"]),
        (DINO_REG, dino_state, ["DINOv2", "4 registers"]),
        (CLIP, lambda: torch.nn.Linear(2, 2).state_dict(), ["no image encoder that FlexIP knows"]),
        (CLIP, lambda: without(tiny_clip(), "visual.ln_pre.bias"), ["lacks 1 tensors", "ln_pre.bias"]),
        (CLIP, lambda: without(tiny_clip(), "visual.proj"), ["no projection"]),
        (CLIP, lambda: tiny_clip() | {"visual.surprise": torch.ones(1)}, ["extra", "surprise"]),
        (DINO, lambda: without(dino_state(), "blocks.1.ls1.gamma"), ["lacks 1 tensors", "blocks.1.ls1.gamma"]),
        (DINO, lambda: dino_state() | {"norm.weight": torch.ones(5)}, ["norm.weight", "(5,)", "(32,)"]),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_it_is_and_what_is_wanted(tmp_path, cfg, make, words):
    path = saved(tmp_path, make())
    with pytest.raises(ValueError) as error:
        load_tower(cfg, path)
    text = str(error.value)
    assert text.startswith("encoder.safetensors (in ") and text.endswith(".") and "\n" not in text
    assert all(word in text for word in words) and cfg.model in text, text


def test_a_misfit_is_found_in_the_header_before_any_tensor_is_read(tmp_path, monkeypatch):
    path = saved(tmp_path, tiny_clip(layers=4))
    monkeypatch.setattr(towers, "read_weights", lambda *_: pytest.fail("read the tensors"))
    with pytest.raises(ValueError, match="4 layers"):
        load_tower(CLIP, path)


def test_fitting_shapes_are_recognised_whatever_the_position_count():
    shapes = {key: tuple(value.shape) for key, value in dino_state(img_size=70).items()}
    assert check_fits("x", shapes, DINO).shape.positions == 25
    assert wanted_shape(DINO).positions == 37 * 37


@pytest.mark.parametrize(
    "cfg, words",
    [
        (ClipConfig("vit-h14"), ["open_clip knows no", "ViT-H-14"]),
        (ClipConfig("RN50"), ["not a plain vision transformer", "ViT-"]),
        (ClipConfig("convnext_base", 512), ["not a plain vision transformer"]),
        (ClipConfig("ViTamin-S", 384), ["not a plain vision transformer"]),
        (ClipConfig("hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), ["open_clip knows no"]),
        (ClipConfig("ViT-H-14", 768), ["1024", "768"]),
        (ClipConfig("x", 24, {**VISION, "timm_model_pretrained": True}), ["'timm_model_pretrained'", "not allowed"]),
        (ClipConfig("x", 24, {"timm_model_name": "hf-hub:a/b"}), ["not a plain vision transformer"]),
        (ClipConfig("x", 24, {**VISION, "colour": 3}), ["'colour'", "not allowed"]),
        (ClipConfig("x", 24, {**VISION, "layers": 10**9}), ["'layers'", "1000000000"]),
        (ClipConfig("x", 24, {**VISION, "head_width": 5}), ["cannot be built"]),
        (DinoConfig("vit_large_patch14_dinov9"), ["timm knows no", "vit_large_patch14_dinov2"]),
        (DinoConfig("resnet50"), ["timm knows no"]),
        (DinoConfig("maxvit_tiny_tf_224"), ["not a plain vision transformer"]),
        (DinoConfig("hf-hub:timm/vit_large_patch14_dinov2"), ["timm knows no"]),
        (DinoConfig(width=768), ["1024", "768"]),
        (DinoConfig(args={"pretrained": True}), ["'pretrained'", "not allowed"]),
        (DinoConfig(args={"checkpoint_path": "x.pth"}), ["'checkpoint_path'"]),
        (DinoConfig(args={"depth": 10**9}), ["'depth'", "1000000000"]),
        (DinoConfig(args={"num_heads": 7}), ["cannot be built"]),
    ],
    ids=lambda v: None if isinstance(v, list) else f"{v.model}",
)
def test_impossible_configs_get_one_sentence(cfg, words):
    with pytest.raises(ValueError) as error:
        describe_model(cfg)
    text = str(error.value)
    assert all(word in text for word in words) and text.endswith(".") and "\n" not in text, text


def test_flexip_core_imports_neither_open_clip_nor_timm():
    code = (
        "import sys, flexip_core.encoders.towers, flexip_core.encoders.layouts, flexip_core.files.weights, flexip_core.pictures.crop; "
        "sys.exit(bool({'open_clip', 'timm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0
