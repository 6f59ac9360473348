"""FlexIPDemoModels: the mini world, which ships trained with the pack, for the stock nodes and ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.v0_0_2 import io

from ..flexip_core.files.checkpoint import load_checkpoint
from ..flexip_core.mini_world import files, world
from ..flexip_core.mini_world.architecture import (
    COMFYUI_UNET,
    HEADS,
    LATENT_CHANNELS,
    to_latents,
    to_pictures,
)
from ..flexip_core.mini_world.encoders import ENLARGED, enlarge, shrink
from ..flexip_core.mini_world.text import TextEncoder
from .load import LoadedAdapters
from .types import START_MENU, FlexIPAdapters

NODE = "FlexIPDemoModels"
WEIGHTS = files.WEIGHTS  # tests put another folder here


class FlexIPDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Demo Models",
            category=START_MENU,
            description="A small trained world that comes with the pack: nothing to download, and a picture takes seconds on a CPU. Shows what the gate does. Use latents of 64 x 64 px; it knows only discs, squares, triangles and crosses on six grounds.",
            search_aliases=["demo", "mini world", "example models", "tiny model"],
            is_experimental=True,
            inputs=[
                io.Int.Input(
                    "subject",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Which subject the reference shows: a shape in two colours. None of them was seen in training.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The base, for Apply FlexIP Gate."),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="For CLIP Text Encode. It reads words such as: a red disc on sand, top left. Unknown words are ignored.",
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="For VAE Decode and FlexIP Sampler."),
                FlexIPAdapters.Output(
                    "adapters", display_name="adapters", tooltip="For Encode Reference and Apply FlexIP Gate."
                ),
                io.Image.Output(
                    "reference", display_name="reference", tooltip="A picture of the subject, for Encode Reference."
                ),
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    tooltip="The subject in words, without its colours, in another place than in the reference.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, subject: int) -> list:
        return [os.stat(_file(name)).st_mtime_ns for name in (files.BASE, files.ADAPTERS)]

    @classmethod
    def execute(cls, subject: int) -> io.NodeOutput:
        tensors, text = files.read_base(_file(files.BASE))
        scene = world.test_set(1, subject)
        return io.NodeOutput(
            load_model(tensors),
            load_text_encoder(text),
            DemoVAE(),
            load_adapters(),
            enlarge(scene.reference),
            world.in_words(scene.prompts("conflict")[0]),
        )


def _file(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_file():
        raise ValueError(
            f"{NODE}: {name} is missing in {WEIGHTS}. Install the pack again, or make it with scripts/mini_world.py."
        )
    return path


class DemoLatents(comfy.latent_formats.LatentFormat):
    latent_channels = LATENT_CHANNELS

    def __init__(self) -> None:
        # a latent is made of four pixels of each colour; their mean is the preview
        self.latent_rgb_factors = torch.eye(3).repeat_interleave(4, 0).mul(0.25).tolist()


class DemoModelConfig(comfy.supported_models.SD15):
    unet_config = COMFYUI_UNET
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}
    latent_format = DemoLatents
    supported_inference_dtypes = [torch.float32]

    def inpaint_model(self) -> bool:
        return False  # twelve channels are all latent, not latent and mask


def load_model(tensors: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """The UNet's tensors under diffusers' names -> ComfyUI's MODEL."""
    config = DemoModelConfig(COMFYUI_UNET)
    config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model = config.get_model({}, "", device=mm.unet_offload_device())
    patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )
    renamed = {names[key]: value for key, value in tensors.items()}
    model.diffusion_model.load_state_dict(renamed, assign=patcher.is_dynamic())
    return patcher


def load_text_encoder(text: TextEncoder) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, lambda **settings: DemoTextModel(text))
    return comfy.sd.CLIP(target, disable_dynamic=True)  # plain layers, which cannot be loaded in part


class DemoTokenizer:
    """What comfy.sd.CLIP asks of a tokenizer. A token is the number of a word, with the weight 1."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        words = world.read_words(text).tolist()
        return {
            "mini_world": [[(word, 1.0, slot) if return_word_ids else (word, 1.0) for slot, word in enumerate(words)]]
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class DemoTextModel(torch.nn.Module):
    """What comfy.sd.CLIP asks of a text model."""

    dtypes = frozenset({torch.float32})

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Does nothing: there are no other layers for ClipSetLastLayer to choose."""

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.text.slots.device
        rows = [[word for word, *_ in row] for row in tokens["mini_world"]]
        out = self.text(torch.tensor(rows, device=device)).to(mm.intermediate_device())
        return out, out.mean(1)


class DemoVAE:
    """What the stock nodes ask of a VAE: each pixel of the world is four wide and high."""

    def decode(self, samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(b, 12, h, w) -> (b, 8 h, 8 w, 3) in 0..1"""
        return enlarge(to_pictures(samples.float())).to(mm.intermediate_device())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 8 h, 8 w, 3) in 0..1 -> (b, 12, h, w)"""
        height, width = (side - side % 8 for side in pixels.shape[1:3])
        return to_latents(shrink(pixels[:, :height, :width, :3].float())).to(mm.intermediate_device())

    def decode_tiled(self, samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.decode(samples)

    def encode_tiled(self, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return 2 * ENLARGED

    def spacial_compression_encode(self) -> int:
        return 2 * ENLARGED

    def temporal_compression_decode(self) -> None:
        return None


def load_adapters() -> LoadedAdapters:
    network = load_checkpoint(_file(files.ADAPTERS), operations=comfy.ops.manual_cast)
    patcher = comfy.model_patcher.CoreModelPatcher(
        network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )
    own = {"clip_vision": str(_file(files.CLIP_FILE)), "dino": str(_file(files.DINO_FILE))}
    return LoadedAdapters(title="demo adapters", network=network, patcher=patcher, encoders={}, own=own)
