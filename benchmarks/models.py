"""Full-size UNets with random weights in a real ComfyUI, and FlexIP on them. Import after ComfyUI is on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch

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
    device = mm.get_torch_device()
    generator = torch.Generator(device).manual_seed(0)
    model = config.get_model({}, "", device=device)
    with torch.no_grad():
        for name, p in model.diffusion_model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.5 / p[0].numel() ** 0.5, generator=generator)
            else:
                p.fill_(float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=mm.unet_offload_device())


class Bench:
    """One base, the same noise and prompts for whatever is measured on it."""

    def __init__(self, base: str, dtype: torch.dtype, size: int | None = None, channels: int = 320):
        self.base, self.dtype = base, dtype
        self.model = unet_model(base, dtype, channels)
        self.widths, self.text_width = block_widths(self.model.model.diffusion_model)
        self.latent = (size or BASES[base][2]) // 8
        self.reference = self._reference()

    def _reference(self) -> Reference:
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
        network = FlexIPNetwork(cfg, comfy.ops.manual_cast)
        network.load_state_dict(FlexIPNetwork(cfg).state_dict())  # comfy.ops leaves new weights uninitialised
        network = network.requires_grad_(False).to(self.dtype)
        return network, comfy.model_patcher.ModelPatcher(
            network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
        )

    def gated(self, mode: str, gates: tuple[float, ...] = (0.6,), loaded: tuple | None = None, **settings: Any) -> Any:
        network, patcher = loaded or self.network(mode)
        return runtime.attach(self.model, Link(network, patcher, self.reference, gates, title=mode, **settings))

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
