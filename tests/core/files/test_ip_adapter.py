"""IP-Adapter files: recognised by shapes that come from third-party code and listings, projections against diffusers' own."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import public_layouts as public
import pytest
import torch
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection, IPAdapterFaceIDPlusImageProjection
from safetensors.torch import save_file

from flexip_core.files import ip_adapter
from flexip_core.files.ip_adapter import FAMILIES, load_pair, recognise

REPO = Path(__file__).resolve().parents[3]
H, BIG_G = "ViT-H-14", "ViT-bigG-14"
PLUS_SD15 = (public.plus, 1280, 768, 768, 12)  # IPAdapterPlus.init_proj
PLUS_SDXL = (public.plus, 1280, 2048, 1280, 20)  # IPAdapterPlusXL.init_proj
# Model card and folders of h94/IP-Adapter (models, sdxl_models; image_encoder: ViT-H 1280/1024, bigG 1664/1280), with the
# sizes of tencent-ailab/IP-Adapter's classes; ostris/ip-composition-adapter ("use just like other IP+ adapters", CLIP-H).
FILES = {
    "ip-adapter_sd15": ("SD1.5", "plain", H, 1024, (public.plain, 1024, 768)),
    "ip-adapter_sd15_light": ("SD1.5", "plain", H, 1024, (public.plain, 1024, 768)),
    "ip-adapter_sd15_light_v11": ("SD1.5", "plain", H, 1024, (public.plain, 1024, 768)),
    "ip-adapter_sd15_vit-G": ("SD1.5", "plain", BIG_G, 1280, (public.plain, 1280, 768)),
    "ip-adapter-plus_sd15": ("SD1.5", "plus", H, 1280, PLUS_SD15),
    "ip-adapter-plus-face_sd15": ("SD1.5", "plus", H, 1280, PLUS_SD15),
    "ip-adapter-full-face_sd15": ("SD1.5", "full face", H, 1280, (public.full, 1280, 768)),
    "ip_plus_composition_sd15": ("SD1.5", "plus", H, 1280, PLUS_SD15),
    "ip-adapter_sdxl": ("SDXL", "plain", BIG_G, 1280, (public.plain, 1280, 2048)),
    "ip-adapter_sdxl_vit-h": ("SDXL", "plain", H, 1024, (public.plain, 1024, 2048)),
    # sizes in bytes: 1,405,172,056 is twice that of ip-adapter_sdxl (702,585,376), 1,396,798,350 twice that of _vit-h (698,391,064)
    "noobIPAMARK1_mark1": ("SDXL", "plain", BIG_G, 1280, (public.plain, 1280, 2048)),
    "ip_adapter_Noobtest_800000": ("SDXL", "plain", H, 1024, (public.plain, 1024, 2048)),
    "ip-adapter-plus_sdxl_vit-h": ("SDXL", "plus", H, 1280, PLUS_SDXL),
    "ip-adapter-plus-face_sdxl_vit-h": ("SDXL", "plus", H, 1280, PLUS_SDXL),
    "ip_plus_composition_sdxl": ("SDXL", "plus", H, 1280, PLUS_SDXL),
}


@functools.cache
def unet(base: str):
    return public.unet_on_meta({"SD1.5": public.SD15, "SDXL": public.SDXL}[base])


def shapes_of(name: str) -> public.Shapes:
    base, _, _, _, projection = FILES[name]
    return public.public_shapes(public.on_meta(*projection), unet(base))


@pytest.mark.parametrize("name", FILES)
def test_every_public_file_is_recognised_with_family_base_and_clip(name):
    base, family, clip, width, _ = FILES[name]
    file = recognise(shapes_of(name))
    assert (file.base, file.family.name, file.clip.model, file.width) == (base, family, clip, width)
    assert name in file.family.files


def test_the_families_name_the_files_that_are_tested_here_and_no_others():
    assert {name for family in FAMILIES for name in family.files} == set(FILES)


def test_the_fixtures_agree_with_published_listings():
    """Tensor counts: leejet/stable-diffusion.cpp pull request 1839, run with h94's plus files. SDXL plain: a published audit of
    h94's file lists 140 attention tensors and the shapes below. SD1.5: numbers 1, 3, ..., 31."""
    assert len(shapes_of("ip-adapter-plus_sd15")) == 83
    assert len(shapes_of("ip-adapter-plus_sdxl_vit-h")) == 191
    sdxl = shapes_of("ip-adapter_sdxl")
    assert sum(key.startswith("ip_adapter.") for key in sdxl) == 140
    listed = {
        "image_proj.norm.bias": (2048,),
        "image_proj.norm.weight": (2048,),
        "image_proj.proj.bias": (8192,),
        "image_proj.proj.weight": (8192, 1280),
        "ip_adapter.1.to_k_ip.weight": (640, 2048),
        "ip_adapter.1.to_v_ip.weight": (640, 2048),
        "ip_adapter.101.to_k_ip.weight": (1280, 2048),
    }
    assert listed.items() <= sdxl.items()
    sd15 = shapes_of("ip-adapter-plus_sd15")
    assert sorted({int(key.split(".")[1]) for key in sd15 if key.startswith("ip_adapter.")}) == list(range(1, 32, 2))
    assert sd15["image_proj.latents"] == (1, 16, 768) and sd15["ip_adapter.1.to_k_ip.weight"] == (320, 768)


