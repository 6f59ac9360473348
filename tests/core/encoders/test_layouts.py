"""Encoder files are recognised by keys and shapes, in every layout that people have.

The fixtures come from each library's own saving function. Meta's names cannot be produced by an installed library; they
are those of facebookresearch/dinov2, dinov2/models/vision_transformer.py (class DinoVisionTransformer and its layers
PatchEmbed, Attention, Mlp, SwiGLUFFN, LayerScale), as huggingface/transformers lists them in
convert_dinov2_with_registers_to_hf.py (create_rename_keys, read_in_q_k_v). Chunked blocks: BlockChunk there, and the
key listings in facebookresearch/dinov2 issues 210, 235 and 321.
"""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexip_core.encoders import layouts
from flexip_core.encoders.layouts import TowerShape, describe, identify, to_tower_layout, tower_keys
from flexip_core.files.weights import read_header

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLIP = TowerShape("clip", width=32, depth=3, mlp=128, patch=14, positions=4, out=24)
DINO = TowerShape("dino", width=32, depth=3, mlp=128, patch=14, positions=4, out=32)
DINO_SWIGLU = TowerShape("dino", width=32, depth=3, mlp=88, patch=14, positions=4, out=32, gated=True)
DINO_REG = TowerShape(
    "dino", width=32, depth=3, mlp=128, patch=14, positions=4, out=32, registers=4, class_position=False
)
VISION = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 14, "image_size": 28}
HF_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
HF_DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
HF_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "projection_dim": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved_by_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def hf_clip_vision():
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF_CLIP))


def hf_clip_full():
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=HF_TEXT, vision_config=HF_CLIP, projection_dim=24)
    )


def hf_dino(**changes):
    return transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINO, **changes))


def hf_dino_reg():
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**HF_DINO))


def hf_dino_classifier():
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HF_DINO))


def open_clip_full():
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(24, VISION, text)


def timm_dino(name="vit_small_patch14_dinov2", **changes):
    return timm.create_model(name, img_size=28, embed_dim=32, depth=3, num_heads=2, **{"num_classes": 0, **changes})


def meta_dino(kind="plain", chunks=0):
    """The state dict of a DinoVisionTransformer, names from the sources above."""
    width, hidden = 32, 88 if kind == "swiglu" else 128
    state = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if kind == "registers":
        state["register_tokens"] = (1, 4, width)
    for i in range(3):
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ls1.gamma": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "ls2.gamma": (width,),
        }
        if kind == "swiglu":
            block |= {
                "mlp.w12.weight": (2 * hidden, width),
                "mlp.w12.bias": (2 * hidden,),
                "mlp.w3.weight": (width, hidden),
                "mlp.w3.bias": (width,),
            }
        else:
            block |= {
                "mlp.fc1.weight": (hidden, width),
                "mlp.fc1.bias": (hidden,),
                "mlp.fc2.weight": (width, hidden),
                "mlp.fc2.bias": (width,),
            }
        # block_chunks=2 of 3 blocks: chunks of one; earlier places are nn.Identity, so the second number counts through
        place = f"blocks.{i}.{i}." if chunks else f"blocks.{i}."
        state |= {place + key: shape for key, shape in block.items()}
    return {key: torch.randn(shape) for key, shape in state.items()}


