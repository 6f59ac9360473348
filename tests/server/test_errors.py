"""Wrong input in the real server: one sentence at the node, and the server goes on serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, REPO
from safetensors.torch import save_file
from server import ComfyServer, PromptError

from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt
from flexip_core.files.checkpoint import save_checkpoint
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.untrained import mini
from flexip_core.untrained.mini_checkpoints import block_widths


@pytest.fixture
def prompt(comfy: ComfyServer) -> dict:
    """The shipped gate sweep, small."""
    prompt = to_prompt(
        json.loads((REPO / "workflows" / "flexip_gate_sweep.json").read_text(encoding="utf-8")),
        comfy.get("/object_info"),
    )
    set_inputs(prompt, "LoadImage", image=REFERENCE)
    set_inputs(prompt, "EmptyLatentImage", width=64, height=64)
    set_inputs(prompt, "FlexIPSampler", steps=2, gates="0, 1")
    return prompt


def refusal(comfy: ComfyServer, prompt: dict) -> tuple[str, str]:
    """(class of the node that failed, its message); a good prompt must still run afterwards."""
    with pytest.raises(PromptError) as error:
        comfy.run(prompt)
    details = error.value.details
    return details["node_type"], details["exception_message"].strip()


@pytest.fixture(autouse=True)
def still_serving(comfy: ComfyServer, prompt: dict):
    good = json.loads(json.dumps(prompt))
    yield
    assert comfy.run(good).outputs


def one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 600


def test_a_file_that_is_no_flexip_checkpoint(comfy: ComfyServer, models: Path, prompt: dict) -> None:
    save_file({"some.weight": torch.zeros(3)}, models / "flexip" / "other.safetensors")
    set_inputs(prompt, "LoadFlexIPAdapters", preservation="other.safetensors")
    node, message = refusal(comfy, prompt)
    assert (
        node == "LoadFlexIPAdapters"
        and "other.safetensors" in message
        and "neither a FlexIP checkpoint nor an IP-Adapter" in message
        and one_sentence(message)
    )


def test_a_truncated_file(comfy: ComfyServer, models: Path, prompt: dict) -> None:
    whole = (models / "flexip" / mini.MINI_FLEXIP).read_bytes()
    (models / "flexip" / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    set_inputs(prompt, "LoadFlexIPAdapters", preservation="half.safetensors")
    node, message = refusal(comfy, prompt)
    assert (
        node == "LoadFlexIPAdapters"
        and "half.safetensors" in message
        and str(len(whole) // 2) in message
        and one_sentence(message)
    )


def test_adapters_of_another_base(comfy: ComfyServer, models: Path, prompt: dict) -> None:
    import dataclasses

    cfg = dataclasses.replace(mini.MINI_CONFIG, base="SDXL", text_width=2048, blocks=block_widths("sdxl_min"))
    save_checkpoint(FlexIPNetwork(cfg), models / "flexip" / "for_sdxl.safetensors", torch.float16)
    set_inputs(prompt, "LoadFlexIPAdapters", preservation="for_sdxl.safetensors")
    node, message = refusal(comfy, prompt)
    assert node == "ApplyFlexIPGate" and one_sentence(message)
    for word in ("for_sdxl.safetensors", "SDXL", "2048", "768", "same base"):
        assert word in message


def test_an_encoder_that_does_not_fit(comfy: ComfyServer, prompt: dict) -> None:
    set_inputs(prompt, "LoadFlexIPAdapters", clip_vision=mini.MINI_DINO_FILE)
    node, message = refusal(comfy, prompt)
    assert (
        node == "LoadFlexIPAdapters"
        and mini.MINI_DINO_FILE in message
        and "DINO" in message
        and "CLIP" in message
        and one_sentence(message)
    )


def test_no_encoder_that_fits(comfy: ComfyServer, models: Path, prompt: dict) -> None:
    import dataclasses

    cfg = dataclasses.replace(
        mini.MINI_CONFIG,
        clip=dataclasses.replace(mini.MINI_CLIP, vision_cfg={**mini.MINI_CLIP.vision_cfg, "layers": 3}),
    )
    save_checkpoint(FlexIPNetwork(cfg), models / "flexip" / "other_clip.safetensors", torch.float16)
    set_inputs(prompt, "LoadFlexIPAdapters", preservation="other_clip.safetensors")
    node, message = refusal(comfy, prompt)
    assert (
        node == "EncodeReference"
        and mini.MINI_CLIP_FILE in message
        and "3 layers" in message
        and "2 layers" in message
        and "clip_vision" in message
    )


def test_a_reference_of_other_adapters(comfy: ComfyServer, models: Path, prompt: dict) -> None:
    import dataclasses

    other = FlexIPNetwork(dataclasses.replace(mini.MINI_CONFIG, clip=dataclasses.replace(mini.MINI_CLIP, width=48)))
    save_checkpoint(other, models / "flexip" / "wider_clip.safetensors", torch.float16)
    loader = nodes_of(prompt, "LoadFlexIPAdapters")[0]
    prompt["90"] = json.loads(json.dumps(prompt[loader]))
    prompt["90"]["inputs"]["preservation"] = "wider_clip.safetensors"
    apply = nodes_of(prompt, "ApplyFlexIPGate")[0]
    prompt[apply]["inputs"]["adapters"] = ["90", 0]
    node, message = refusal(comfy, prompt)
    assert (
        node == "ApplyFlexIPGate" and "wider_clip.safetensors" in message and "48" in message and one_sentence(message)
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        (("FlexIPSampler", {"gates": "0, two"}), ["FlexIPSampler", "'two'", "0 to 1"]),
        (("ApplyFlexIPGate", {"start_percent": 0.8, "end_percent": 0.2}), ["ApplyFlexIPGate", "0.8", "0.2"]),
        (("EncodeReference", {"crop": "subject"}), ["EncodeReference", "mask"]),
    ],
)
def test_settings_that_make_no_sense(comfy: ComfyServer, prompt: dict, changes: tuple, words: list[str]) -> None:
    set_inputs(prompt, changes[0], **changes[1])
    node, message = refusal(comfy, prompt)
    assert node == words[0] and one_sentence(message)
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_refused_before_anything_runs(comfy: ComfyServer, prompt: dict) -> None:
    for name in ("gone.safetensors", "../checkpoints/" + mini.MINI_BASE):
        set_inputs(prompt, "LoadFlexIPAdapters", preservation=name)
        with pytest.raises(PromptError, match="LoadFlexIPAdapters") as error:
            comfy.run(prompt)
        assert "node_errors" in error.value.details
