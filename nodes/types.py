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


def gate_input(tooltip: str) -> io.Float.Input:
    """The slider γ, alike wherever a node has one."""
    return io.Float.Input(
        "gate", default=0.6, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider, tooltip=tooltip
    )


def strength_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=1.0, min=0.0, max=5.0, step=0.01, tooltip=tooltip)
