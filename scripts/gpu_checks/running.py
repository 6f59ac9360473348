"""The pack in a real ComfyUI on a GPU, and what it costs there."""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from server import CPU_ARGUMENTS, ComfyServer

from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt
from flexip_core.untrained import mini

REPO = Path(__file__).resolve().parents[2]
DEMO = (  # of the trained demo world, without other files
    "flexip_demo_world",
    "flexip_image_to_image",
    "flexip_regional_prompts",
    "flexip_style_over_time",
    "flexip_two_characters_by_mask",
    "flexip_batch_of_references",
)
SWEEP = "flexip_gate_sweep"  # of the mini checkpoint: dynamic VRAM, --lowvram and fp8 manage its weights
SLOWEST = 1.03  # step time over the bare UNet's


def comfyui(options: argparse.Namespace) -> dict[str, Any]:
    """As it starts by itself, with dynamic VRAM on an NVIDIA card: the six demo workflows and the sweep, each queued twice."""
    return _served(options, DEMO[:1] if options.small else (*DEMO, SWEEP))


def comfyui_lowvram(options: argparse.Namespace) -> dict[str, Any]:
    return _served(options, (SWEEP,), "--lowvram")


def comfyui_fp8(options: argparse.Namespace) -> dict[str, Any]:
    return _served(options, (SWEEP,), "--fp8_e4m3fn-unet")


def comfyui_compile(options: argparse.Namespace) -> dict[str, Any]:
    """With the stock TorchCompileModel after FlexIP. Without a GPU not compiled: that takes minutes."""
    return _served(options, (SWEEP,), compiled=True)


def _served(
    options: argparse.Namespace, workflows: tuple[str, ...], *arguments: str, compiled: bool = False
) -> dict[str, Any]:
    """Every picture is one, no warning is logged, and a second queue with another gate projects nothing."""
    base = options.out / "-".join(["comfyui", *(a.strip("-") for a in arguments), *(["compiled"] if compiled else [])])
    # --cpu and the choices of memory exclude each other
    start = arguments if options.device == "cuda" else CPU_ARGUMENTS + tuple(a for a in arguments if a != "--lowvram")
    server = ComfyServer(_tree(options), base, packs={"flexip": REPO}, arguments=start)
    mini.make_mini_models(base / "models")
    Image.linear_gradient("L").convert("RGB").save(base / "input" / "example.png")
    runs = []
    with server:
        manager = "dynamic VRAM" if "DynamicVRAM support detected and enabled" in server.log_text() else "static"
        for name in workflows:
            prompt = to_prompt(
                json.loads((REPO / "workflows" / f"{name}.json").read_bytes()), server.get("/object_info")
            )
            if options.small:
                _make_small(prompt)
            if compiled and options.device == "cuda":
                _compile(prompt)
            for number, gate in enumerate((0.6, 0.3)):
                set_inputs(prompt, "ApplyFlexIPGate", **_gate(prompt, gate))
                runs.append({"workflow": name, "queue": number + 1} | _run(server, prompt))
    wrong = [run for run in runs if run["warnings"] or not run["pictures"] or run["flat_pictures"]]
    wrong += [run for run in runs if run["queue"] == 2 and run["projected"]]
    return {"passed": not wrong, "manager": manager, "arguments": start, "runs": runs}


def _gate(prompt: dict[str, Any], gate: float) -> dict[str, Any]:
    """Nothing where a schedule or a batch of gates comes over a wire: the second queue is then just a second queue."""
    nodes = [prompt[node]["inputs"] for node in nodes_of(prompt, "ApplyFlexIPGate")]
    return {} if any(isinstance(inputs["gate"], list) for inputs in nodes) else {"gate": gate}


def _make_small(prompt: dict[str, Any]) -> None:
    for kind, values in {"EmptyLatentImage": {"width": 64, "height": 64}, "FlexIPSampler": {"steps": 1}}.items():
        if nodes_of(prompt, kind):
            set_inputs(prompt, kind, **values)


def _compile(prompt: dict[str, Any]) -> None:
    """Between the last Apply FlexIP Gate and whatever samples."""
    applied = nodes_of(prompt, "ApplyFlexIPGate")[-1]
    for node in prompt.values():
        if node["inputs"].get("model") == [applied, 0]:
            node["inputs"]["model"] = ["compiled", 0]
    prompt["compiled"] = {"class_type": "TorchCompileModel", "inputs": {"model": [applied, 0], "backend": "inductor"}}


def _run(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, Any]:
    for node in prompt.values():  # sampled again, with everything else from ComfyUI's cache
        if "seed" in node["inputs"] and not isinstance(node["inputs"]["seed"], list):
            node["inputs"]["seed"] += 1
    before = len(server.log_text())
    outputs = server.run(prompt).outputs
    said = server.log_text()[before:]
    files = [file for node in nodes_of(prompt, "SaveImage") for file in outputs[node]["images"]]
    shown = [Image.open(io.BytesIO(server.view(file))).convert("RGB") for file in files]
    return {
        "pictures": len(shown),
        "flat_pictures": sum(all(low == high for low, high in picture.getextrema()) for picture in shown),
        "projected": sum(map(int, re.findall(r"K/V: (\d+) projected", said))),
        "warnings": [line for line in said.splitlines() if "WARNING" in line],
        "peak_megabytes": _peak(server),
    }


def _peak(server: ComfyServer) -> float | None:
    """What the server holds of the card after the run, by torch's own count."""
    devices = server.system_stats()["devices"]
    held = devices[0]["torch_vram_total"] if devices else 0
    return held / 1e6 if held and devices[0]["type"] == "cuda" else None


def _tree(options: argparse.Namespace) -> Path:
    if options.comfyui is None or not (options.comfyui / "main.py").is_file():
        raise ValueError("Name the folder of ComfyUI's main.py by --comfyui.")
    return options.comfyui


def benchmark_sd15(options: argparse.Namespace) -> dict[str, Any]:
    return _benchmark(options, "sd15")


def benchmark_sdxl(options: argparse.Namespace) -> dict[str, Any]:
    return _benchmark(options, "sdxl")


def _benchmark(options: argparse.Namespace, base: str) -> dict[str, Any]:
    """benchmarks/run.py: in a step nothing that the host waits for, and hardly more time than without FlexIP."""
    target = options.out / f"benchmark_{base}.json"
    command = [sys.executable, REPO / "benchmarks" / "run.py", "--comfyui", _tree(options), "--base", base]
    command += ["--device", options.device, "--json", target, "--diffusers"]
    command += ["--peer", options.peer] if options.peer else []
    if options.small:
        command += ["--size", 64, "--channels", 64, "--batch", 1, "--only", "FlexIP outputs, both"]
    else:
        command += ["--pairs", 3, "--batch", *((1, 8) if base == "sd15" else (1,))]
    subprocess.run(list(map(str, command)), check=True)
    result = json.loads(target.read_text())
    rows = [row | {"batch": call["batch"]} for call in result["calls"] for row in call["rows"]]
    constant = [row for row in rows if row["name"].startswith(("FlexIP outputs, both", "FlexIP tokens, both"))]
    waits = sum(row["syncs"] + row["uploads"] + row["linear_layers"] for row in constant)
    slowest = max((statistics.median(r["step_ratios"]) for r in constant if r.get("step_ratios")), default=None)
    passed = not waits and (slowest is None or slowest < SLOWEST)
    return {
        "passed": passed,
        "waits": waits,
        "slowest_step_ratio": slowest,
        "dynamic_vram": result["dynamic_vram"],
        "rows": rows,
    }
