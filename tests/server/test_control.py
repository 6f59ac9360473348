"""Over HTTP, what no template shows: references as files, block strengths, sweeps of strengths, regions, a negative reference, a drawn curve."""

from __future__ import annotations

import itertools
import json

import pytest
from conftest import REFERENCE, REPO
from server import ComfyServer, PromptError

from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt

seeds = itertools.count(9000)


@pytest.fixture
def prompt(comfy: ComfyServer) -> dict:
    """The shipped sweep, small, without its sweep; the nodes that a test adds have names instead of numbers."""
    workflow = json.loads((REPO / "workflows" / "flexip_gate_sweep.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, comfy.get("/object_info"))
    set_inputs(prompt, "LoadImage", image=REFERENCE)
    set_inputs(prompt, "EmptyLatentImage", width=64, height=64)
    set_inputs(prompt, "FlexIPSampler", steps=2, gates="", seed=next(seeds))
    return prompt


def said(comfy: ComfyServer, prompt: dict) -> str:
    """What FlexIP logged in a run of `prompt`."""
    before = len(comfy.log_text())
    comfy.run(prompt)
    return comfy.log_text()[before:]


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def one(prompt: dict, kind: str) -> str:
    [found] = nodes_of(prompt, kind)
    return found


def test_a_reference_goes_through_a_file_and_a_pair_of_lists_says_where_it_acts(
    comfy: ComfyServer, prompt: dict
) -> None:
    encode = one(prompt, "EncodeReference")
    saving = {**prompt, "save": node("FlexIPSaveReference", reference=[encode, 0], filename_prefix="characters/hero")}
    run = comfy.run(saving)
    [file] = run.outputs["save"]["files"]
    assert file["filename"].endswith(".flexip-ref.safetensors") and file["subfolder"] == "characters"

    name = f"characters/{file['filename']} [output]"
    prompt["load"] = node("FlexIPLoadReference", reference_file=name)
    prompt["blocks"] = node(
        "FlexIPBlocks",
        preservation="composition only",
        personalization="list",
        preservation_list="",
        personalization_list="all=0, output=0.5",
    )
    prompt[one(prompt, "ApplyFlexIPGate")]["inputs"] |= {"reference": ["load", 0], "blocks": ["blocks", 0]}
    report = said(comfy, prompt)
    assert "3 of 4 blocks patched" in report and "reference: 1 picture(s)" in report and "WARNING" not in report

    prompt["load"] = node("FlexIPLoadReference", reference_file="../../models/flexip/flexip_mini.safetensors")
    with pytest.raises(PromptError, match="FlexIPLoadReference"):
        comfy.run(prompt)


def test_strengths_and_gates_are_a_grid_and_a_negative_reference_is_said(comfy: ComfyServer, prompt: dict) -> None:
    encode = one(prompt, "EncodeReference")
    prompt["other"] = node("ImageInvert", image=[one(prompt, "LoadImage"), 0])
    prompt["away"] = {"class_type": "EncodeReference", "inputs": {**prompt[encode]["inputs"], "image": ["other", 0]}}
    prompt["both"] = node(
        "FlexIPCombineReferences",
        **{"references.reference_0": [encode, 0], "negative": ["away", 0]},
        combine="concatenate",
        weights="",
    )
    set_inputs(prompt, "ApplyFlexIPGate", reference=["both", 0])
    set_inputs(prompt, "FlexIPSampler", gates="0, 1", strengths="0.5, 1")
    report = said(comfy, prompt)
    assert "gate 0, 1, strength 0.5, 1" in report and "with a negative reference" in report and "WARNING" not in report


def test_regions_with_a_drawn_curve(comfy: ComfyServer, prompt: dict) -> None:
    if "curve" not in comfy.get("/object_info/FlexIPGateSchedule")["FlexIPGateSchedule"]["input"]["optional"]:
        pytest.skip("this ComfyUI has no curves")
    encode = one(prompt, "EncodeReference")
    prompt["white"] = node("SolidMask", value=1.0, width=32, height=64)
    prompt["black"] = node("SolidMask", value=0.0, width=64, height=64)
    left, right = (
        node("MaskComposite", destination=["black", 0], source=["white", 0], x=x, y=0, operation="add") for x in (0, 32)
    )
    prompt |= {"left": left, "right": right}
    prompt |= {f"{side} picture": node("MaskToImage", mask=[side, 0]) for side in ("left", "right")}
    prompt["pictures"] = node("ImageBatch", image1=["left picture", 0], image2=["right picture", 0])
    prompt["masks"] = node("ImageToMask", image=["pictures", 0], channel="red")
    prompt["both"] = node(
        "FlexIPCombineReferences",
        **{"references.reference_0": [encode, 0], "references.reference_1": [encode, 0]},
        combine="one per region",
        weights="1, 0.5",
        masks=["masks", 0],
    )
    curve = {"points": [[0.0, 1.0], [1.0, 0.0]], "interpolation": "linear"}
    prompt["schedule"] = node("FlexIPGateSchedule", preset="curve", start=0.5, end=0.5, curve=curve)
    prompt[one(prompt, "ApplyFlexIPGate")]["inputs"] |= {"reference": ["both", 0], "gate_schedule": ["schedule", 0]}
    report = said(comfy, prompt)
    assert "one per region, weights 1, 0.5" in report and "WARNING" not in report
    assert "gate 1, " in report  # the curve's value at the first step, then another


def test_a_wrong_combination_is_a_sentence_that_names_its_node(comfy: ComfyServer, prompt: dict) -> None:
    encode = one(prompt, "EncodeReference")
    prompt["both"] = node(
        "FlexIPCombineReferences", **{"references.reference_0": [encode, 0]}, combine="one per region", weights=""
    )
    set_inputs(prompt, "ApplyFlexIPGate", reference=["both", 0])
    with pytest.raises(PromptError, match="FlexIPCombineReferences: one per region needs masks"):
        comfy.run(prompt)
