"""The same IP-Adapter in every wrapping that people have: it loads with the same values, or is refused by what it is."""

from __future__ import annotations

import functools

import public_layouts as public
import pytest
import torch
from diffusers import UNet2DConditionModel
from test_ip_adapter import SMALL_UNET, attention, lora, small_tensors, small_world, write  # noqa: F401

from flexip_core.files.ip_adapter import load_pair, recognise

Tensors = dict[str, torch.Tensor]


def renamed(tensors: Tensors, projection: str, attention: str) -> Tensors:
    return {
        key.replace("image_proj.", projection, 1).replace("ip_adapter.", attention, 1): t for key, t in tensors.items()
    }


@functools.cache
def block_names() -> list[str]:
    return public.cross_attention_names(public.unet_on_meta(SMALL_UNET))


def by_block(tensors: Tensors, before: str = "", index: str = "") -> Tensors:
    """ip_adapter.N as the name of its attention processor in the UNet."""
    names = block_names()
    found = {}
    for key, value in tensors.items():
        part, number, *rest = key.split(".")
        if part == "ip_adapter":
            key = f"{before}{names[int(number) // 2]}.processor.{rest[0]}{index}.weight"
        found[key] = value
    return found


def projection_only(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key.startswith("image_proj.")}


def training(tensors: Tensors) -> Tensors:
    """tutorial_train.py's pytorch_model.bin: the UNet shares the processors' tensors with the list."""
    raw = renamed(tensors, "image_proj_model.", "adapter_modules.") | {"unet.conv_in.weight": torch.zeros(8, 4, 3, 3)}
    return raw | {k: v for k, v in by_block(tensors, "unet.").items() if k.startswith("unet.")}


def accelerates(tensors: Tensors) -> Tensors:
    """One name of each shared tensor, the first, which is the UNet's."""
    return {key: value for key, value in training(tensors).items() if not key.startswith("adapter_modules.")}


def before(prefix: str):
    return lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items()}


def diffusers_unet(tensors: Tensors) -> Tensors:
    """What diffusers itself saves after it has loaded the file."""
    unet = UNet2DConditionModel(**SMALL_UNET)
    unet._load_ip_adapter_weights([public.nested(tensors)], low_cpu_mem_usage=False)
    return unet.state_dict()


WRAPPINGS = {
    "training": (training, "a training checkpoint"),
    "training, DataParallel": (lambda t: before("module.")(training(t)), "a training checkpoint"),
    "accelerate": (accelerates, "a training checkpoint"),
    "accelerate, DataParallel inside": (
        lambda t: {k.replace("image_proj_model.", "image_proj_model.module."): v for k, v in accelerates(t).items()},
        "a training checkpoint",
    ),
    "half converted": (lambda t: renamed(t, "image_proj.", "adapter_modules."), "a training checkpoint"),
    "DataParallel": (before("module."), "a wrapped file"),
    "DataParallel inside": (lambda t: renamed(t, "image_proj.module.", "ip_adapter.module."), "a wrapped file"),
    "compiled": (lambda t: renamed(t, "image_proj._orig_mod.", "ip_adapter._orig_mod."), "a wrapped file"),
    "in a wrapper": (before("model."), "a wrapped file"),
    "two wrappers": (before("state.ip_adapter."), "a wrapped file"),
    "named by block": (lambda t: by_block(t, "ip_adapter."), "diffusers' names"),
    "a list per block": (
        lambda t: {k.replace("_ip.weight", "_ip.0.weight"): v for k, v in t.items()},
        "a wrapped file",
    ),
    "diffusers": (diffusers_unet, "diffusers' names"),
}


@pytest.mark.parametrize(
    "case, family",
    [(case, "plain") for case in WRAPPINGS]
    + [(case, family) for case in ("training", "diffusers") for family in ("plus", "full face")],
)
def test_every_wrapping_loads_with_the_values_of_the_published_file(tmp_path, small_world, case, family):
    change, words = WRAPPINGS[case]
    tensors = small_tensors(family)
    expected = load_pair(write(tmp_path / "published.safetensors", tensors), None)
    torch.save({key: value.clone() for key, value in change(tensors).items()}, tmp_path / "theirs.bin")
    theirs = load_pair(tmp_path / "theirs.bin", None)
    assert expected.kinds == (f"IP-Adapter {family} for small",)
    assert theirs.kinds == (f"IP-Adapter {family} for small, read from {words}",)
    state = theirs.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def shapes(tensors: Tensors) -> public.Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items()}


