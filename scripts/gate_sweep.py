"""Runs workflows/flexip_gate_sweep.json in a real ComfyUI server with the mini models; demo.py calls it.

python scripts/gate_sweep.py --comfyui TREE --folder DIR --image FILE       (with ComfyUI's own Python)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "scripts"), str(REPO)]  # the portable build's Python adds neither
from environment import step  # noqa: E402
from server import ComfyServer, PromptError  # noqa: E402

from flexip_core import mini  # noqa: E402
from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt  # noqa: E402

WORKFLOW = REPO / "workflows" / "flexip_gate_sweep.json"
SIZE, STEPS = 256, 8
SHEET_OUTPUT = 1  # of FlexIPSampler: latent, contact sheet, report


def gate_sweep_prompt(object_info: dict[str, Any], image: str) -> dict[str, Any]:
    """The shipped workflow with the mini models and `image` (a name in ComfyUI's input folder).

    Smaller and in fewer steps than for real models, so that two cores without a GPU need less than a minute.
    """
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info)
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name=mini.MINI_BASE)
    set_inputs(
        prompt,
        "LoadFlexIPAdapters",
        preservation=mini.MINI_FLEXIP,
        personalization="auto",
        clip_vision="auto",
        dino="auto",
    )
    set_inputs(prompt, "LoadImage", image=image)
    set_inputs(prompt, "EmptyLatentImage", width=SIZE, height=SIZE)
    set_inputs(prompt, "FlexIPSampler", steps=STEPS)
    return prompt


def sheet_node(prompt: dict[str, Any]) -> str:
    """The node that saves the contact sheet."""
    sampler = nodes_of(prompt, "FlexIPSampler")[0]
    sheet = [sampler, SHEET_OUTPUT]
    return next(node for node in nodes_of(prompt, "SaveImage") if prompt[node]["inputs"]["images"] == sheet)


def show_progress(message: dict[str, Any]) -> None:
    """A bar for nodes with several steps."""
    if message["type"] == "progress":
        value, most = message["data"]["value"], message["data"]["max"]
        filled = round(30 * value / most)
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r  [{bar}] {value}/{most}", end="\n" if value == most else "", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="TREE", type=Path, required=True, help="the folder of ComfyUI's main.py")
    parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="where everything is written")
    parser.add_argument("--image", metavar="FILE", type=Path, required=True, help="the reference")
    options = parser.parse_args()
    start = time.monotonic()
    base = options.folder / "comfyui"
    with step("Making the mini models"):
        mini.make_mini_models(base / "models")
    server = ComfyServer(options.comfyui, base, packs={"flexip": REPO})
    shutil.copyfile(options.image, base / "input" / options.image.name)
    try:
        with step("Starting ComfyUI"):
            server.start()
        prompt = gate_sweep_prompt(server.get("/object_info"), options.image.name)
        print(f"Running {WORKFLOW.name} on {server.url}")
        run = server.run(prompt, on_message=show_progress)
        sheet = server.view(run.outputs[sheet_node(prompt)]["images"][0])
    except (PromptError, RuntimeError, TimeoutError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        server.stop()
    target = options.folder / f"{WORKFLOW.stem}.png"
    target.write_bytes(sheet)
    print(
        f"The contact sheet is in {target} ({time.monotonic() - start:.1f} s).\n"
        "The mini models are untrained: the picture shows that everything runs, not what FlexIP can do."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
