#!/usr/bin/env python3
"""What FlexIP costs beside the bare UNet, beside diffusers, and beside a checkout of IPAdapter_plus if you have one.

    python benchmarks/run.py --comfyui TREE [--base sd15|sdxl] [--size 512] [--batch 1 8] [--channels 320]
                             [--device cpu|cuda] [--diffusers] [--peer DIR] [--only WORDS] [--json FILE]

Run it with ComfyUI's own Python (scripts/demo.py made one in .flexip/venv). Counted: operations, values and copies that the
host waits for, linear layers, bytes and FLOPs of one UNet call with classifier-free guidance, then those of whole runs. On a
GPU the step time, too, as the median of interleaved ratios; on a CPU time is noise and is not measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the portable build's Python leaves this out
from started import dynamic_vram, start_comfyui

PEER_NOTE = (
    "IPAdapter_plus registers its middle block as (middle, 1), ComfyUI looks up (middle, 0): it acts on {acting} of "
    "{blocks} blocks, so its numbers are for less work and the same file gives another picture."
)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    start_comfyui(options.comfyui, options.device)
    result = measure(options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--comfyui", type=Path, required=True, metavar="TREE")
    made.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
    made.add_argument("--size", type=int, help="pixels; default 512 for sd15, 1024 for sdxl")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="latents per call; default 1 8")
    made.add_argument(
        "--channels",
        type=int,
        default=320,
        help="below 320 a narrower UNet with all its blocks: operations, waits and linear layers are those of the full "
        "one, bytes and FLOPs over the bare UNet are proportional to it. A multiple of 32, for sdxl of 64",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--diffusers", action="store_true", help="count diffusers' IP-Adapter on its own UNet, too")
    made.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of ComfyUI_IPAdapter_plus")
    made.add_argument("--pairs", type=int, default=7, help="on a GPU: timed pairs of runs per model; 0 counts only")
    made.add_argument("--only", default="", metavar="WORDS", help="measure the variants whose name contains this")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from models import Bench
    from once import measure_runs, measure_sizes

    dtype = torch.float32 if options.device == "cpu" else torch.float16
    bench = Bench(options.base, dtype, options.size, options.channels)
    result = {
        "base": options.base,
        "size": bench.latent * 8,
        "channels": options.channels,
        "dtype": str(dtype),
        "device": machine(options.device),
        "torch": torch.__version__,
        "dynamic_vram": dynamic_vram(),
        "blocks": len(bench.widths),
        "calls": [one_call(bench, batch, options) for batch in options.batch],
    }
    if not options.only:
        result["runs"] = measure_runs(bench)
        result["sizes"] = measure_sizes(bench)
    return result


def one_call(bench: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The bare UNet's call at this batch, and what each variant adds."""
    from counters import peak_megabytes, per_call

    def cost_of(model: Any) -> tuple[Any, float]:
        cost = per_call(lambda steps: bench.sample(model, steps, batch))
        return cost, peak_megabytes(lambda: bench.sample(model, 1, batch))

    bare, bare_peak = cost_of(bench.model)
    rows = []
    for name, make in variants(bench, options).items():
        if options.only not in name:
            continue
        model = make()
        (cost, peak), acting = cost_of(model), acting_blocks(model, bench)
        row = _row(name, cost - bare, bare, acting) | {"peak_megabytes": peak - bare_peak}
        if options.device == "cuda":
            row["step_ratios"] = [
                step_seconds(bench, model, batch) / step_seconds(bench, bench.model, batch)
                for _ in range(options.pairs)  # bare and model in turn, so that a drifting machine cancels out
            ]
        rows.append(row)
        print(f"measured: {name}, batch {batch}", file=sys.stderr)
    if options.diffusers:
        from diffusers_peer import DiffusersPeer

        peer = DiffusersPeer(bench, batch)
        for name, adapters in (("diffusers, one plus adapter", 1), ("diffusers, two plus adapters", 2)):
            if options.only in name:
                bare_theirs, cost, acting = peer.measured(adapters)
                rows.append(_row(name, cost - bare_theirs, bare_theirs, acting) | {"peak_megabytes": None})
    return {
        "batch": batch,
        "bare": {"operations": bare.operations, "syncs": bare.syncs, "gflop": bare.gflop, "peak_megabytes": bare_peak},
        "rows": rows,
    }


def _row(name: str, extra: Any, bare: Any, acting: int) -> dict[str, Any]:
    return {
        "name": name,
        "blocks": acting,
        "operations": extra.operations,
        "operations_percent": 100 * extra.operations / bare.operations,
        "syncs": extra.syncs,
        "uploads": extra.uploads,
        "linear_layers": extra.matmuls,
        "megabytes": extra.megabytes,
        "gflop": extra.gflop,
        "flop_percent": 100 * extra.gflop / bare.gflop,
    }


