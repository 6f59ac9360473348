"""The nodes: convert, call flexip_core, return."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import files
from .apply import ApplyFlexIPGate
from .combine import FlexIPCombineReferences
from .encode import EncodeReference
from .load import LoadFlexIPAdapters
from .own import FlexIPConditioning
from .sampler import FlexIPSampler

files.register_folders()


class FlexIPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadFlexIPAdapters,
            EncodeReference,
            ApplyFlexIPGate,
            FlexIPSampler,
            FlexIPCombineReferences,
            FlexIPConditioning,
        ]


async def comfy_entrypoint() -> FlexIPExtension:
    return FlexIPExtension()