UNUSED = {
    "biases": ("ip_adapter.1.to_k_ip.bias", (32,)),
    "a query": ("ip_adapter.1.to_q_ip.weight", (32, 32)),
    "a scale": ("ip_adapter.scale", ()),
    "a second adapter": ("ip_adapter.1.to_k_ip.1.weight", (32, 64)),
    "a query by block": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_q_ip.weight",
        (32, 32),
    ),
    "a key without its block": ("ip_adapter.33.to_z_ip.weight", (32, 64)),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_tensor_of_the_attention_part_that_is_not_used_is_refused_by_name(small_world, case):
    key, shape = UNUSED[case]
    with pytest.raises(ValueError) as error:
        recognise(shapes(small_tensors("plain")) | {key: shape})
    assert f"has the tensor {key} in its attention part, which FlexIP does not use" in str(error.value)


def test_several_of_them_are_counted(small_world):
    found = shapes(small_tensors("plain"))
    found |= {key.replace(".weight", ".bias"): shape[:1] for key, shape in found.items() if "_ip." in key}
    with pytest.raises(ValueError, match=r"ip_adapter\.1\.to_k_ip\.bias and 31 more"):
        recognise(found)


def test_two_adapters_in_one_file_are_refused(small_world):
    tensors = small_tensors("plain")
    with pytest.raises(ValueError, match=r"more than one IP-Adapter \(model\.image_proj\..* and ema\.image_proj\."):
        recognise(shapes(before("model.")(tensors) | before("ema.")(tensors)))


def test_an_empty_attention_part_says_so(tmp_path, small_world):
    path = tmp_path / "half.bin"
    torch.save({"image_proj": public.nested(small_tensors("plain"))["image_proj"], "ip_adapter": {}}, path)
    with pytest.raises(ValueError, match=r"half\.bin has the image projection .* ip_adapter part is empty"):
        load_pair(path, None)


def plain_sdxl() -> public.Shapes:
    proj = {f"image_proj.{k}": tuple(v.shape) for k, v in public.on_meta(public.plain, 1280, 2048).state_dict().items()}
    return proj | attention("SDXL")


FOREIGN = {
    "FaceID, a raw training": (
        lambda: {
            key.replace("ip_adapter.", "adapter_modules."): shape
            for key, shape in (attention("SD1.5") | lora("SD1.5")).items()
        },
        "FaceID adapter.*ComfyUI_IPAdapter_plus",
    ),
    # names as in cubiq/ComfyUI_IPAdapter_plus issue 153, rank as in attention_processor_faceid.py
    "FaceID's LoRA": (
        lambda: {
            f"lora_unet_down_blocks_{b}_attentions_0_transformer_blocks_0_attn{a}_to_{p}.lora_{way}.weight": (
                (128, 320) if way == "down" else (320, 128)
            )
            for b in (0, 1)
            for a in (1, 2)
            for p in ("q", "k", "v", "out_0")
            for way in ("down", "up")
        },
        "LoRA of a FaceID adapter.*models/loras",
    ),
    "MS-Diffusion": (
        lambda: (
            plain_sdxl()
            | {"image_proj.grounding_latents": (1, 16, 1280), "image_proj.latent_proj.0.weight": (2048, 1024)}
        ),
        "MS-Diffusion.*ComfyUI_StoryDiffusion",
    ),
    "CSGO": (
        lambda: (
            {"content_image_proj.latents": (1, 4, 1280), "style_image_proj.latents": (1, 32, 1280)} | attention("SDXL")
        ),
        "CSGO.*ComfyUI_CSGO_Wrapper",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_relatives_are_named(name):
    make, words = FOREIGN[name]
    with pytest.raises(ValueError, match=words):
        recognise(make())


def test_a_lora_of_another_rank_or_with_more_in_it_is_none():
    make, _ = FOREIGN["FaceID's LoRA"]
    small = {key: tuple(min(side, 16) for side in shape) for key, shape in make().items()}
    assert recognise(small) is None
    assert recognise(make() | {"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (128, 320)}) is None
