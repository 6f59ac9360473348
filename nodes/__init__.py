"""The nodes: convert, call flexip_core, return."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import files
from .apply import ApplyFlexIPGate
from .auto_gate import FlexIPAutoGate
from .combine import FlexIPCombineReferences
from .conditioning import FlexIPConditioning
from .demo import FlexIPDemoModels
from .depth import FlexIPBlocks
from .encode import EncodeReference
from .load import LoadFlexIPAdapters
from .maps import FlexIPAttentionMaps
from .reference_files import FlexIPLoadReference, FlexIPSaveReference
from .sampler import FlexIPSampler
from .schedule import FlexIPGateBatch, FlexIPGateSchedule
from .score import FlexIPScore
from .start import FlexIPStart
from .train import FlexIPTrain
from .training_status import FlexIPTrainingStatus

files.register_folders()


class FlexIPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FlexIPStart,
            LoadFlexIPAdapters,
            EncodeReference,
            ApplyFlexIPGate,
            FlexIPSampler,
            FlexIPGateSchedule,
            FlexIPGateBatch,
            FlexIPBlocks,
            FlexIPCombineReferences,
            FlexIPConditioning,
            FlexIPSaveReference,
            FlexIPLoadReference,
            FlexIPAttentionMaps,
            FlexIPScore,
            FlexIPAutoGate,
            FlexIPDemoModels,
            FlexIPTrain,
            FlexIPTrainingStatus,
        ]


async def comfy_entrypoint() -> FlexIPExtension:
    return FlexIPExtension()