def with_prefix(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def open_clip_timm_tower():
    return open_clip.timm_model.TimmModel("vit_tiny_patch16_224", embed_dim=24, pool="token", proj="linear")


TRUNK = TowerShape("clip", width=192, depth=12, mlp=768, patch=16, positions=196, out=24)

KNOWN = {
    "open_clip full": (lambda t: open_clip_full().state_dict(), "open_clip", "visual.", CLIP),
    "open_clip bare tower": (lambda t: open_clip_full().visual.state_dict(), "open_clip", "", CLIP),
    "open_clip, DataParallel": (
        lambda t: with_prefix("module.", open_clip_full().state_dict()),
        "open_clip",
        "module.visual.",
        CLIP,
    ),
    "open_clip around timm": (
        lambda t: with_prefix("visual.", open_clip_timm_tower().state_dict()),
        "open_clip",
        "visual.",
        TRUNK,
    ),
    "transformers vision": (
        lambda t: saved_by_transformers(hf_clip_vision(), t),
        "transformers",
        "vision_model.",
        CLIP,
    ),
    "transformers full": (lambda t: saved_by_transformers(hf_clip_full(), t), "transformers", "vision_model.", CLIP),
    "dino transformers": (lambda t: saved_by_transformers(hf_dino(), t), "transformers", "", DINO),
    "dino transformers swiglu": (
        lambda t: saved_by_transformers(hf_dino(use_swiglu_ffn=True), t),
        "transformers",
        "",
        DINO_SWIGLU,
    ),
    "dino transformers registers": (lambda t: saved_by_transformers(hf_dino_reg(), t), "transformers", "", DINO_REG),
    "dino transformers classifier": (
        lambda t: saved_by_transformers(hf_dino_classifier(), t),
        "transformers",
        "dinov2.",
        DINO,
    ),
    "dino timm": (lambda t: timm_dino().state_dict(), "timm", "", DINO),
    "dino timm with head": (lambda t: timm_dino(num_classes=7).state_dict(), "timm", "", DINO),
    "dino timm registers": (lambda t: timm_dino("vit_small_patch14_reg4_dinov2").state_dict(), "timm", "", DINO_REG),
    "dino meta": (lambda t: meta_dino(), "meta", "", DINO),
    "dino meta chunked": (lambda t: meta_dino(chunks=2), "meta", "", DINO),
    "dino meta swiglu": (lambda t: meta_dino("swiglu"), "meta", "", DINO_SWIGLU),
    "dino meta registers": (lambda t: meta_dino("registers"), "meta", "", DINO_REG),
    "dino meta training": (
        lambda t: with_prefix("student.backbone.", meta_dino()) | with_prefix("teacher.backbone.", meta_dino()),
        "meta",
        "teacher.backbone.",
        DINO,
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_every_layout_is_recognised_from_a_header(tmp_path, case):
    make, layout, prefix, shape = KNOWN[case]
    save_file({k: v.clone().contiguous() for k, v in make(tmp_path).items()}, tmp_path / "any_name.safetensors")
    found = identify(read_header(tmp_path / "any_name.safetensors"))
    assert found is not None
    assert (found.layout, found.prefix, found.shape) == (layout, prefix, shape)


def reference_tower(case):
    """The tower that must accept the conversion."""
    if case == "open_clip around timm":
        return open_clip_timm_tower()
    if "dino" not in case:
        return open_clip_full().visual
    if "swiglu" in case:
        return timm_dino(mlp_ratio=5.5, mlp_layer=timm.layers.SwiGLUPacked)
    return timm_dino("vit_small_patch14_reg4_dinov2" if "registers" in case else "vit_small_patch14_dinov2")


@pytest.mark.parametrize("case", KNOWN)
def test_every_layout_converts_to_exactly_the_towers_keys_and_shapes(tmp_path, case):
    tensors = KNOWN[case][0](tmp_path)
    before = {key: value.clone() for key, value in tensors.items()}
    file = identify({key: tuple(value.shape) for key, value in tensors.items()})
    wanted = set(tower_keys(tensors, file))
    converted = to_tower_layout({key: value for key, value in tensors.items() if key in wanted}, file)
    expected = {key: value.shape for key, value in reference_tower(case).state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == expected
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[k], before[k]) for k in before)


def test_the_text_tower_is_not_read():
    tensors = open_clip_full().state_dict()
    file = identify({key: tuple(value.shape) for key, value in tensors.items()})
    assert set(tower_keys(tensors, file)) == {key for key in tensors if key.startswith("visual.")}


def test_tensors_are_shared_where_nothing_is_fused(tmp_path):
    tensors = saved_by_transformers(hf_clip_vision(), tmp_path)
    converted = to_tower_layout(tensors, identify({key: tuple(value.shape) for key, value in tensors.items()}))
    copied = [k for k, v in converted.items() if v.data_ptr() not in {t.data_ptr() for t in tensors.values()}]
    assert copied and all(".attn.in_proj_" in key for key in copied)
    q, k, v = (tensors[f"vision_model.encoder.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    assert torch.equal(converted["transformer.resblocks.1.attn.in_proj_weight"], torch.cat([q, k, v]))


@pytest.mark.parametrize("kind", ["plain", "swiglu", "registers"])
def test_metas_names_convert_as_timm_converts_them(kind):
    tensors = meta_dino(kind)
    ours = to_tower_layout(tensors, identify({key: tuple(value.shape) for key, value in tensors.items()}))
    theirs = timm.models.vision_transformer.checkpoint_filter_fn(dict(tensors), reference_tower(f"dino {kind}"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_old_transformers_files_with_position_ids_are_accepted(tmp_path):
    # position_ids was a saved buffer up to transformers 4.30: the published clip-vit-* files have it.
    tensors = saved_by_transformers(hf_clip_vision(), tmp_path)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    file = identify({key: tuple(value.shape) for key, value in tensors.items()})
    assert file.shape == CLIP and "position_ids" not in " ".join(to_tower_layout(tensors, file))


def test_a_clip_without_its_projection_says_so(tmp_path):
    tensors = saved_by_transformers(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF_CLIP)), tmp_path)
    file = identify({key: tuple(value.shape) for key, value in tensors.items()})
    assert file.shape.out == 0
    assert "no projection" in describe(file)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(3, 3),
        lambda: timm.create_model("resnet10t"),
        lambda: open_clip.model.TextTransformer(width=16, heads=2, layers=1, vocab_size=50),
        lambda: transformers.ViTModel(transformers.ViTConfig(**HF_DINO)),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**HF_TEXT)),
    ],
)
def test_other_models_are_not_mistaken_for_encoders(make):
    assert identify({key: tuple(value.shape) for key, value in make().state_dict().items()}) is None


