"""ComfyUI's own nodes that change a model, each before and after FlexIP.

users.md rows 3 (attention-patch conflicts), 13 and 16 (accelerators). What is expected of each node stands in the lists below; the
last tests hold the lists against the nodes of the ComfyUI that is under test, so that a new one is noticed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy_extras.nodes_post_processing  # noqa: F401 - nodes_latent, which it imports, cannot be imported first
import comfyui_version
import folder_paths
import pytest
import safetensors.torch
import tiny
import torch
from conftest import TREE
from core_nodes import nodes_that_touch_a_model
from flexip_pack.nodes import runtime

P, N = tiny.cond(1), tiny.cond(2)
ROLES = [(P[0][0], False), (N[0][0], True)]
TOLERANCE = 1e-5
NEWEST = (0, 30)


def node(module: str, name: str) -> Any:
    """A node's class by its file and its class name."""
    return getattr(importlib.import_module(f"comfy_extras.{module}" if module != "nodes" else "nodes"), name)


def call(module: str, name: str, function: str = "execute", **inputs: Any) -> Callable[[Any], Any]:
    """Model -> model by that node."""

    def put(model: Any) -> Any:
        cls = node(module, name)
        result = getattr(cls if function == "execute" else cls(), function)(model, **inputs)
        return (result.args if hasattr(result, "args") else result)[0]

    return put


class Row(NamedTuple):
    """A node of which the picture is theirs + ours in both orders. `module` is its file."""

    node: str
    module: str
    put: Callable[[Any], Any]
    size: int = 8  # of the latent
    steps: int = 1
    mask: bool = False


def row(id: str, module: str, name: str | None = None, function: str = "execute", **inputs: Any) -> Row:
    options = {key: inputs.pop(key) for key in Row._fields if key in inputs}
    return Row(id, module, call(module, name or id, function, **inputs), **options)


def patch(id: str, module: str, **inputs: Any) -> Row:
    return row(id, module, function="patch", **inputs)


