"""IP-Adapter files through the real nodes: small stand-ins for the public files, with bases and CLIP towers of their size."""

from __future__ import annotations

import os
import random

import comfy.model_management as mm
import comfy.ops
import comfy.supported_models
import folder_paths
import public_layouts as public
import pytest
import test_load_and_encode as nodes_test
import tiny
import torch
from flexip_pack.flexip_core.encoders import towers
from flexip_pack.flexip_core.files import ip_adapter
from flexip_pack.flexip_core.files.ip_adapter import IPAdapterFile, IPAdapterPair, SingleAdapter
from flexip_pack.flexip_core.network.blocks import block_widths, cross_attentions
from flexip_pack.flexip_core.network.config import ClipConfig
from flexip_pack.flexip_core.run.reference import Reference
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes import files, runtime
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.load import LoadFlexIPAdapters
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_load_and_encode import CORE_CLIP, core_encoder, encode, load, picture

models = nodes_test.models  # the fixture: empty model folders of our own
TOLERANCE = 1e-5
TEXT = 64
P, N = tiny.cond(1), tiny.cond(2)
TEXTS = [(P[0][0], False), (N[0][0], True)]
# The clips "A" and "B" play ViT-H and bigG: every width of theirs differs.
CORE = {
    "A": CORE_CLIP,
    "B": {**CORE_CLIP, "hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "projection_dim": 40},
}
CLIPS = {
    "A": ClipConfig("clip A", 24, dict(width=32, layers=3, head_width=16, patch_size=14, image_size=56)),
    "B": ClipConfig("clip B", 40, dict(width=48, layers=3, head_width=16, patch_size=14, image_size=56)),
}
MAKE = {
    ("plain", "A"): (public.plain, 24, TEXT),
    ("plain", "B"): (public.plain, 40, TEXT),
    ("plus", "A"): (public.plus, 32, TEXT, 128, 3, 5),
    ("plus", "B"): (public.plus, 48, TEXT, 64, 2, 4),
    ("full face", "A"): (public.full, 32, TEXT),
}
ENCODED_WIDTH = {"plain": {"A": 24, "B": 40}, "plus": {"A": 32, "B": 48}, "full face": {"A": 32}}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


def file_blocks(model) -> dict[str, int]:
    """In IP-Adapter's order: input, output, middle."""
    widths, _ = block_widths(model.model.diffusion_model)
    return dict(sorted(widths.items(), key=lambda item: ("input", "output", "middle").index(item[0].split(".")[0])))


def tensors_of(family: str, clip: str, blocks: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    shapes = {
        f"image_proj.{key}": tuple(value.shape)
        for key, value in public.public_image_proj(MAKE[family, clip][0](*MAKE[family, clip][1:])).items()
    }
    for number, width in enumerate(blocks.values()):
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight": (width, TEXT) for kind in "kv"}
    return public.random_tensors(shapes, seed)


@pytest.fixture
def world(models, model, monkeypatch):
    """`models`, and the bases and towers of the small files in place of the public ones."""
    blocks = file_blocks(model)

    def tower(family, width):
        return CLIPS[next(clip for clip, known in ENCODED_WIDTH[family.name].items() if known == width)]

    monkeypatch.setattr(
        ip_adapter,
        "BASES",
        {"tiny": (TEXT, blocks), "other": (TEXT, {address: 2 * width for address, width in blocks.items()})},
    )
    monkeypatch.setattr(ip_adapter, "_tower", tower)
    return models


def write_adapter(
    world, name: str, family: str, clip: str = "A", seed: int = 0, base: str = "tiny", folder: str = "ipadapter"
) -> str:
    path = world / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(family, clip, ip_adapter.BASES[base][1], seed)
    torch.save(public.nested(tensors), path) if name.endswith(".bin") else save_file(tensors, path)
    return name


def write_encoder(world, name: str, clip: str, seed: int = 1):
    core = core_encoder(CORE[clip], seed)
    save_file(
        {key: value.clone().contiguous() for key, value in core.get_sd().items()}, world / files.ENCODER_FOLDER / name
    )
    return core


@pytest.fixture
def pair_world(world):
    """One file per family and clip, both encoders; names say what is in them, which nothing may depend on."""
    for number, (family, clip) in enumerate(MAKE):
        write_adapter(
            world,
            f"{family} {clip}.{'bin' if number % 2 else 'safetensors'}".replace(" ", "-"),
            family,
            clip,
            seed=number,
        )
    for seed, clip in enumerate(CORE, 1):
        write_encoder(world, f"encoder {clip}.safetensors", clip, seed)
    return world


PLUS, PLAIN = "plus-A.safetensors", "plain-A.safetensors"


def apply(model, adapters, reference, gate, strength=1.0):
    return ApplyFlexIPGate.execute(model, adapters, reference, gate, strength, 0.0, 1.0).args[0]


def gated_by(model, preservation, personalization="auto", gate=0.6, strength=1.0, **encoders):
    adapters = load(preservation, personalization)
    return apply(model, adapters, encode(adapters, picture(batch=2), **encoders).args[0], gate, strength)


@pytest.mark.parametrize(
    "preservation, personalization",
    [
        (PLUS, PLAIN),
        (PLAIN, PLUS),
        ("plus-A.safetensors", "plain-B.bin"),
        ("plain-B.bin", "plus-A.safetensors"),
        ("plus-B.bin", "full-face-A.safetensors"),
        (PLUS, PLUS),
    ],
)
def test_mixed_pairs_equal_the_naive_reference(pair_world, model, preservation, personalization):
    gated = gated_by(model, preservation, personalization, gate=0.35, strength=0.8)
    expected = tiny.ksample(tiny.naive_attach(model, list(runtime.links_of(gated)), TEXTS), P, N)
    assert tiny.relative_error(tiny.ksample(gated, P, N), expected) < TOLERANCE
    assert tiny.relative_error(expected, tiny.ksample(model, P, N)) > 1e-2, "the pair must change the picture"


@pytest.mark.parametrize("names", [(PLUS, PLAIN), (PLAIN, PLUS)])
def test_the_ends_of_the_gate_are_one_file_alone(pair_world, model, names):
    weight = 0.7
    for gate, name in zip((1.0, 0.0), names):
        alone = tiny.ksample(gated_by(model, name, gate=1.0, strength=weight), P, N)
        assert (
            tiny.relative_error(tiny.ksample(gated_by(model, *names, gate=gate, strength=weight), P, N), alone)
            < TOLERANCE
        )
    other = tiny.ksample(gated_by(model, *names, gate=0.5, strength=weight), P, N)
    assert tiny.relative_error(other, alone) > 1e-2


def before_to_out(gated, model) -> dict[str, torch.Tensor]:
    """What each cross-attention gave in the first UNet call, before its output projection."""
    caught: dict[str, torch.Tensor] = {}

    def catcher(address: str):
        def hook(module, inputs):
            caught.setdefault(address, inputs[0].clone())

        return hook

    hooks = [
        attention.to_out.register_forward_pre_hook(catcher(address))
        for address, attention in cross_attentions(model.model.diffusion_model).items()
    ]
    tiny.ksample(gated, P, N, steps=1)
    for hook in hooks:
        hook.remove()
    return caught


def test_between_the_ends_a_block_gives_the_stated_sum(pair_world, model):
    """base + strength * (gate * preservation + (1 - gate) * personalization); the first block has the same queries in every run."""
    first = next(iter(cross_attentions(model.model.diffusion_model)))
    base = before_to_out(model, model)[first]
    kept, followed = (before_to_out(gated_by(model, name, gate=1.0), model)[first] - base for name in (PLUS, PLAIN))
    for gate, strength in ((0.0, 1.0), (0.25, 0.5), (0.8, 1.3), (1.0, 0.4)):
        got = before_to_out(gated_by(model, PLUS, PLAIN, gate=gate, strength=strength), model)[first]
        torch.testing.assert_close(got, base + strength * (gate * kept + (1 - gate) * followed), atol=1e-5, rtol=1e-5)
    assert kept.abs().max() > 0.1 and followed.abs().max() > 0.1 and (kept - followed).abs().max() > 0.1


def test_the_gate_scales_one_file_alone(pair_world, model):
    got = tiny.ksample(gated_by(model, PLUS, gate=0.25, strength=1.2), P, N)
    assert tiny.relative_error(got, tiny.ksample(gated_by(model, PLUS, gate=1.0, strength=0.3), P, N)) < TOLERANCE
    assert torch.equal(tiny.ksample(gated_by(model, PLUS, gate=0.0), P, N), tiny.ksample(model, P, N))


def test_two_encoders_serve_two_files(pair_world):
    adapters = load(PLUS, "plain-B.bin")
    reference = encode(adapters, picture()).args[0]
    assert {name: value.shape[-1] for name, value in reference.features.items()} == {
        "preservation": 32,
        "personalization": 40,
    }
    assert (
        reference.encoders == "clip A from encoder A.safetensors, clip B from encoder B.safetensors"
        and len(adapters.towers) == 2
    )
    managed = {id(loaded.model.model) for loaded in mm.current_loaded_models if loaded.model is not None}
    assert {id(patcher.model) for patcher in adapters.towers.values()} <= managed
    for role, name in (("preservation", PLUS), ("personalization", "plain-B.bin")):
        alone = encode(load(name), picture()).args[0]
        assert torch.equal(alone.features["preservation"], reference.features[role])
        assert torch.equal(alone.null["preservation"], reference.null[role])
    assert not reference.null["personalization"].any() and reference.null["preservation"].any()


def test_a_chosen_encoder_file_serves_what_it_fits_and_the_rest_is_found(pair_world):
    write_encoder(pair_world, "z other A.safetensors", "A", seed=9)
    adapters = load(PLUS, "plain-B.bin", clip_vision="z other A.safetensors")
    assert (
        encode(adapters, picture()).args[0].encoders
        == "clip A from z other A.safetensors, clip B from encoder B.safetensors"
    )
    with pytest.raises(
        ValueError,
        match="LoadFlexIPAdapters: encoder B.safetensors is CLIP.*48 wide.*these adapters need CLIP.*32 wide",
    ):
        load(PLUS, clip_vision="encoder B.safetensors")


def test_one_encoder_serves_two_files_that_want_the_same(pair_world):
    adapters = load(PLUS, PLAIN)
    reference = encode(adapters, picture(batch=2)).args[0]
    assert reference.encoders == "clip A from encoder A.safetensors" and len(adapters.towers) == 1
    assert reference.features["preservation"].shape == (2, 17, 32) and reference.features["personalization"].shape == (
        2,
        24,
    )


@pytest.mark.parametrize(
    "names, nulls", [((PLUS, "auto"), 1), ((PLAIN, "auto"), 0), ((PLUS, PLAIN), 1), ((PLUS, PLUS), 1)]
)
def test_each_picture_passes_an_encoder_once_for_all_files_and_the_null_picture_once_per_encoder(
    pair_world, monkeypatch, names, nulls
):
    seen = []
    original = towers.ClipTower.features

    def features(self, pixels, kinds):
        seen.append((len(pixels), sorted(kinds)))
        return original(self, pixels, kinds)

    monkeypatch.setattr(towers.ClipTower, "features", features)
    adapters = load(*names)
    kinds = sorted({need.kind for need in adapters.network.needs()})
    first = encode(adapters, picture(batch=3)).args[0]
    assert seen == [(3, kinds)] + [(1, ["penultimate"])] * nulls
    again = encode(adapters, picture(batch=3)).args[0]
    assert seen[1 + nulls :] == [(3, kinds)], "the null picture's features are kept with the encoder"
    for one, other in zip((first.features, first.null), (again.features, again.null)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_features_are_cores_own(pair_world):
    core = core_encoder(CORE["A"], 1)  # as in "encoder A"
    reference = encode(load(PLUS, PLAIN), picture(3, 56, 56)).args[0]
    theirs = core.encode_image(picture(3, 56, 56))
    torch.testing.assert_close(
        reference.features["preservation"], theirs["penultimate_hidden_states"].float(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        reference.features["personalization"], theirs["image_embeds"].float(), atol=1e-4, rtol=1e-4
    )


def test_a_wired_clip_vision_serves_what_it_fits_and_files_the_rest(pair_world):
    wired = core_encoder(CORE["B"], 77)  # other weights than the file's
    adapters = load(PLUS, "plain-B.bin")
    from_files, mixed = encode(adapters, picture()).args[0], encode(adapters, picture(), clip=wired).args[0]
    assert torch.equal(mixed.features["preservation"], from_files.features["preservation"])
    theirs = wired.encode_image(picture())["image_embeds"].float()
    torch.testing.assert_close(mixed.features["personalization"], theirs, atol=1e-4, rtol=1e-4)
    assert (mixed.features["personalization"] - from_files.features["personalization"]).abs().max() > 0.1
    assert mixed.encoders == "clip A from encoder A.safetensors, clip B from the clip_vision socket"


def test_a_wired_clip_vision_is_enough_without_files(world):
    write_adapter(world, PLUS, "plus")
    wired = core_encoder(CORE["A"], 5)
    assert encode(load(PLUS), picture(), clip=wired).args[0].features["preservation"].shape == (1, 17, 32)
    with pytest.raises(
        ValueError, match="EncodeReference: .*clip_vision socket is CLIP.*48 wide.*these adapters need CLIP.*32 wide"
    ):
        encode(load(PLUS), picture(), clip=core_encoder(CORE["B"], 5))


def test_without_a_fitting_encoder_the_message_says_which_one_and_what_was_looked_at(world):
    write_adapter(world, PLUS, "plus")
    write_encoder(world, "b.safetensors", "B")
    save_file({"x": torch.zeros(2)}, world / files.ENCODER_FOLDER / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"EncodeReference: these adapters want CLIP .*\(32 wide.*embedding 24\).*a\.safetensors is no image encoder.*b\.safetensors is CLIP.*48 wide",
    ):
        encode(load(PLUS), picture())


def test_files_of_both_folders_are_offered(world):
    write_adapter(world, "one.safetensors", "plus")
    write_adapter(world, "deep/two.bin", "plain")
    write_adapter(world, "three.safetensors", "plain", folder="flexip")
    inputs = {item.id: item for item in LoadFlexIPAdapters.define_schema().inputs}
    expected = {"one.safetensors", os.path.join("deep", "two.bin"), "three.safetensors"}
    preservation, personalization = inputs["preservation"].options, inputs["personalization"].options
    assert set(preservation[:-1]) == expected == set(personalization[1:])
    assert preservation[-1] == personalization[0] == "auto", "appended where saved workflows know a list without it"
    assert load("three.safetensors").network.kinds == ("IP-Adapter plain for tiny",)


def test_random_names_and_nesting_change_nothing(pair_world, model):
    expected = tiny.ksample(gated_by(model, PLUS, "plain-B.bin"), P, N)
    names, rng = {}, random.Random(4)
    paths = [path for folder in ("ipadapter", files.ENCODER_FOLDER) for path in sorted((pair_world / folder).iterdir())]
    stems = [f"{rng.choice(('ip-adapter_sdxl', 'clip', 'dino', 'x'))} {rng.random()}" for _ in paths]
    for path, stem in zip(paths, stems):
        target = path.parent.joinpath(*(f"d{rng.randrange(3)}" for _ in range(rng.randrange(3))), stem + path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        names[path.name] = str(target.relative_to(path.parent))
    folder_paths.filename_list_cache.clear()
    assert torch.equal(tiny.ksample(gated_by(model, names[PLUS], names["plain-B.bin"]), P, N), expected)


def test_titles_and_the_report_name_family_and_file(pair_world, model):
    adapters = load(PLUS, "plain-B.bin")
    assert adapters.title == "plus-A.safetensors (IP-Adapter plus for tiny) + plain-B.bin (IP-Adapter plain for tiny)"
    gated, reports = apply(model, adapters, encode(adapters, picture(batch=2)).args[0], 0.5), []
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    tiny.ksample(gated, P, N)
    assert adapters.title in reports[0] and "tokens 10 + 8" in reports[0]
    assert load(PLUS).title == "plus-A.safetensors (IP-Adapter plus for tiny)"


def test_the_wrong_base_is_refused_by_naming_both(pair_world, model):
    write_adapter(pair_world, "wide.safetensors", "plus", base="other")
    adapters = load("wide.safetensors")
    with pytest.raises(
        ValueError,
        match=r"ApplyFlexIPGate: wide.safetensors \(IP-Adapter plus for other\) was made for other .*but the checkpoint \(\w+\)",
    ):
        apply(model, adapters, encode(adapters, picture()).args[0], 0.5)
    with pytest.raises(
        ValueError,
        match="LoadFlexIPAdapters: plus-A.safetensors is an IP-Adapter plus for tiny but wide.safetensors is an IP-Adapter plus for other",
    ):
        load(PLUS, "wide.safetensors")


def test_a_reference_for_another_pair_is_refused(pair_world, model):
    adapters, other = load(PLUS, PLAIN), load(PLAIN, PLUS)
    with pytest.raises(
        ValueError,
        match=r"ApplyFlexIPGate: .*Needed: preservation from clip A 56 px \(32 wide\), personalization .*\(24 wide\); given: preservation .*\(24 wide\)",
    ):
        apply(model, adapters, encode(other, picture()).args[0], 0.5)


def test_a_flexip_file_as_second_file_is_a_sentence(pair_world):
    mini.make_mini_flexip(pair_world / "flexip" / "native.safetensors")
    with pytest.raises(
        ValueError,
        match="LoadFlexIPAdapters: native.safetensors is a FlexIP file and holds both adapters; choose it as preservation",
    ):
        load(PLUS, "native.safetensors")


def test_a_second_run_reads_no_adapter_again(pair_world, model):
    adapters, reports = load(PLUS, PLAIN), []
    reference = encode(adapters, picture()).args[0]
    for positive in (P, tiny.cond(5)):
        gated = apply(model, adapters, reference, 0.5)
        gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
            runtime.notices.full_text(told)
        )
        tiny.ksample(gated, positive, N)
    assert "K/V: 4 projected" in reports[0]
    assert "K/V: 0 projected, 4 reused" in reports[1], "what an IP-Adapter gives does not depend on the prompt"


# --- one property over all of it ---

DTYPES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SDXL_SIZES = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[0, 2],
    transformer_depth_middle=2,
    transformer_depth_output=[0, 0, 2, 1],
    context_dim=TEXT,
    use_linear_in_transformer=True,
    use_spatial_transformer=True,
    legacy=False,
    adm_in_channels=2816,
    num_classes="sequential",
    use_temporal_attention=False,
    num_heads=-1,
    num_head_channels=16,
)


def base_model(base: str, dtype: torch.dtype):
    if base == "SD1.5":
        return tiny.tiny_model(dtype)
    config = comfy.supported_models.SDXL({**SDXL_SIZES, "dtype": dtype})
    config.unet_config.update(SDXL_SIZES)
    config.set_inference_dtype(dtype, None)
    made = config.get_model({}, "", device=tiny.CPU)
    g = tiny.generator(0)
    with torch.no_grad():
        for name, p in made.diffusion_model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5 / p[0].numel() ** 0.5) if p.dim() > 1 else p.fill_(
                float(name.endswith("weight"))
            )
    return comfy.model_patcher.ModelPatcher(made, load_device=tiny.CPU, offload_device=tiny.CPU)


_models: dict[tuple, tuple] = {}


def models_of(base: str, dtype: torch.dtype) -> tuple:
    """The model in `dtype`, and in float32 with the very same (rounded) weights."""
    if (base, dtype) not in _models:
        low, exact = base_model(base, dtype), base_model(base, torch.float32)
        exact.model.load_state_dict(low.model.state_dict())
        _models[base, dtype] = low, exact
    return _models[base, dtype]


def random_adapter(family: str, clip: str, model, seed: int) -> SingleAdapter:
    known = next(f for f in ip_adapter.FAMILIES if f.name == family)
    blocks = file_blocks(model)
    file = IPAdapterFile(known, "tiny", TEXT, blocks, CLIPS[clip], ENCODED_WIDTH[family][clip])
    return (
        SingleAdapter(file, tensors_of(family, clip, blocks, seed), comfy.ops.manual_cast).eval().requires_grad_(False)
    )


def random_reference(pair: IPAdapterPair, seed: int) -> Reference:
    g = tiny.generator(seed)
    shapes = {need.name: (2, need.width) if need.kind == "embedding" else (2, 17, need.width) for need in pair.needs()}
    features = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return Reference(
        features,
        {
            need.name: torch.zeros(shapes[need.name])
            if need.null == "zeros"
            else torch.randn(shapes[need.name], generator=g)
            for need in pair.needs()
        },
        "random",
    )


@settings(max_examples=24)  # each samples with a pair and the naive reference
@given(
    base=st.sampled_from(["SD1.5", "SDXL"]),
    first=st.sampled_from(sorted(MAKE)),
    second=st.sampled_from(sorted(MAKE)),
    dtype=st.sampled_from(list(DTYPES)),
    batch=st.integers(1, 3),
    cfg=st.sampled_from([1.0, 5.0]),
    gate=st.floats(0, 1),
    strength=st.floats(0.1, 1.5),
    seed=st.integers(0, 1000),
)
def test_any_pair_on_any_base_in_any_precision_equals_the_naive_reference(
    base, first, second, dtype, batch, cfg, gate, strength, seed
):
    low, exact = models_of(base, dtype)
    pair = IPAdapterPair(random_adapter(*first, low, seed), random_adapter(*second, low, seed + 1))
    link = tiny.link_for(pair, random_reference(pair, seed), gate, strength=strength)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=tiny.generator(seed))}
    positive, negative = ([[tensor, pooled]] for ((tensor, _),) in (P, N))
    seen = set()
    hooks = [
        attention.to_out.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
        for attention in cross_attentions(low.model.diffusion_model).values()
    ]
    noise = tiny.noise_for(batch)
    got = tiny.ksample(runtime.attach(low, link), positive, negative, steps=1, cfg=cfg, noise=noise)
    for hook in hooks:
        hook.remove()
    expected = tiny.ksample(tiny.naive_attach(exact, [link], TEXTS), positive, negative, steps=1, cfg=cfg, noise=noise)
    assert seen == {dtype}, "attention must run in the model's own precision"
    assert got.shape == noise.shape and got.isfinite().all()
    assert tiny.relative_error(got, expected) < DTYPES[dtype]
