"""FlexIPConditioning: a prompt that brings its own reference and gate along."""

from __future__ import annotations

from typing import Any

import comfy.conds
import node_helpers
from comfy_api.v0_0_2 import io
from comfy_execution.utils import get_executing_context

from ..flexip_core.run.chain import Own
from ..flexip_core.run.reference import Reference, ReferenceSet
from . import notices
from .checks import check_numbers
from .types import CONTROL_MENU, FlexIPGate, FlexIPReference, gate_input, strength_input

NODE = "FlexIPConditioning"
OWN = "flexip"  # key in the conditioning's dict
REMINDER = "flexip_conditioning_without_apply_flexip_gate"  # key in its model_conds; the error of a model that takes no extra arguments shows it


class FlexIPConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Conditioning",
            category=CONTROL_MENU,
            description="A prompt with its own reference and gate, for regional prompts. The model still needs Apply FlexIP Gate; for this prompt, the values here replace that node's.",
            search_aliases=[
                "regional prompt",
                "conditioning reference",
                "ip-adapter regional",
                "prompt gate",
                "character",
                "reference",
            ],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, before or after Set Area and Set Mask."),
                gate_input(
                    "1 keeps the subject, 0 lets this prompt change it; used instead of the gate on Apply FlexIP Gate."
                ),
                strength_input(
                    "How much the reference counts for this prompt, times the strength on Apply FlexIP Gate."
                ),
                FlexIPReference.Input(
                    "reference",
                    optional=True,
                    tooltip="This prompt's own reference, encoded for the same adapters. Without it, the one on Apply FlexIP Gate.",
                ),
                FlexIPGate.Input(
                    "gate_schedule",
                    optional=True,
                    tooltip="A gate that changes over the sampling or over the batch; used instead of the slider.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="For the sampler's positive."
                )
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # as in ApplyFlexIPGate
        )

    @classmethod
    def execute(
        cls,
        conditioning: list,
        gate: float,
        strength: float,
        reference: Reference | ReferenceSet | None = None,
        gate_schedule: Any = None,
    ) -> io.NodeOutput:
        check_numbers(NODE, 0, 1, gate=gate)
        check_numbers(NODE, 0, 5, strength=strength)
        own = Own(reference, (gate,) if gate_schedule is None else gate_schedule, strength)
        reminder = Reminder(notices.id_of(cls))
        out = []
        for entry in conditioning:
            model_conds = {**entry[1].get("model_conds", {}), REMINDER: reminder}
            out += node_helpers.conditioning_set_values([entry], {OWN: own, "model_conds": model_conds})
        return io.NodeOutput(out)


class Reminder(comfy.conds.CONDConstant):
    """Speaks up in a run on a model without Apply FlexIP Gate; that node's run takes it off before the first step."""

    def __init__(self, node_id: str | None) -> None:
        super().__init__(None)
        self.node_id = node_id
        self.warned_in: Any = ()

    def process_cond(self, batch_size: int, **kwargs: Any) -> comfy.conds.CONDConstant:
        run = get_executing_context()  # of the sampler; None in scripts
        if run != self.warned_in:  # called at every step
            self.warned_in = run
            notices.warn(
                "this prompt has a FlexIP reference, but the model on the sampler has no Apply FlexIP Gate, so it does nothing. "
                "Put Apply FlexIP Gate between the checkpoint and the sampler",
                self.node_id,
            )
        return comfy.conds.CONDConstant(None)


def without_reminders(conds: dict[str, list[dict[str, Any]]]) -> None:
    """New dicts in place of those that carry one: the old ones also belong to the user's cached conditionings."""
    for entries in conds.values():
        for entry in entries:
            if REMINDER in entry["model_conds"]:
                entry["model_conds"] = {key: cond for key, cond in entry["model_conds"].items() if key != REMINDER}