def projected(prefix: str, module: torch.nn.Module) -> public.Shapes:
    return {f"{prefix}{key}": tuple(value.shape) for key, value in public.public_image_proj(module).items()}


def attention(base: str) -> public.Shapes:
    return {f"ip_adapter.{key}": shape for key, shape in public.public_attention_shapes(unet(base)).items()}


def lora(base: str) -> public.Shapes:
    """attention_processor_faceid.py: rank 128 beside every attention of the UNet; the first one is number 0."""
    width = unet(base).config.block_out_channels[base == "SDXL"]
    return {
        f"ip_adapter.0.to_{kind}_lora.{way}.weight": (128, width) if way == "down" else (width, 128)
        for kind in ("q", "k", "v", "out")
        for way in ("down", "up")
    }


def face_id(text: int, tokens: int = 4) -> public.Shapes:
    """ip_adapter_faceid.py, MLPProjModel"""
    return projected(
        "image_proj.", public.on_meta(IPAdapterFaceIDImageProjection, 512, text, mult=2, num_tokens=tokens)
    )


def face_id_plus(text: int, hidden: int = 1280) -> public.Shapes:
    """ip_adapter_faceid.py, ProjPlusModel"""
    return projected(
        "image_proj.", public.on_meta(IPAdapterFaceIDPlusImageProjection, text, text, hidden, heads=text // 64)
    )


def flux_xlabs() -> public.Shapes:
    """Keys and shapes of XLabs-AI/flux-ip-adapter as listed in invoke-ai/InvokeAI, tests/backend/flux/ip_adapter/xlabs_flux_ip_adapter_state_dict.py."""
    blocks = {
        f"double_blocks.{n}.processor.ip_adapter_double_stream_{kind}_proj.{part}": (3072, 4096)[
            : 2 if part == "weight" else 1
        ]
        for n in range(19)
        for kind in "kv"
        for part in ("weight", "bias")
    }
    return blocks | {
        "ip_adapter_proj_model.norm.bias": (4096,),
        "ip_adapter_proj_model.norm.weight": (4096,),
        "ip_adapter_proj_model.proj.bias": (16384,),
        "ip_adapter_proj_model.proj.weight": (16384, 768),
    }


def flux_instantx() -> public.Shapes:
    """Shakker-Labs/ComfyUI-IPAdapter-Flux, ipadapter_flux.py: SigLIP 1152 wide, 128 tokens 4096 wide, 19 + 38 blocks 3072 wide."""
    proj = projected("image_proj.", public.on_meta(IPAdapterFaceIDImageProjection, 1152, 4096, mult=2, num_tokens=128))
    return proj | {f"ip_adapter.{n}.to_{kind}_ip.weight": (3072, 4096) for n in range(57) for kind in "kv"}


FOREIGN = {
    # FaceID as in tencent-ailab's ip_adapter_faceid.py; the portrait files have 16 tokens and no LoRA (cubiq/ComfyUI_IPAdapter_plus)
    "ip-adapter-faceid_sd15": (
        lambda: face_id(768) | attention("SD1.5") | lora("SD1.5"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "ip-adapter-faceid_sdxl": (
        lambda: face_id(2048) | attention("SDXL") | lora("SDXL"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "ip-adapter-faceid-plusv2_sd15": (
        lambda: face_id_plus(768) | attention("SD1.5") | lora("SD1.5"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "ip-adapter-faceid-plusv2_sdxl": (
        lambda: face_id_plus(2048) | attention("SDXL") | lora("SDXL"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "ip-adapter-faceid-portrait_sd15": (
        lambda: face_id(768, 16) | attention("SD1.5"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "ip-adapter-faceid-portrait_sdxl": (
        lambda: face_id(2048, 16) | attention("SDXL"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    # cubiq/ComfyUI_IPAdapter_plus knows Kolors by a resampler 2048 wide (FaceID: 4096) on SDXL's attentions; its CLIP is ViT-L at 336 px
    "Kolors-IP-Adapter-Plus": (
        lambda: projected("image_proj.", public.on_meta(public.plus, 1024, 2048, 2048, 12)) | attention("SDXL"),
        "Kolors.*ComfyUI_IPAdapter_plus",
    ),
    "Kolors-IP-Adapter-FaceID-Plus": (
        lambda: face_id_plus(4096, 1024) | attention("SDXL"),
        "FaceID.*ComfyUI_IPAdapter_plus",
    ),
    "flux-ip-adapter (XLabs)": (flux_xlabs, "Flux.*x-flux-comfyui.*XLabs"),
    "FLUX.1-dev-IP-Adapter (InstantX)": (flux_instantx, "Flux.*ComfyUI-IPAdapter-Flux.*InstantX"),
    # instantX-research/InstantID, pipeline_stable_diffusion_xl_instantid.py: Resampler(dim=1280, heads=20, embedding_dim=512)
    "InstantID": (
        lambda: projected("image_proj.", public.on_meta(public.plus, 512, 2048, 1280, 20)) | attention("SDXL"),
        "InstantID",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_for_other_packs_are_refused_with_what_they_are_and_who_runs_them(name):
    make, words = FOREIGN[name]
    with pytest.raises(ValueError, match=words) as error:
        recognise(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        {"lora_unet_x.lora_up.weight": (4, 8)},
        {"image_proj_model.latents": (1, 16, 1024), "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 320)},
        {"latents": (1, 16, 768), "proj_in.weight": (768, 1280)},
    ],
    ids=["empty", "checkpoint", "lora", "another model's projection", "diffusers lora", "bare resampler"],
)
def test_what_is_no_ip_adapter_is_none(shapes):
    assert recognise(shapes) is None


def without(shapes: public.Shapes, *keys: str) -> public.Shapes:
    return {key: shape for key, shape in shapes.items() if key not in keys}


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: without(s, "ip_adapter.31.to_k_ip.weight", "ip_adapter.31.to_v_ip.weight"),
            r"15 cross-attentions and text width 768.*SD1.5 \(16, 768\) and SDXL \(70, 2048\)",
        ),
        (
            lambda s: s | {key: (*shape[:1], 1024) for key, shape in s.items() if "_ip." in key},
            "16 cross-attentions and text width 1024",
        ),
        (lambda s: s | {"ip_adapter.1.to_k_ip.weight": (640, 768)}, "16 cross-attentions"),
        (lambda s: without(s, "image_proj.proj_in.weight"), "has no tensor image_proj.proj_in.weight"),
        (lambda s: s | {"image_proj.latents": (16,)}, "too few dimensions"),
        (lambda s: s | {"image_proj.proj_in.weight": (768, 1234)}, "CLIP penultimate 1234 wide.*ViT-H-14"),
        (
            lambda s: {key.replace("image_proj.", "image_proj.other."): shape for key, shape in s.items()},
            "image projection FlexIP does not know",
        ),
    ],
    ids=[
        "a block less",
        "another text width",
        "another block width",
        "no proj_in",
        "flat latents",
        "unknown clip",
        "unknown projection",
    ],
)
def test_a_file_that_is_almost_one_is_refused_with_its_numbers(change, words):
    with pytest.raises(ValueError, match=words):
        recognise(change(shapes_of("ip-adapter-plus_sd15")))


# --- the files' contents ---

SMALL = {  # public layouts, narrow: the attentions of a small UNet of SD1.5's kind, text 64 wide
    "plain": lambda: public.plain(24, 64),
    "plus": lambda: public.plus(32, 64, 128, 3, 5),
    "full face": lambda: public.full(32, 64),
}
SMALL_UNET = dict(public.SD15, block_out_channels=(32, 64, 96, 96), cross_attention_dim=64)


@pytest.fixture
def small_world(monkeypatch):
    """Bases and CLIP towers of the small files, in place of the real ones."""
    sd15 = {address: {320: 32, 640: 64, 1280: 96}[width] for address, width in ip_adapter.BASES["SD1.5"][1].items()}
    other = {address: 2 * width for address, width in sd15.items()}
    monkeypatch.setattr(ip_adapter, "BASES", {"small": (64, sd15), "other": (64, other)})
    monkeypatch.setattr(ip_adapter, "TOWERS", {(32, 24): "tiny"})


def small_tensors(family: str, seed: int = 0, **unet_changes) -> dict[str, torch.Tensor]:
    module = SMALL[family]()
    return public.random_tensors(
        public.public_shapes(module, public.unet_on_meta({**SMALL_UNET, **unet_changes})), seed
    )


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, path
    ) if path.suffix == ".safetensors" else torch.save(public.nested(tensors), path)
    return path


def diffusers_projection(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Through diffusers' own loader."""
    holder = public.unet_on_meta(SMALL_UNET)
    return holder._convert_ip_adapter_image_proj_to_diffusers(
        public.nested(tensors)["image_proj"], low_cpu_mem_usage=False
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("family", SMALL)
def test_image_projections_equal_diffusers_on_the_same_file(tmp_path, small_world, family, suffix):
    tensors = small_tensors(family)
    pair = load_pair(write(tmp_path / f"any name{suffix}", tensors), None)
    need = pair.needs()[0]
    assert pair.kinds == (f"IP-Adapter {family} for small",) and need.null == {"plain": "zeros"}.get(
        family, "zero pixels"
    )
    feature = torch.randn((3, 24) if family == "plain" else (3, 17, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = pair.parts["preservation"].image_proj(feature), diffusers_projection(tensors)(feature)
        tokens = pair.tokens("preservation", {"preservation": feature})
    assert theirs.std() > 0.1 and (theirs[0] - theirs[1]).abs().max() > 0.1, "the projection must depend on the picture"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens, theirs.reshape(1, -1, 64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip-adapter-plus_sdxl_vit-h", "ip-adapter-full-face_sd15"]
)
def test_image_projections_of_full_size_equal_diffusers(name):
    _, family, _, width, _ = FILES[name]
    shapes = shapes_of(name)
    tensors = public.random_tensors({key: shape for key, shape in shapes.items() if key.startswith("image_proj.")}, 4)
    proj = {key.removeprefix("image_proj."): value for key, value in tensors.items()}
    ours = ip_adapter._image_projection(recognise(shapes), proj, torch.nn)
    ours.load_state_dict(ip_adapter._renamed(recognise(shapes).family, proj), strict=True)
    feature = torch.randn(
        (2, width) if family == "plain" else (2, 257, width), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        theirs = diffusers_projection(tensors)(feature)
        torch.testing.assert_close(ours(feature), theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.1


def test_keys_and_values_go_to_their_block_by_the_files_numbers(tmp_path, small_world):
    """Ten and more sort as numbers, not as text: block 3 of the file is input.2.0, its last one the middle."""
    tensors = small_tensors("plain")
    pair = load_pair(write(tmp_path / "a.safetensors", tensors), None)
    for address, number in (
        ("input.1.0", 1),
        ("input.2.0", 3),
        ("output.3.0", 13),
        ("output.11.0", 29),
        ("middle.0.0", 31),
    ):
        kv = pair.projection(address, "preservation")
        assert torch.equal(kv.to_k.weight, tensors[f"ip_adapter.{number}.to_k_ip.weight"])
        assert torch.equal(kv.to_v.weight, tensors[f"ip_adapter.{number}.to_v_ip.weight"])


def test_a_pair_asks_for_each_files_own_feature(tmp_path, small_world):
    paths = [write(tmp_path / f"{family}.safetensors", small_tensors(family)) for family in ("plus", "plain")]
    pair = load_pair(*paths)
    assert [(need.name, need.kind, need.width, need.null) for need in pair.needs()] == [
        ("preservation", "penultimate", 32, "zero pixels"),
        ("personalization", "embedding", 24, "zeros"),
    ]
    assert pair.gate_mode == "outputs" and not any(p.requires_grad for p in pair.parameters())


def test_a_pair_for_different_bases_is_refused_by_naming_both_files(tmp_path, small_world):
    one = write(tmp_path / "one.safetensors", small_tensors("plus"))
    two = write(tmp_path / "two.bin", small_tensors("plain", block_out_channels=(64, 128, 192, 192)))
    with pytest.raises(
        ValueError,
        match=r"one\.safetensors is an IP-Adapter plus for small but two\.bin is an IP-Adapter plain for other",
    ):
        load_pair(one, two)


@pytest.mark.parametrize(
    "key, words",
    [
        ("ip_adapter.3.to_v_ip.weight", "has no tensor ip_adapter.3.to_v_ip.weight"),
        ("image_proj.latents", "image projection FlexIP does not know"),
        ("image_proj.layers.0.0.to_q.weight", "has no tensor layers.0.0.to_q.weight"),
        ("image_proj.layers.2.1.3.weight", "has no tensor resampler.layers.2.ff_out.weight"),
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused_by_the_tensors_name(tmp_path, small_world, key, words):
    tensors = small_tensors("plus")
    del tensors[key]
    with pytest.raises(ValueError, match=f"broken.safetensors .*{words}") as error:
        load_pair(write(tmp_path / "broken.safetensors", tensors), None)
    assert "\n" not in str(error.value)


def test_a_file_of_neither_kind_is_refused_with_what_is_in_it(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(
        ValueError,
        match=r"lora\.safetensors is neither a FlexIP checkpoint nor an IP-Adapter \(1 tensors, lora_unet_down",
    ):
        load_pair(path, None)


def test_a_pickle_with_code_is_not_opened(tmp_path):
    path = tmp_path / "evil.bin"
    torch.save({"image_proj": public.plain(8, 8), "ip_adapter": {}}, path)
    with pytest.raises(ValueError, match="evil.bin.*contains Python objects"):
        load_pair(path, None)


def test_readme_lists_the_files_that_the_recogniser_knows():
    section = (
        (REPO / "README.md").read_text(encoding="utf-8").split("## Which file for what", 1)[1].split("\n## ", 1)[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("| `ip")]
    named = [name for row in rows for name in re.findall(r"`((?:ip|noob)[\w.-]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(name for family in FAMILIES for name in family.files)
    for row in rows:
        families = {
            family.name
            for family in FAMILIES
            for name in re.findall(r"`((?:ip|noob)[\w.-]+)`", row)
            if name in family.files
        }
        assert len(families) == 1 and next(iter(families)) in row, f"one family per row, named: {row}"
        assert "models/ipadapter" in row
