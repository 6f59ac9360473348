"""Full-size UNets with random weights in a real ComfyUI, and FlexIP on them. Import after ComfyUI is on the path."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from started import dynamic_vram

REPO = Path(__file__).resolve().parents[1]
if "flexip_pack" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "flexip_pack", REPO / "__init__.py", submodule_search_locations=[str(REPO)]
    )
    sys.modules["flexip_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["flexip_pack"])
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.flexip_core.network.config import FlexIPConfig, ResamplerConfig
from flexip_pack.flexip_core.run.chain import Link
from flexip_pack.flexip_core.run.reference import Reference
from flexip_pack.nodes import runtime

COMMON = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    use_spatial_transformer=True,
    legacy=False,
    use_temporal_attention=False,
)
SD15 = dict(
    COMMON,
    num_res_blocks=[2] * 4,
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_middle=1,
    transformer_depth_output=[1] * 9 + [0] * 3,
    context_dim=768,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
SDXL = dict(
    COMMON,
    num_res_blocks=[2] * 3,
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_middle=10,
    transformer_depth_output=[0] * 3 + [2] * 3 + [10] * 3,
    context_dim=2048,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
    num_classes="sequential",
)
BASES = {"sd15": (comfy.supported_models.SD15, SD15, 512), "sdxl": (comfy.supported_models.SDXL, SDXL, 1024)}


def unet_model(base: str, dtype: torch.dtype, channels: int = 320) -> comfy.model_patcher.ModelPatcher:
    """The base's UNet with random weights; `channels` below 320 keeps its blocks and makes it small."""
    kind, config, _ = BASES[base]
    config = kind({**config, "model_channels": channels, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    with whole_layers():
        shapes = {k: v.shape for k, v in config.get_model({}, "", "meta").diffusion_model.state_dict().items()}
    generator = torch.Generator(mm.get_torch_device()).manual_seed(0)
    model = config.get_model({}, "", device=resting_place())
    model.diffusion_model.load_state_dict(random_weights(shapes, dtype, generator), strict=True, assign=True)
    return managed(model)


def random_weights(
    shapes: Mapping[str, torch.Size], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Made on the generator's device; norms are one, biases zero."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=dtype, device=generator.device)
        if len(shape) > 1:
            tensor.normal_(0, 0.5 / shape[1:].numel() ** 0.5, generator=generator)
        else:
            tensor.fill_(float(name.endswith("weight")))
        tensors[name] = tensor.to(resting_place())
    return tensors


def managed(module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """As ComfyUI's loaders wrap a model: by the patcher that the start chose."""
    return comfy.model_patcher.CoreModelPatcher(
        module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


def resting_place() -> torch.device:
    """Where weights are made to lie. Dynamic VRAM brings them to the card itself; without it they are made there."""
    return mm.unet_offload_device() if dynamic_vram() else mm.get_torch_device()


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Layers that have weights before these are loaded, which under dynamic VRAM they have not: to learn their shapes."""
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False, create=True):
        yield


class Bench:
    """One base, the same noise and prompts for whatever is measured on it."""

    def __init__(self, base: str, dtype: torch.dtype, size: int | None = None, channels: int = 320):
        self.base, self.dtype, self.channels = base, dtype, channels
        self.model = unet_model(base, dtype, channels)
        self.widths, self.text_width = block_widths(self.model.model.diffusion_model)
        self.latent = (size or BASES[base][2]) // 8
        self.reference = self.new_reference()
        self._loaded: dict[str, tuple[FlexIPNetwork, comfy.model_patcher.ModelPatcher]] = {}

    @staticmethod
    def new_reference() -> Reference:
        """The same picture each time; K and V that were made of one reference are not known to another."""
        generator = torch.Generator().manual_seed(7)
        features = {
            "cls": torch.randn(1, 1024, generator=generator),
            "patches": torch.randn(1, 256, 1024, generator=generator),
        }
        return Reference(features, {name: torch.zeros_like(value) for name, value in features.items()}, "random")

    def network(self, mode: str) -> tuple[FlexIPNetwork, comfy.model_patcher.ModelPatcher]:
        """Both adapters: 20 preservation tokens and 77 of the prompt."""
        torch.manual_seed(3)
        cfg = FlexIPConfig(
            base=self.base,
            text_width=self.text_width,
            blocks=self.widths,
            gate_mode=mode,
            resampler=ResamplerConfig(depth=1),
        )
        with mm.get_torch_device():
            weights = FlexIPNetwork(cfg).state_dict()
        with torch.device("meta"):
            network = FlexIPNetwork(cfg, comfy.ops.manual_cast)
        weights = {name: value.to(resting_place(), self.dtype) for name, value in weights.items()}
        network.load_state_dict(weights, strict=True, assign=True)
        network = network.eval().requires_grad_(False)
        return network, managed(network)

    def loaded(self, mode: str) -> tuple[FlexIPNetwork, comfy.model_patcher.ModelPatcher]:
        """`network`, made once."""
        if mode not in self._loaded:
            self._loaded[mode] = self.network(mode)
        return self._loaded[mode]

    def gated(
        self,
        mode: str,
        gates: Any = (0.6,),
        loaded: tuple | None = None,
        reference: Reference | None = None,
        **settings: Any,
    ) -> Any:
        network, patcher = loaded or self.loaded(mode)
        link = Link(network, patcher, reference or self.reference, gates, title=mode, **settings)
        return runtime.attach(self.model, link)

    def conditioning(self, seed: int, tokens: int = 77) -> list:
        generator = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, 1280, generator=generator)} if self.base == "sdxl" else {}
        return [[torch.randn(1, tokens, self.text_width, generator=generator), extra]]

    def sample(self, model: Any, steps: int, batch: int = 1, callback: Any = None, positive: int = 1) -> torch.Tensor:
        noise = torch.randn(1, 4, self.latent, self.latent, generator=torch.Generator().manual_seed(1)).repeat(
            batch, 1, 1, 1
        )
        return comfy.sample.sample(
            model,
            noise,
            steps,
            7.0,
            "euler",
            "normal",
            self.conditioning(positive),
            self.conditioning(2),
            torch.zeros_like(noise),
            denoise=1.0,
            disable_pbar=True,
            seed=0,
            callback=callback,
        )