@pytest.mark.parametrize("shape", [(), (1,), (0, 0), (7, 7)])
@pytest.mark.parametrize("case", ["open_clip bare tower", "open_clip around timm", "dino timm", "dino meta registers"])
def test_right_names_with_senseless_shapes_are_not_recognised(case, shape):
    assert identify(dict.fromkeys(KNOWN[case][0](None), shape)) is None


@pytest.mark.parametrize(
    "shape, words",
    [
        (
            TowerShape("clip", 1280, 32, 5120, 14, 256, 1024),
            "CLIP ViT-H/14 (1280 wide, 32 layers, 224 px, embedding 1024)",
        ),
        (
            TowerShape("clip", 1024, 24, 4096, 14, 576, 768),
            "CLIP ViT-L/14 (1024 wide, 24 layers, 336 px, embedding 768)",
        ),
        (TowerShape("dino", 1024, 24, 4096, 14, 1369, 1024), "DINOv2 ViT-L/14 (1024 wide, 24 layers)"),
        (
            TowerShape("dino", 1536, 40, 4096, 14, 1369, 1536, registers=4, gated=True),
            "DINOv2 ViT-g/14 (1536 wide, 40 layers, 4 registers)",
        ),
        (CLIP, "CLIP ViT with 14 px patches (32 wide, 3 layers, 28 px, embedding 24)"),
    ],
)
def test_encoders_are_described_in_words(shape, words):
    assert describe(shape) == words


@pytest.mark.parametrize("identified, table", [(identify, layouts._SIGNS), (layouts.identify_vit, layouts._VIT_SIGNS)])
def test_a_file_of_many_prefixes_is_looked_at_a_few_times(monkeypatch, identified, table):
    """Each look goes over all names, so as many looks as prefixes would be quadratic."""
    looks, real = [], layouts._convert_shapes
    monkeypatch.setattr(layouts, "_convert_shapes", lambda *given: looks.append(given[3]) or real(*given))
    for _, _, signs in table:
        looks.clear()
        assert identified({f"p{i}.{sign}": () for i in range(200) for sign in signs}) is None
        assert 1 <= len(looks) <= 16 * len(table)
