"""LoadFlexIPAdapters: files -> adapters under ComfyUI's memory management."""
from __future__ import annotations

import os
from dataclasses import dataclass, field

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
from comfy_api.v0_0_2 import io

from ..flexip_core.adapters import FlexIPNetwork
from ..flexip_core.checkpoint import load_checkpoint
from . import encoders, files
from .types import CATEGORY, FlexIPAdapters

NODE = "LoadFlexIPAdapters"


@dataclass(frozen=True, eq=False)
class LoadedAdapters:
    """What travels on FLEXIP_ADAPTERS; shared by every node that reads it. Only `towers` fills up, with encoders once they are used."""

    title: str
    network: FlexIPNetwork
    patcher: comfy.model_patcher.ModelPatcher
    clip_path: str | None
    dino_path: str | None
    towers: dict[str, comfy.model_patcher.ModelPatcher] = field(default_factory=dict)


class LoadFlexIPAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        adapters, vision = files.names(files.ADAPTER_FOLDER), files.names(files.ENCODER_FOLDER)
        return io.Schema(
            node_id=NODE,
            display_name="Load FlexIP Adapters",
            category=CATEGORY,
            description="Loads the adapters that carry a reference picture into the image: preservation keeps the subject, personalization follows the prompt.",
            search_aliases=["ip-adapter", "ipadapter", "reference image", "identity", "subject"],
            inputs=[
                io.Combo.Input("preservation", options=adapters, tooltip="File in models/flexip. A FlexIP file holds both adapters."),
                io.Combo.Input("personalization", options=[files.AUTO, *adapters], default=files.AUTO,
                               tooltip="auto: the second adapter of the FlexIP file above. A second file is only for pairs of single adapters."),
                io.Combo.Input("clip_vision", options=[files.AUTO, *vision], default=files.AUTO, advanced=True,
                               tooltip="CLIP image encoder in models/clip_vision. auto: the file there that fits, found by its contents."),
                io.Combo.Input("dino", options=[files.AUTO, *vision], default=files.AUTO, advanced=True,
                               tooltip="DINOv2 image encoder in models/clip_vision. auto: the file there that fits, found by its contents."),
            ],
            outputs=[FlexIPAdapters.Output("adapters", display_name="adapters", tooltip="Both adapters; wire them into Encode Reference and Apply FlexIP Gate.")],
        )

    @classmethod
    def fingerprint_inputs(cls, preservation: str, personalization: str, clip_vision: str, dino: str) -> list:
        chosen = [(files.ADAPTER_FOLDER, preservation), (files.ADAPTER_FOLDER, personalization), (files.ENCODER_FOLDER, clip_vision), (files.ENCODER_FOLDER, dino)]
        return [os.stat(files.path_of(folder, name, NODE)).st_mtime_ns for folder, name in chosen if name != files.AUTO]

    @classmethod
    def execute(cls, preservation: str, personalization: str, clip_vision: str, dino: str) -> io.NodeOutput:
        if personalization not in (files.AUTO, preservation):
            raise ValueError(f"{NODE}: {preservation} is a FlexIP file and holds both adapters; set personalization to {files.AUTO}.")
        path = files.path_of(files.ADAPTER_FOLDER, preservation, NODE)
        with encoders.named(NODE):
            network = load_checkpoint(path, operations=comfy.ops.manual_cast)
        patcher = comfy.model_patcher.CoreModelPatcher(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
        return io.NodeOutput(LoadedAdapters(
            title=preservation,
            network=network,
            patcher=patcher,
            clip_path=encoders.resolve(clip_vision, network.cfg.clip, NODE),
            dino_path=encoders.resolve(dino, network.cfg.dino, NODE),
        ))
