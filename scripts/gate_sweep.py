"""Runs workflows/flexip_demo_world.json in a real ComfyUI server for several subjects; demo.py calls it.

python scripts/gate_sweep.py --comfyui TREE --folder DIR       (with ComfyUI's own Python)
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "scripts"), str(REPO)]  # the portable build's Python adds neither
from environment import step
from PIL import Image, ImageDraw, ImageFont
from server import ComfyServer, PromptError

from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt

WORKFLOW = REPO / "workflows" / "flexip_demo_world.json"
SUBJECTS = (7, 16, 9)
MARGIN, PAPER, INK = 8, "white", "black"
FONT = ImageFont.load_default(size=18)


def demo_prompt(object_info: dict[str, Any], subject: int, words: str = "") -> dict[str, Any]:
    """The shipped workflow for one subject and one noise; `words` in place of the demo node's own prompt."""
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info)
    set_inputs(prompt, "FlexIPDemoModels", subject=subject)
    set_inputs(prompt, "EmptyLatentImage", batch_size=1)
    if words:
        sampler = prompt[nodes_of(prompt, "FlexIPSampler")[0]]["inputs"]
        prompt[sampler["positive"][0]]["inputs"]["text"] = words
    return prompt


def sweep(server: ComfyServer, subject: int) -> list[Image.Image]:
    """The gate with a prompt that names another place than the reference's, and with one that leaves the place open."""
    rows, named = [], ""
    for kept in (None, 2):  # words of the prompt: "a disc" of "a disc on sand, top left"
        words = " ".join(named.split()[:kept]) if named else ""
        prompt = demo_prompt(server.get("/object_info"), subject, words)
        outputs = server.run(prompt).outputs
        reference, sheet = (
            Image.open(io.BytesIO(server.view(outputs[nodes_of(prompt, kind)[0]]["images"][0]))).convert("RGB")
            for kind in ("PreviewImage", "SaveImage")
        )
        named = named or outputs[nodes_of(prompt, "PreviewAny")[0]]["text"][0]
        print(f"  {words or named}")
        rows.append(beside(reference, sheet, words or named))
    return rows


def beside(reference: Image.Image, sheet: Image.Image, words: str) -> Image.Image:
    """The prompt above; the reference at the left, as large as a picture of the sheet."""
    line, side = 2 * FONT.size, sheet.height * 6 // 7
    row = Image.new("RGB", (side + 3 * MARGIN + sheet.width, line + sheet.height), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((MARGIN, line / 2), f"prompt: {words}", fill=INK, font=FONT, anchor="lm")
    draw.text((MARGIN + side / 2, line + (sheet.height - side) / 2), "reference", fill=INK, font=FONT, anchor="mm")
    row.paste(reference.resize((side, side), Image.NEAREST), (MARGIN, row.height - side))
    row.paste(sheet, (side + 3 * MARGIN, line))
    return row


def stacked(rows: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height + MARGIN for row in rows)), PAPER)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + MARGIN
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="TREE", type=Path, required=True, help="the folder of ComfyUI's main.py")
    parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="where everything is written")
    parser.add_argument("--keep", action="store_true", help="leave ComfyUI open until Ctrl+C, and say where")
    options = parser.parse_args()
    start = time.monotonic()
    server = ComfyServer(options.comfyui, options.folder / "comfyui", packs={"flexip": REPO})
    rows = []
    try:
        with step("Starting ComfyUI"):
            server.start()
        print(f"Running {WORKFLOW.name} on {server.url}")
        for subject in SUBJECTS:
            rows += sweep(server, subject)
        finish(rows, options.folder / f"{WORKFLOW.stem}.png", time.monotonic() - start)
        if options.keep:
            print(
                f"ComfyUI is open at {server.url} until Ctrl+C. Its templates have {WORKFLOW.stem} under flexip.",
                flush=True,
            )
            server.process.wait()
    except KeyboardInterrupt:
        return 0 if options.keep and rows else 130
    except (PromptError, RuntimeError, TimeoutError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        server.stop()
    return 0


def finish(rows: list[Image.Image], target: Path, seconds: float) -> None:
    stacked(rows).save(target)
    print(
        f"The contact sheet is in {target} ({seconds:.1f} s).\n"
        "At gate 1 the reference decides what the prompt leaves open, at gate 0 it does not; what the prompt names, it decides."
    )


if __name__ == "__main__":
    sys.exit(main())
