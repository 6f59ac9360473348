"""IP-Adapter files in ComfyUI's UNet against diffusers' own loader, attention processors and UNet, on the same random weights.

Our side is the real way: a gated model sampled by ComfyUI with CFG. The UNet's inputs and outputs and the output of every
cross-attention are caught there, and diffusers is run on the very same inputs. Weights go through ComfyUI's own converter.
"""

from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import public_layouts as public
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from flexip_pack.flexip_core.files import ip_adapter
from flexip_pack.flexip_core.files.ip_adapter import IPAdapterFile, IPAdapterPair, SingleAdapter
from flexip_pack.flexip_core.network.blocks import block_widths, cross_attentions
from flexip_pack.flexip_core.network.config import ClipConfig, FeatureNeed
from flexip_pack.flexip_core.run.reference import Reference
from flexip_pack.nodes import encoders, runtime
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

TOLERANCE = 1e-4
SIZES = dict(
    original_height=512, original_width=640, crop_h=16, crop_w=8, target_height=768, target_width=1024
)  # SDXL's, all different

NARROW = {"plain": (public.plain, 24, 64), "plus": (public.plus, 32, 64, 128, 3, 5), "full face": (public.full, 32, 64)}


@dataclasses.dataclass(frozen=True)
class Case:
    base: str
    config: dict
    projections: dict  # family -> diffusers' image projection and its arguments


NARROW_CASES = {
    "SD1.5, all 16 blocks": Case(
        "SD1.5", {**public.SD15, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64}, NARROW
    ),
    "SDXL, all 70 blocks": Case(
        "SDXL",
        {
            **public.SDXL,
            "block_out_channels": (32, 64, 128),
            "attention_head_dim": (2, 4, 8),
            "cross_attention_dim": 64,
        },
        NARROW,
    ),
}
FULL_SD15 = Case("SD1.5", public.SD15, {"plain": (public.plain, 1024, 768), "plus": (public.plus, 1280, 768, 768, 12)})
WIDE_SDXL = Case(
    "SDXL",
    {**public.SDXL, "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2)},
    {"plain": (public.plain, 1280, 2048), "plus": (public.plus, 1280, 2048, 1280, 20)},
)


def random_unet(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """diffusers' state dict; values that fp16 holds, so that both sides can make their fp32 copy of it, one after the other."""
    g = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(value.shape, generator=g) * (0.5 / value[0].numel() ** 0.5)).half()
        if value.dim() > 1
        else torch.full(value.shape, float("norm" in key and key.endswith("weight"))).half()
        for key, value in public.unet_on_meta(config).state_dict().items()
    }


