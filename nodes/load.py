"""LoadFlexIPAdapters: files -> adapters under ComfyUI's memory management."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
from comfy_api.v0_0_2 import io

from ..flexip_core.files.checkpoint import is_flexip, load_checkpoint
from ..flexip_core.files.ip_adapter import load_pair
from ..flexip_core.files.weights import read_header
from ..flexip_core.run.reference import Shared
from . import encoders, files
from .errors import named
from .found import first_fitting
from .types import START_MENU, FlexIPAdapters

NODE = "LoadFlexIPAdapters"


@dataclass(frozen=True, eq=False)
class LoadedAdapters(Shared):
    """What travels on FLEXIP_ADAPTERS; shared by every node that reads it. Only `towers` fills up, with encoders once they are used."""

    title: str
    network: Any  # FlexIPNetwork or IPAdapterPair
    patcher: comfy.model_patcher.ModelPatcher
    encoders: dict[str, str]  # role -> chosen file or "auto"; looked up when an encoder is needed
    towers: dict[str, comfy.model_patcher.ModelPatcher] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # names of one or two, in the order of the roles
    own: dict[str, str] = field(default_factory=dict)  # role -> path of an encoder that came with the adapters


class LoadFlexIPAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        adapters, vision = files.adapter_names(), files.names(files.ENCODER_FOLDER)
        return io.Schema(
            node_id=NODE,
            display_name="Load FlexIP Adapters",
            category=START_MENU,
            description="Loads the adapters that carry a reference picture into the image: preservation keeps the subject, personalization follows the prompt.",
            search_aliases=[
                "ip-adapter",
                "ipadapter",
                "unified loader",
                "ipadapter model loader",
                "reference image",
                "identity",
                "subject",
            ],
            inputs=[
                io.Combo.Input(
                    "preservation",
                    options=[*adapters, files.AUTO],
                    tooltip="What keeps the subject: a FlexIP file in models/flexip (it holds both adapters), or an IP-Adapter file in models/ipadapter, typically ip-adapter-plus. auto: the first file that fits the model below.",
                ),
                io.Combo.Input(
                    "personalization",
                    options=[files.AUTO, *adapters],
                    default=files.AUTO,
                    tooltip="auto: the second adapter of the FlexIP file above, none with an IP-Adapter. Or choose a second IP-Adapter file, typically plain ip-adapter, composition or style.",
                ),
                io.Combo.Input(
                    "clip_vision",
                    options=[files.AUTO, *vision],
                    default=files.AUTO,
                    advanced=True,
                    tooltip="CLIP image encoder in models/clip_vision. auto: the file there that fits, found by its contents.",
                ),
                io.Combo.Input(
                    "dino",
                    options=[files.AUTO, *vision],
                    default=files.AUTO,
                    advanced=True,
                    tooltip="DINOv2 image encoder in models/clip_vision. auto: the file there that fits, found by its contents.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for preservation = auto: the model that the file must fit.",
                ),
            ],
            outputs=[
                FlexIPAdapters.Output(
                    "adapters",
                    display_name="adapters",
                    tooltip="Both adapters; wire them into Encode Reference and Apply FlexIP Gate.",
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        preservation: str | None = None,  # without a value: ComfyUI's own check says that it is missing
        personalization: str | None = None,
        clip_vision: str | None = None,
        dino: str | None = None,
    ) -> bool | str:
        adapters, vision = files.adapter_names(), [files.AUTO, *files.names(files.ENCODER_FOLDER)]
        options = {
            "preservation": adapters,
            "personalization": [files.AUTO, *adapters],
            "clip_vision": vision,
            "dino": vision,
        }
        choices = (preservation, personalization, clip_vision, dino)
        return files.check_choices(NODE, options, dict(zip(options, choices)))

    @classmethod
    def fingerprint_inputs(
        cls, preservation: str | None, personalization: str | None, clip_vision: str | None, dino: str | None, **_: Any
    ) -> list:
        unset = (files.AUTO, None)  # None: the value comes over a wire
        paths = [files.adapter_path(name, NODE) for name in (preservation, personalization) if name not in unset]
        paths += [files.path_of(files.ENCODER_FOLDER, name, NODE) for name in (clip_vision, dino) if name not in unset]
        looked_through = files.ADAPTER_FOLDERS if preservation == files.AUTO else ()
        return [os.stat(path).st_mtime_ns for path in paths] + [files.state_of(folder) for folder in looked_through]

    @classmethod
    def execute(
        cls, preservation: str, personalization: str, clip_vision: str, dino: str, model: Any = None
    ) -> io.NodeOutput:
        if preservation == files.AUTO:
            preservation = first_fitting(model, NODE)
        second = None if personalization == files.AUTO else personalization
        network = load_network(preservation, second)
        patcher = comfy.model_patcher.CoreModelPatcher(
            network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
        )
        choices = {"clip_vision": clip_vision, "dino": dino}
        encoders.refuse_misfits(network.needs(), choices, NODE)
        return io.NodeOutput(
            LoadedAdapters(
                title=title_of(network, preservation, second),
                network=network,
                patcher=patcher,
                encoders=choices,
                files=(preservation,) if second is None else (preservation, second),
            )
        )


def load_network(preservation: str, personalization: str | None) -> Any:
    """The network of one FlexIP file, or of one or two IP-Adapter files."""
    path = files.adapter_path(preservation, NODE)
    second = personalization and files.adapter_path(personalization, NODE)
    with named(NODE):
        if is_flexip(read_header(path)):
            if personalization not in (None, preservation):
                raise ValueError(
                    f"{preservation} is a FlexIP file and holds both adapters; set personalization to {files.AUTO}."
                )
            return load_checkpoint(path, operations=comfy.ops.manual_cast)
        if second and is_flexip(read_header(second)):
            raise ValueError(
                f"{personalization} is a FlexIP file and holds both adapters; choose it as preservation, with personalization set to {files.AUTO}."
            )
        return load_pair(path, second, comfy.ops.manual_cast)


def title_of(network: Any, preservation: str, personalization: str | None) -> str:
    """File names for reports and messages; an IP-Adapter with its family and base, which its name may not tell."""
    kinds = getattr(network, "kinds", None)
    return (
        preservation
        if kinds is None
        else " + ".join(f"{name} ({kind})" for name, kind in zip((preservation, personalization), kinds))
    )
