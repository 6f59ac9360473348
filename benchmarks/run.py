#!/usr/bin/env python3
"""What FlexIP costs per UNet call beside the bare UNet, and beside a checkout of IPAdapter_plus if you have one.

    python benchmarks/run.py --comfyui TREE [--base sd15|sdxl] [--size 512] [--device cpu|cuda] [--peer DIR] [--json FILE]

Run it with ComfyUI's own Python (scripts/demo.py made one in .flexip/venv). Counted first: operations, synchronisations,
bytes and FLOPs of one UNet call with classifier-free guidance; then the step time as the median of interleaved ratios.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="TREE")
    parser.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, help="pixels; default 512 for sd15, 1024 for sdxl")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of ComfyUI_IPAdapter_plus")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs of runs per model; 0 counts only")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the variants whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    start_comfyui(options.comfyui, options.device)
    result = measure(options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def start_comfyui(tree: Path, device: str) -> None:
    """ComfyUI's packages and our pack become importable; its argument parser sees only what it must."""
    sys.path[:] = [str(tree), str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE.parent)]
    arguments, sys.argv = (
        sys.argv,
        [sys.argv[0], "--use-pytorch-cross-attention", *(["--cpu"] if device == "cpu" else [])],
    )
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from counters import per_call
    from models import Bench  # isort: skip - makes the pack importable
    from flexip_pack.flexip_core.run.schedule import GateCurve

    dtype = torch.float32 if options.device == "cpu" else torch.float16
    bench = Bench(options.base, dtype, options.size)
    variants: dict[str, Callable[[], Any]] = {
        "FlexIP outputs, both adapters, 97 tokens": lambda: bench.gated("outputs"),
        "FlexIP outputs, window 0 to 0.99": lambda: bench.gated("outputs", end_percent=0.99),
        "FlexIP outputs, a gate schedule": lambda: bench.gated(
            "outputs", GateCurve(((0.0, 0.9), (1.0, 0.2)), "linear")
        ),
        "FlexIP outputs, a mask": lambda: bench.gated("outputs", mask=torch.rand(1, 512, 512)),
        "FlexIP outputs, a gate mask": lambda: bench.gated("outputs", gate_mask=torch.rand(1, 512, 512)),
        "FlexIP tokens, both adapters, 97 tokens": lambda: bench.gated("tokens"),
        "FlexIP tokens, a gate mask": lambda: bench.gated("tokens", gate_mask=torch.rand(1, 512, 512)),
    }
    if options.peer:
        from peer import Peer

        peer = Peer(options.peer, bench)
        variants["IPAdapter_plus, one adapter, 16 tokens"] = lambda: peer.applied(1)
        variants["IPAdapter_plus, two adapters, 16 tokens each"] = lambda: peer.applied(2)

    bare = per_call(lambda steps: bench.sample(bench.model, steps, options.batch))
    rows = []
    for name, make in variants.items():
        if options.only not in name:
            continue
        model = make()
        extra = per_call(functools.partial(bench.sample, model, batch=options.batch)) - bare
        ratios = time_ratios(bench, model, options)
        rows.append(
            {
                "name": name,
                "operations_per_block": extra.operations / len(bench.widths),
                "operations_percent": 100 * extra.operations / bare.operations,
                "syncs": extra.syncs,
                "linear_layers": extra.matmuls,
                "megabytes": extra.megabytes,
                "flop_percent": 100 * extra.gflop / bare.gflop,
                "step_ratios": ratios,
                "peak_megabytes": peak_megabytes(bench, model, options),
            }
        )
        print(f"measured: {name}", file=sys.stderr)
        del model
        gc.collect()
    from once import measure_once

    return {
        "once": measure_once(bench),
        "base": options.base,
        "size": bench.latent * 8,
        "batch": options.batch,
        "dtype": str(dtype),
        "device": machine(options.device),
        "torch": torch.__version__,
        "blocks": len(bench.widths),
        "bare": {
            "operations": bare.operations,
            "syncs": bare.syncs,
            "megabytes": bare.megabytes,
            "gflop": bare.gflop,
            "peak_megabytes": peak_megabytes(bench, bench.model, options),
        },
        "rows": rows,
    }


def time_ratios(bench: Any, model: Any, options: argparse.Namespace) -> list[float]:
    """Step time over the bare UNet's, pair by pair: bare, model, bare, model, ... so that a drifting machine cancels out."""
    pairs = []
    for _ in range(options.pairs):
        bare, ours = step_seconds(bench, bench.model, options), step_seconds(bench, model, options)
        pairs.append(ours / bare)
    return pairs


def step_seconds(bench: Any, model: Any, options: argparse.Namespace) -> float:
    """Median time of a step after the first, which loads; on a GPU by events, so that the timing itself waits for nothing."""
    import torch

    marks: list[Any] = []

    def mark(*args: Any) -> None:
        if options.device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    bench.sample(model, 3 if options.device == "cpu" else 12, options.batch, callback=mark)
    if options.device == "cuda":
        torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:]))
    return statistics.median(after - before for before, after in zip(marks, marks[1:]))


def peak_megabytes(bench: Any, model: Any, options: argparse.Namespace) -> float | None:
    """Peak of allocated GPU memory over a run, in MB; None without a GPU. Synchronising inside our patches is an error."""
    import torch
    from flexip_pack.flexip_core.network.attention import GatedAttention

    if options.device != "cuda":
        return None
    original = GatedAttention.__call__

    def strict(self: Any, *args: Any) -> torch.Tensor:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    GatedAttention.__call__ = strict
    try:
        torch.cuda.reset_peak_memory_stats()
        bench.sample(model, 2, options.batch)
        return torch.cuda.max_memory_allocated() / 1e6
    finally:
        GatedAttention.__call__ = original


def machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['base']} {result['size']}x{result['size']}, batch {result['batch']} with CFG, {result['dtype']}, {result['device']}, torch {result['torch']}; "
        f"bare UNet: {result['bare']['operations']} operations, {result['bare']['gflop']:.0f} GFLOP per call, {result['blocks']} cross-attention blocks",
        "",
        "| per UNet call, over the bare UNet | operations per block | operations | synchronisations | linear layers | MB written | FLOP | step time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    if any(row["peak_megabytes"] is not None for row in result["rows"]):
        lines[-2] += " peak memory |"
        lines[-1] += " --- |"
    for row in result["rows"]:
        ratios = row["step_ratios"]
        time_text = f"x{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})" if ratios else "not timed"
        lines.append(
            f"| {row['name']} | {row['operations_per_block']:.1f} | +{row['operations_percent']:.1f} % | {row['syncs']} | {row['linear_layers']} | "
            f"{row['megabytes']:.0f} | +{row['flop_percent']:.2f} % | {time_text} |"
        )
        if row["peak_megabytes"] is not None:
            lines[-1] += f" peak {row['peak_megabytes']:.0f} MB (bare {result['bare']['peak_megabytes']:.0f}) |"
    lines += ["", "| once | measured |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in result["once"])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
