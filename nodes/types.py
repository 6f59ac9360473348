"""The private sockets, one object each, so that loader and consumer cannot drift apart."""

from comfy_api.v0_0_2 import io

# Categories, as the menu of nodes shows them.
START_MENU = "FlexIP/start"
CONTROL_MENU = "FlexIP/control"
REFERENCES_MENU = "FlexIP/references"
CHECK_MENU = "FlexIP/check"
TRAIN_MENU = "FlexIP/train"
FlexIPAdapters = io.Custom("FLEXIP_ADAPTERS")
FlexIPReference = io.Custom("FLEXIP_REFERENCE")
FlexIPGate = io.Custom("FLEXIP_GATE")
FlexIPBlockStrengths = io.Custom("FLEXIP_BLOCKS")