def diffusers_unet(config: dict, weights: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """Takes the weights out of `weights`, so that a full UNet is held once."""
    model = public.unet_on_meta(config)
    model.load_state_dict({key: weights.pop(key).float() for key in list(weights)}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def comfy_config(config: dict) -> dict:
    """ComfyUI's words for a diffusers UNet, as comfy.model_detection writes them; for sizes that its detection does not list."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", (1,) * len(widths))
    depths = [depth if kind.startswith("CrossAttn") else 0 for kind, depth in zip(config["down_block_types"], depths)]
    xl = "addition_embed_type" in config
    heads = (
        {"num_head_channels": widths[0] // config["attention_head_dim"][0]}
        if xl
        else {"num_heads": config["attention_head_dim"]}
    )
    return dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        channel_mult=[w // widths[0] for w in widths],
        num_res_blocks=[layers] * len(widths),
        transformer_depth=[d for d in depths for _ in range(layers)],
        transformer_depth_output=[d for d in depths for _ in range(layers + 1)],
        transformer_depth_middle=max(depths),
        context_dim=config["cross_attention_dim"],
        use_linear_in_transformer=xl,
        use_spatial_transformer=True,
        legacy=False,
        use_temporal_attention=False,
        adm_in_channels=config["projection_class_embeddings_input_dim"] if xl else None,
        **({"num_classes": "sequential"} if xl else {}),
        **heads,
    )


def comfy_model(case: Case, weights: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """Detected and converted by ComfyUI where its detection knows the sizes, else built by its classes and named by its converter."""
    if case.config in (public.SD15, public.SDXL):
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": torch.float32})
    words = comfy_config(case.config)
    supported = {"SD1.5": comfy.supported_models.SD15, "SDXL": comfy.supported_models.SDXL}[case.base](
        {**words, "dtype": torch.float32}
    )
    supported.unet_config.update(words)  # its class puts 64 channels per head, whatever the width
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model({}, "", device=tiny.CPU)
    names = comfy.utils.unet_to_diffusers(words)
    model.diffusion_model.load_state_dict({names[key]: value.float() for key, value in weights.items()}, strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=tiny.CPU, offload_device=tiny.CPU)


def file_order(addresses) -> list[str]:
    """IP-Adapter counts through input, output, middle."""
    return sorted(addresses, key=lambda address: ("input", "output", "middle").index(address.split(".")[0]))


def our_adapters(case: Case, tensors: dict[str, dict], model, tmp_path) -> dict[str, SingleAdapter]:
    widths, text_width = block_widths(model.model.diffusion_model)
    adapters = {}
    for family, values in tensors.items():
        if case.config in (public.SD15, public.SDXL):  # real sizes: through the file, as users do
            save_file(values, tmp_path / f"{family}.safetensors")
            adapters[family] = ip_adapter.load_pair(tmp_path / f"{family}.safetensors", None).parts["preservation"]
            continue
        made = case.projections[family]
        blocks = {address: widths[address] for address in file_order(widths)}
        file = IPAdapterFile(
            next(f for f in ip_adapter.FAMILIES if f.name == family),
            case.base,
            text_width,
            blocks,
            ClipConfig("tiny", 24),
            made[1],
        )
        adapters[family] = SingleAdapter(file, values).eval().requires_grad_(False)
    return adapters


def features(case: Case, family: str, seed: int, pictures: int = 2) -> torch.Tensor:
    """(pictures, width) or (pictures, tokens, width)"""
    width = case.projections[family][1]
    return torch.randn(
        (pictures, width) if family == "plain" else (pictures, 17, width), generator=tiny.generator(seed)
    )


def conditionings(case: Case) -> tuple[list, list]:
    extra = dict(
        height=SIZES["original_height"],
        width=SIZES["original_width"],
        **{key: SIZES[key] for key in ("crop_h", "crop_w", "target_height", "target_width")},
    )
    return tuple(
        [
            [
                torch.randn(1, 77, case.config["cross_attention_dim"], generator=tiny.generator(seed)),
                {"pooled_output": torch.randn(1, 1280, generator=tiny.generator(seed + 50)), **extra},
            ]
        ]
        for seed in (1, 2)
    )


def sample_and_catch(gated, case: Case) -> SimpleNamespace:
    """One UNet call of ComfyUI's sampling: its inputs, its output, the output of every cross-attention."""
    caught = SimpleNamespace(blocks={})

    def spy(executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        caught.x, caught.t, caught.context, caught.y, caught.chunks = (
            x.clone(),
            timesteps.clone(),
            context.clone(),
            y,
            transformer_options["cond_or_uncond"],
        )
        caught.output = executor(x, timesteps, context, y, control, transformer_options, **kwargs).clone()
        return caught.output

    gated = gated.clone()
    gated.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
    hooks = [
        attention.to_out.register_forward_hook(
            lambda module, inputs, output, address=address: caught.blocks.__setitem__(address, output.clone())
        )
        for address, attention in cross_attentions(gated.model.diffusion_model).items()
    ]
    positive, negative = conditionings(case)
    tiny.ksample(gated, positive, negative, steps=1, noise=tiny.noise_for(1, 16, 16))
    for hook in hooks:
        hook.remove()
    assert sorted(caught.chunks) == [0, 1], "conditioned and unconditioned must come in one call"
    return caught


def run_diffusers(
    model: UNet2DConditionModel, case: Case, caught: SimpleNamespace, embeds: list[tuple], scales: list[float]
) -> SimpleNamespace:
    """`embeds`: per adapter its features of the reference and of the null reference."""
    result = SimpleNamespace(blocks=[])
    for processor in model.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = list(scales)
    hooks = [
        model.get_submodule(f"{name}.to_out.0").register_forward_hook(
            lambda module, inputs, output: result.blocks.append((module, output))
        )
        for name in public.cross_attention_names(model)
    ]
    added = {
        "image_embeds": [torch.stack([(positive, null)[chunk] for chunk in caught.chunks]) for positive, null in embeds]
    }
    if case.base == "SDXL":
        pooled = [conditionings(case)[chunk][0][1]["pooled_output"] for chunk in caught.chunks]
        added |= {"text_embeds": torch.cat(pooled), "time_ids": torch.tensor([list(map(float, SIZES.values()))] * 2)}
    result.output = model(caught.x, caught.t, encoder_hidden_states=caught.context, added_cond_kwargs=added).sample
    for hook in hooks:
        hook.remove()
    outputs = {id(module): output for module, output in result.blocks}
    result.blocks = [
        outputs[id(model.get_submodule(f"{name}.to_out.0"))] for name in public.cross_attention_names(model)
    ]
    return result


@dataclasses.dataclass(frozen=True)
class Setting:
    """gate and strength on our side, and what diffusers' scales must then be, per adapter."""

    preservation: str | None
    personalization: str | None
    gate: float
    strength: float

    def scales(self, families: list[str]) -> list[float]:
        return [
            self.strength
            * ((family == self.preservation) * self.gate + (family == self.personalization) * (1 - self.gate))
            for family in families
        ]


def compare(case: Case, settings: list[Setting], tmp_path) -> None:
    """Asserts the output and every block at each setting."""
    families = list(case.projections)
    weights = random_unet(case.config)
    meta = public.unet_on_meta(case.config)
    tensors = {
        family: public.random_tensors(public.public_shapes(public.on_meta(*made), meta), seed)
        for seed, (family, made) in enumerate(case.projections.items(), 10)
    }
    positive, null = (
        {family: features(case, family, seed + n) for n, family in enumerate(families)} for seed in (30, 40)
    )
    model = comfy_model(case, weights)
    adapters = our_adapters(case, tensors, model, tmp_path)
    bare, ours = sample_and_catch(model, case), []
    for setting in settings:
        roles = {"preservation": setting.preservation, "personalization": setting.personalization}
        pair = IPAdapterPair(*(family and adapters[family] for family in roles.values()))
        reference = Reference(
            *({role: table[family] for role, family in roles.items() if family} for table in (positive, null)), "random"
        )
        ours.append(
            sample_and_catch(
                runtime.attach(model, tiny.link_for(pair, reference, setting.gate, strength=setting.strength)), case
            )
        )
    order = file_order(cross_attentions(model.model.diffusion_model))
    del model, adapters, pair, reference
    mm.unload_all_models()
    gc.collect()  # a full UNet must go before the other one comes

    theirs_model = diffusers_unet(case.config, weights)
    theirs_model._load_ip_adapter_weights(
        [public.nested(tensors[family]) for family in families], low_cpu_mem_usage=False
    )
    worst = 0.0
    with torch.no_grad():
        for setting, got in zip(settings, ours):
            theirs = run_diffusers(
                theirs_model,
                case,
                got,
                [(positive[family], null[family]) for family in families],
                setting.scales(families),
            )
            worst = max(worst, error := tiny.relative_error(got.output, theirs.output))
            assert error < TOLERANCE, setting
            assert len(theirs.blocks) == len(order) == len(got.blocks)
            for address, expected in zip(order, theirs.blocks):
                assert (block := tiny.relative_error(got.blocks[address], expected)) < TOLERANCE, (
                    setting,
                    address,
                    block,
                )
                worst = max(worst, block)
            change = min(tiny.relative_error(got.blocks[address], bare.blocks[address]) for address in order)
            assert change > 100 * TOLERANCE, (
                f"{setting}: the reference must matter in every block, the least change is {change:.1e}"
            )
    print(f"largest relative error of {case.base}, {len(order)} blocks: {worst:.1e}")


SETTINGS = [
    *(Setting("plus", None, 1.0, scale) for scale in (0.3, 1.0)),
    *(Setting(None, "plain", 0.0, scale) for scale in (0.3, 1.0)),
    Setting(None, "plus", 0.0, 0.3),
    Setting("plain", None, 1.0, 1.0),
    Setting("plus", "plain", 0.4, 0.8),
    Setting("plain", "plus", 0.4, 1.0),
]


@pytest.mark.parametrize("name", NARROW_CASES)
def test_unet_and_every_cross_attention_equal_diffusers(name, tmp_path):
    compare(NARROW_CASES[name], [*SETTINGS, Setting("full face", "plus", 0.7, 1.0)], tmp_path)


@pytest.mark.parametrize("name", NARROW_CASES)
def test_the_table_of_blocks_is_the_order_in_which_diffusers_counts(name):
    """Width by width in the real UNet; position by position is what the comparison above shows."""
    base = NARROW_CASES[name].base
    text_width, blocks = ip_adapter.BASES[base]
    real = public.unet_on_meta({"SD1.5": public.SD15, "SDXL": public.SDXL}[base])
    shapes = [shape for key, shape in public.public_attention_shapes(real).items() if ".to_k_ip." in key]
    assert shapes == [(width, text_width) for width in blocks.values()]
    comfys = {"SD1.5": comfy.supported_models.SD15, "SDXL": comfy.supported_models.SDXL}[base](
        {**comfy_config(public.SD15 if base == "SD1.5" else public.SDXL)}
    )
    comfys.set_inference_dtype(torch.float32, None)
    model = comfys.get_model({}, "", device=torch.device("meta"))
    assert block_widths(model.diffusion_model) == (blocks, text_width)
    assert list(blocks) == file_order(cross_attentions(model.diffusion_model))


@pytest.mark.long
def test_full_size_sd15_equals_diffusers(tmp_path):
    compare(FULL_SD15, SETTINGS[:4] + SETTINGS[6:7], tmp_path)


@pytest.mark.long
def test_sdxl_of_full_width_equals_diffusers(tmp_path):
    compare(WIDE_SDXL, SETTINGS[:4] + SETTINGS[6:7], tmp_path)


# --- the encode step ---

VISION = dict(width=32, layers=3, head_width=16, patch_size=14, image_size=56)
CLIP = ClipConfig("tiny", 24, VISION)


@pytest.fixture(scope="module")
def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=24,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    g = tiny.generator(3)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.3 + 0.5 * (p.dim() == 1))
    return model


def diffusers_encode(
    image_encoder, projection: torch.nn.Module, pictures: list[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """prepare_ip_adapter_image_embeds of diffusers' pipeline: the features, and what the unconditioned half gets."""
    pipe = SimpleNamespace(
        image_encoder=image_encoder,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        unet=SimpleNamespace(encoder_hid_proj=SimpleNamespace(image_projection_layers=[projection])),
    )
    pipe.encode_image = lambda *args: StableDiffusionPipeline.encode_image(pipe, *args)
    embeds = StableDiffusionPipeline.prepare_ip_adapter_image_embeds(pipe, [pictures], None, tiny.CPU, 1, True)[0]
    null, positive = embeds.chunk(2)
    return positive[0], null[0]


@pytest.mark.parametrize("family", NARROW)
def test_features_and_null_reference_equal_diffusers_encode_step(family, image_encoder, tmp_path):
    save_file(
        {key: value.contiguous() for key, value in image_encoder.state_dict().items()}, tmp_path / "encoder.safetensors"
    )
    known = next(f for f in ip_adapter.FAMILIES if f.name == family)
    need = FeatureNeed("preservation", CLIP, known.kind, 24 if known.kind == "embedding" else 32, known.null)
    levels = torch.randint(0, 256, (2, 56, 56, 3), generator=tiny.generator(8), dtype=torch.uint8)
    path = str(tmp_path / "encoder.safetensors")
    (ours,), (null,) = (found.values() for found in encoders.features([need], path, None, levels.float() / 255, {})[:2])
    theirs, their_null = diffusers_encode(
        image_encoder, NARROW[family][0](*NARROW[family][1:]), [Image.fromarray(picture.numpy()) for picture in levels]
    )
    assert ours.shape == theirs.shape == null.shape and theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(null, their_null, atol=1e-4, rtol=1e-4)
    (black,) = encoders.features([need], path, None, torch.zeros(1, 56, 56, 3), {})[0].values()
    assert (null[:1] - black).abs().max() > 1e-2, "the null reference is not a black picture"
    if known.kind == "penultimate":
        pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(
            [Image.fromarray(picture.numpy()) for picture in levels], return_tensors="pt"
        ).pixel_values
        torch.testing.assert_close(
            ours, image_encoder(pixels, output_hidden_states=True).hidden_states[-2], atol=1e-4, rtol=1e-4
        )
        assert null.abs().max() > 0.05