ATTENTION = [
    row("PerturbedAttentionGuidance", "nodes_pag", scale=3.0),
    row("SelfAttentionGuidance", "nodes_sag", scale=0.5, blur_sigma=2.0, size=16),
    row("NAGuidance", "nodes_nag", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    row("HyperTile", "nodes_hypertile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False, size=16),
    row("TomePatchModel", "nodes_tomesd", ratio=0.5),
    row("FreeU", "nodes_freelunch", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    row("FreeU_V2", "nodes_freelunch", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    row("UNetSelfAttentionMultiply", "nodes_attention_multiply", q=1.2, k=1.3, v=0.7, out=0.9),
    row("UNetCrossAttentionMultiply", "nodes_attention_multiply", q=1.2, k=1.3, v=0.7, out=0.9),
    row(
        "PatchModelAddDownscale",
        "nodes_model_downscale",
        block_number=2,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
        size=16,
    ),
]
STEPS = [
    row(
        "EasyCache",
        "nodes_easycache",
        "EasyCacheNode",
        reuse_threshold=9.0,
        start_percent=0.0,
        end_percent=1.0,
        verbose=False,
        steps=6,
    ),
    row(
        "LazyCache",
        "nodes_easycache",
        "LazyCacheNode",
        reuse_threshold=9.0,
        start_percent=0.0,
        end_percent=1.0,
        verbose=False,
        steps=6,
    ),
]
GUIDANCE = [
    patch("RescaleCFG", "nodes_model_advanced", multiplier=0.7),
    row("APG", "nodes_apg", eta=0.5, norm_threshold=2.0, momentum=0.3, steps=2),
    row("TCFG", "nodes_tcfg"),
    row("Mahiro", "nodes_mahiro"),
    row("CFGZeroStar", "nodes_cfg"),
    row("CFGNorm", "nodes_cfg", strength=0.9),
    row("FreSca", "nodes_fresca", scale_low=1.0, scale_high=1.5, freq_cutoff=2),
    row("RenormCFG", "nodes_lumina2", cfg_trunc=100.0, renorm_cfg=0.5),
    row("CFGOverride", "nodes_custom_sampler", cfg=3.0, start_percent=0.0, end_percent=0.7),
    row("Epsilon Scaling", "nodes_eps", "EpsilonScaling", scaling_factor=1.1),
    row("TemporalScoreRescaling", "nodes_eps", tsr_k=0.9, tsr_sigma=1.0),
    patch("VideoLinearCFGGuidance", "nodes_video_model", min_cfg=1.5),
    patch("VideoTriangleCFGGuidance", "nodes_video_model", min_cfg=1.5),
    row("DifferentialDiffusion", "nodes_differential_diffusion", mask=True),
    row("LatentApplyOperationCFG", "nodes_latent", operation=lambda latent, **_: latent * 1.1),
]
SAMPLING = [
    patch("ModelSamplingDiscrete", "nodes_model_advanced", sampling="lcm", zsnr=False, steps=3),
    patch("ModelSamplingContinuousEDM", "nodes_model_advanced", sampling="eps", sigma_max=20.0, sigma_min=0.01),
    patch("ModelSamplingContinuousV", "nodes_model_advanced", sampling="v_prediction", sigma_max=20.0, sigma_min=0.01),
]
WEIGHTS = [
    Row("ModelMergeSimple", "nodes_model_merging", lambda m: merged("ModelMergeSimple", m, ratio=0.4)),
    Row("ModelMergeAdd", "nodes_model_merging", lambda m: merged("ModelAdd", m)),
    Row("ModelMergeSubtract", "nodes_model_merging", lambda m: merged("ModelAdd", m, other=difference())),
    Row(
        "ModelMergeBlocks",
        "nodes_model_merging",
        lambda m: merged("ModelMergeBlocks", m, input=0.2, middle=0.5, out=0.9),
    ),
    row(
        "LoraLoaderModelOnly",
        "nodes",
        function="load_lora_model_only",
        lora_name="tiny.safetensors",
        strength_model=1.0,
    ),
    Row(
        "LoraLoader",
        "nodes",
        call(
            "nodes",
            "LoraLoader",
            "load_lora",
            clip=None,
            lora_name="tiny.safetensors",
            strength_model=0.7,
            strength_clip=0,
        ),
    ),
    row(
        "LoraLoaderBypassModelOnly",
        "nodes_lora_debug",
        function="load_lora_model_only",
        lora_name="tiny.safetensors",
        strength_model=1.0,
    ),
    Row(
        "LoraModelLoader",
        "nodes_train",
        lambda m: call("nodes_train", "LoraModelLoader", lora=lora(), strength_model=1.0)(m),
    ),
]
ROWS = [*ATTENTION, *STEPS, *GUIDANCE, *SAMPLING, *WEIGHTS]

ELSEWHERE = {
    "HypernetworkLoader": "test_neighbours_core.py::test_hypernetwork_changes_the_text_attention_and_not_ours",
    "MultiGPU_WorkUnits": "test_neighbours_threads.py::test_multigpu_cfg_split_gives_the_same_picture_from_two_threads",
    "SelectModelDevice": "test_neighbours_threads.py::test_a_model_put_on_a_device_by_hand",
    "ModelComputeDtype": "test_numerics.py::test_the_dtype_that_a_later_node_computes_in_is_followed",
    "TorchCompileModel": "test_compile.py::test_compiled_picture_is_right_after_every_change_and_only_new_structures_compile",
    "PerpNeg": "test_guiders.py::test_old_perp_neg_node_whose_own_conditioning_has_no_tag",
    "ContextWindowsManual": "test_guiders.py::test_context_windows_over_the_batch",
    # the same code as a node that has a row
    "LoraLoaderBypass": "test_neighbours_core.py::test_theirs_and_ours_in_both_orders",
    "ModelMergeSD1": "test_neighbours_core.py::test_theirs_and_ours_in_both_orders",
    "ModelMergeSD2": "test_neighbours_core.py::test_theirs_and_ours_in_both_orders",
    "ModelMergeSDXL": "test_neighbours_core.py::test_theirs_and_ours_in_both_orders",
}
OTHER_MODELS = (
    "for a family of models that has no text cross-attentions like SD1.5's and SDXL's; Apply FlexIP refuses those"
)
FLOW = "sampling of flow models, which SD1.5 and SDXL are not"
CLIP = "changes a CLIP: FlexIP reads the prompts that come out, whatever made them"
NOT_APPLICABLE = {
    "UNetTemporalAttentionMultiply": "temporal layers of video models; SD1.5 and SDXL have none",
    "SkipLayerGuidanceDiT": OTHER_MODELS,
    "SkipLayerGuidanceDiTSimple": OTHER_MODELS,
    "ChromaRadianceOptions": OTHER_MODELS,
    "FluxKVCache": OTHER_MODELS,
    "HiDreamO1PatchSeamSmoothing": OTHER_MODELS,
    "LTXVReferenceAudio": OTHER_MODELS,
    "MiniMaxH3SigmaShift": OTHER_MODELS,
    "AnimaLLLiteApply": OTHER_MODELS,
    "QwenImageDiffsynthControlnet": OTHER_MODELS,
    "ZImageFunControlnet": OTHER_MODELS,
    "WanUni3CControlnetApply": OTHER_MODELS,
    "USOStyleReference": OTHER_MODELS,
    "ScaleROPE": OTHER_MODELS,
    "TripoSplatSamplingPreview": OTHER_MODELS,
    "WanInfiniteTalkToVideo": OTHER_MODELS,
    "SDPoseKeypointExtractor": "runs its own model on its own options",
    "SUPIRApply": "weights for one SDXL checkpoint of its own; patches no attention",
    "ModelSamplingLTXV": FLOW,
    "ModelSamplingSD3": FLOW,
    "ModelSamplingAuraFlow": FLOW,
    "ModelSamplingFlux": FLOW,
    "ModelNoiseScale": FLOW,
    "ModelSamplingStableCascade": OTHER_MODELS,
    "SamplerEulerCFGpp": "a sampler: it sees the model's results only",
    "TrainLoraNode": "trains; FlexIP on its model is not sampled",
    "CLIPAttentionMultiply": CLIP,
    "CLIPMergeSimple": CLIP,
    "CLIPMergeSubtract": CLIP,
    "CLIPMergeAdd": CLIP,
    "ModelMergeFlux1": OTHER_MODELS,
    "ModelMergeAuraflow": OTHER_MODELS,
    "ModelMergeCosmos7B": OTHER_MODELS,
    "ModelMergeCosmos14B": OTHER_MODELS,
    "ModelMergeCosmosPredict2_2B": OTHER_MODELS,
    "ModelMergeCosmosPredict2_14B": OTHER_MODELS,
    "ModelMergeKrea2": OTHER_MODELS,
    "ModelMergeLTXV": OTHER_MODELS,
    "ModelMergeMochiPreview": OTHER_MODELS,
    "ModelMergeQwenImage": OTHER_MODELS,
    "ModelMergeSD3_2B": OTHER_MODELS,
    "ModelMergeSD35_Large": OTHER_MODELS,
    "ModelMergeWAN2_1": OTHER_MODELS,
}


@functools.cache
def second() -> Any:
    return tiny.tiny_model(seed=1)


def merged(name: str, model: Any, other: Any = None, **ratios: float) -> Any:
    return node("nodes_model_merging", name)().merge(model, other or second(), **ratios)[0]


@functools.cache
def difference() -> Any:
    """As in "add difference": of two models, to be added to a third."""
    return merged("ModelSubtract", second(), other=tiny.tiny_model(seed=2), multiplier=0.3)


@functools.cache
def lora() -> dict[str, torch.Tensor]:
    """For the self- and the cross-attention of one block."""
    g, base = tiny.generator(7), "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    shapes = {"attn1_to_q": 32, "attn2_to_q": 32, "attn2_to_k": tiny.TEXT_WIDTH, "attn2_to_v": tiny.TEXT_WIDTH}
    out = {}
    for name, width in shapes.items():
        out[f"{base}_{name}.lora_up.weight"] = torch.randn(32, 2, generator=g) * 0.3
        out[f"{base}_{name}.lora_down.weight"] = torch.randn(2, width, generator=g) * 0.3
    return out


FOUND = nodes_that_touch_a_model(Path(TREE))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def link(model: Any) -> Any:
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


@pytest.fixture(scope="module", autouse=True)
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("loras")
    safetensors.torch.save_file(lora(), folder / "tiny.safetensors")
    paths, extensions = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([str(folder)], extensions)
    yield
    folder_paths.folder_names_and_paths["loras"] = (paths, extensions)


def sample(model: Any, row: Row | None = None) -> torch.Tensor:
    torch.manual_seed(0)  # HyperTile and ToMe draw from torch's own generator
    size, steps = (row.size, row.steps) if row else (8, 1)
    mask = torch.linspace(0, 1, size * size).view(1, 1, size, size) if row and row.mask else None
    return tiny.ksample(model, P, N, steps=steps, noise=tiny.noise_for(1, size, size), mask=mask)


@functools.cache
def without(model: Any, link: Any, size: int, steps: int, mask: bool) -> torch.Tensor:
    """FlexIP alone."""
    return sample(runtime.attach(model, link), Row("", "", lambda m: m, size, steps, mask))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.node) for row in ROWS if row.node in FOUND])
def test_theirs_and_ours_in_both_orders(model, link, row):
    """The expected picture comes from a UNet with their node in which every block recomputes ours from the bare parts."""
    expected = sample(row.put(tiny.naive_attach(model, [link], ROLES)), row)
    assert torch.isfinite(expected).all()
    assert tiny.relative_error(sample(runtime.attach(row.put(model), link), row), expected) < TOLERANCE
    assert tiny.relative_error(sample(row.put(runtime.attach(model, link)), row), expected) < TOLERANCE
    assert tiny.relative_error(expected, sample(row.put(model), row)) > 1e-3, "FlexIP must act"
    assert tiny.relative_error(expected, without(model, link, *row[3:6])) > 1e-4, "and so must they"


def test_merging_into_a_bare_model_leaves_the_gates_of_the_other_one_behind(model, link):
    """The patches and wrappers of a merge are the first model's; core takes only weights of the second."""
    merge = call("nodes_model_merging", "ModelMergeSimple", "merge", model2=runtime.attach(model, link), ratio=0.4)
    bare = call("nodes_model_merging", "ModelMergeSimple", "merge", model2=model, ratio=0.4)
    assert torch.equal(sample(merge(second())), sample(bare(second())))


class NaiveAfter(tiny.NaiveBlock):
    """For nodes that change the text on its way into the block: a row is told by its changed keys."""

    change = staticmethod(lambda text: text)

    def match(self, key, row):
        for text, null in self.texts:
            if torch.allclose(self.attn2.to_k(self.change(text[0])), key, atol=1e-4):
                return text[0], null
        raise AssertionError("a row carries a text that the test did not declare")


def test_hypernetwork_changes_the_text_attention_and_not_ours(model, link, tmp_path, monkeypatch):
    """Its patch sits before the replace slot and changes keys and values; ours come from the prompt as it was encoded."""
    g = tiny.generator(3)
    pair = lambda: {
        "linear.0.weight": torch.randn(64, 64, generator=g) * 0.1,
        "linear.0.bias": torch.randn(64, generator=g) * 0.1,
    }
    of_keys, of_values = pair(), pair()
    torch.save({tiny.TEXT_WIDTH: [of_keys, of_values]}, tmp_path / "tiny.pt")
    module = importlib.import_module("comfy_extras.nodes_hypernetwork")
    monkeypatch.setattr(module.folder_paths, "get_full_path_or_raise", lambda *args: str(tmp_path / "tiny.pt"))
    put = call("nodes_hypernetwork", "HypernetworkLoader", hypernetwork_name="tiny.pt", strength=1.0)
    change = staticmethod(lambda text: text + text @ of_keys["linear.0.weight"].T + of_keys["linear.0.bias"])
    monkeypatch.setattr(NaiveAfter, "change", change)
    monkeypatch.setattr(tiny, "NaiveBlock", NaiveAfter)
    expected = sample(put(tiny.naive_attach(model, [link], ROLES)))
    assert tiny.relative_error(sample(runtime.attach(put(model), link)), expected) < TOLERANCE
    assert tiny.relative_error(sample(put(runtime.attach(model, link))), expected) < TOLERANCE
    assert tiny.relative_error(expected, without(model, link, 8, 1, False)) > 1e-4


def test_every_core_node_that_touches_a_model_is_in_a_list():
    listed = {row.node for row in ROWS} | set(ELSEWHERE) | set(NOT_APPLICABLE)
    assert FOUND - listed == set(), "new in ComfyUI: add a row, or say why it has none"


def test_the_lists_name_no_node_that_the_newest_core_lacks():
    listed = [*(row.node for row in ROWS), *ELSEWHERE, *NOT_APPLICABLE]
    assert len(listed) == len(set(listed))
    if tuple(map(int, comfyui_version.__version__.split(".")[:2])) >= NEWEST:
        assert set(listed) - FOUND == set()


def test_what_is_tested_elsewhere_is():
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"def {name}(" in Path(__file__).with_name(file).read_text(encoding="utf-8"), place
