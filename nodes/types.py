"""The private sockets, one object each, so that loader and consumer cannot drift apart."""

from comfy_api.v0_0_2 import io

CATEGORY = "FlexIP"
FlexIPAdapters = io.Custom("FLEXIP_ADAPTERS")
FlexIPReference = io.Custom("FLEXIP_REFERENCE")
FlexIPGate = io.Custom("FLEXIP_GATE")
FlexIPBlockStrengths = io.Custom("FLEXIP_BLOCKS")