def variants(bench: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    import torch
    from flexip_pack.flexip_core.run.schedule import GateCurve
    from peer import ipadapter_pair

    gated = bench.gated
    found: dict[str, Callable[[], Any]] = {
        "FlexIP outputs, both adapters, 97 tokens": lambda: gated("outputs"),
        "FlexIP outputs, window 0 to 0.99": lambda: gated("outputs", end_percent=0.99),
        "FlexIP outputs, a gate schedule": lambda: gated("outputs", GateCurve(((0.0, 0.9), (1.0, 0.2)), "linear")),
        "FlexIP outputs, a mask": lambda: gated("outputs", mask=torch.rand(1, 512, 512)),
        "FlexIP outputs, a gate mask": lambda: gated("outputs", gate_mask=torch.rand(1, 512, 512)),
        "FlexIP tokens, both adapters, 97 tokens": lambda: gated("tokens"),
        "FlexIP tokens, a gate mask": lambda: gated("tokens", gate_mask=torch.rand(1, 512, 512)),
        "FlexIP, two IP-Adapter plus files": lambda: ipadapter_pair(bench),
    }
    if options.peer:
        from peer import Peer

        peer = Peer(options.peer, bench)
        found["IPAdapter_plus, one plus adapter"] = functools.partial(peer.applied, 1)
        found["IPAdapter_plus, two plus adapters"] = functools.partial(peer.applied, 2)
    return found


def acting_blocks(model: Any, bench: Any) -> int:
    """Cross-attentions at which ComfyUI finds a replacement: it looks up the key of three parts, then that of two."""
    slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    keys = [(kind, int(number), int(index)) for kind, number, index in (a.split(".") for a in bench.widths)]
    return sum(key in slots or key[:2] in slots for key in keys)


def step_seconds(bench: Any, model: Any, batch: int) -> float:
    """Median time of a step after the first, which loads; by events, so that the timing itself waits for nothing."""
    import torch

    marks: list[Any] = []

    def mark(*args: Any) -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    bench.sample(model, 12, batch, callback=mark)
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:]))


def machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def table(result: dict[str, Any]) -> str:
    on_gpu = not result["device"].endswith("thread(s)")
    manager = "dynamic VRAM" if result["dynamic_vram"] else "no dynamic VRAM"
    lines = [
        f"{result['base']}, {result['channels']} channels, {result['size']}x{result['size']}, {result['dtype']}, "
        f"{result['device']}, {manager}, torch {result['torch']}"
    ]
    for call in result["calls"]:
        bare = call["bare"]
        heads = ["operations", "+ %", "host reads", "copies to the GPU", "linear layers", "MB written", "GFLOP"]
        heads = ["blocks", *heads, "+ %", "peak MB", *(["step time"] if on_gpu else [])]
        lines += [
            "",
            f"One UNet call, batch {call['batch']} with CFG, over the bare UNet's {bare['operations']} operations, "
            f"{bare['syncs']} host reads, {bare['gflop']:.1f} GFLOP and peak of {bare['peak_megabytes']:.0f} MB:",
            "",
            "| over the bare UNet | " + " | ".join(heads) + " |",
            "| --- " * (len(heads) + 1) + "|",
        ]
        lines += [_line(row, result["blocks"], on_gpu) for row in call["rows"]]
    for row in result["calls"][0]["rows"]:
        if row["name"].startswith("IPAdapter_plus") and row["blocks"] < result["blocks"]:
            lines += ["", PEER_NOTE.format(acting=row["blocks"], blocks=result["blocks"])]
            break
    if "runs" in result:
        heads = ["operations", "host reads", "copies to the GPU", "linear layers", "GFLOP"]
        lines += [
            "",
            "| a whole run of one step, over the bare UNet's | " + " | ".join(heads) + " |",
            "| --- " * 6 + "|",
        ]
        for name, cost in result["runs"].items():
            copies = cost["uploads"] if on_gpu else "not seen"
            cells = [cost["operations"], cost["syncs"], copies, cost["matmuls"], f"{cost['gflop']:.2f}"]
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
        lines += ["", "| size or time | measured |", "| --- | --- |"]
        lines += [f"| {what} | {value} |" for what, value in result["sizes"]]
    if not on_gpu:
        lines += ["", "Copies to a GPU cannot be seen in a run on the CPU."]
    return "\n".join(lines)


def _line(row: dict[str, Any], blocks: int, on_gpu: bool) -> str:
    peak = row["peak_megabytes"]
    cells = [
        f"{row['blocks']} of {blocks}",
        row["operations"],
        f"{row['operations_percent']:.1f}",
        row["syncs"],
        row["uploads"] if on_gpu else "not seen",
        row["linear_layers"],
        f"{row['megabytes']:.1f}",
        f"{row['gflop']:.2f}",
        f"{row['flop_percent']:.2f}",
        "" if peak is None else f"{peak:.1f}",
    ]
    if on_gpu:
        ratios = row.get("step_ratios")
        cells.append(f"x{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})" if ratios else "")
    return f"| {row['name']} | " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
