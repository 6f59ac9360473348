#!/usr/bin/env python3
"""Everything that only a GPU can show, in a quarter of an hour on a machine without a network.

    python scripts/gpu_check.py --comfyui TREE [--part 1|2] [--only NAME ...] [--peer DIR] [--out FOLDER]
    python scripts/gpu_check.py --comfyui TREE --device cpu --small       # the same on any machine, to see that it works

Run it with a Python that has ComfyUI's requirements and diffusers. One line of JSON per check, as soon as it is done, the most
valuable first; each runs in a process of its own within its own time, so that what fails or hangs takes nothing with it.
The parts take at most 6 minutes each. The exit code is 1 if a check did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / place) for place in ("scripts", "tests/fixtures", "benchmarks", "")]
RESULT = "gpu_check result: "


class Check(NamedTuple):
    name: str
    part: int
    limit: int  # seconds
    module: str  # of gpu_checks; its function has the check's name


CHECKS = (
    Check("machine", 1, 20, "training"),
    Check("step", 1, 45, "training"),
    Check("peak_memory", 1, 75, "training"),
    Check("resume", 1, 30, "training"),
    Check("export", 1, 45, "training"),
    Check("step_time", 1, 75, "training"),
    Check("ranks", 1, 40, "training"),
    Check("scores", 1, 30, "training"),
    Check("benchmark_sd15", 2, 80, "running"),
    Check("comfyui", 2, 80, "running"),
    Check("comfyui_lowvram", 2, 35, "running"),
    Check("comfyui_fp8", 2, 35, "running"),
    Check("comfyui_compile", 2, 60, "running"),
    Check("benchmark_sdxl", 2, 70, "running"),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.out = options.out.resolve() if options.out else Path(tempfile.mkdtemp(prefix="gpu_check-"))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        return inside(options)
    passed = True
    for check in CHECKS:
        if (options.part in (None, check.part)) and (not options.only or check.name in options.only):
            line = outside(check, options)
            passed &= line["passed"]
            print(json.dumps(line), flush=True)
            with (options.out / "checks.jsonl").open("a") as lines:
                lines.write(json.dumps(line) + "\n")
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--comfyui", type=Path, metavar="TREE", help="part 2 runs it")
    made.add_argument("--part", type=int, choices=(1, 2))
    made.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="NAME")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--small", action="store_true", help="tiny models and few steps")
    made.add_argument(
        "--peer", type=Path, metavar="DIR", help="a checkout of ComfyUI_IPAdapter_plus, for the benchmarks"
    )
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="checks.jsonl and the benchmarks' files; else a new one"
    )
    made.add_argument("--scale", type=float, default=1.0, help="all time limits times this, for slow machines")
    made.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that runs one check
    return made


def outside(check: Check, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a check in a process group of its own and ends it, with all its children, when its time is over."""
    command = [sys.executable, Path(__file__).resolve(), "--inside", "--only", check.name, "--device", options.device]
    command += ["--out", options.out, *(["--small"] if options.small else [])]
    for name in ("comfyui", "peer"):
        if getattr(options, name):
            command += [f"--{name}", getattr(options, name).resolve()]
    begin, log = time.monotonic(), options.out / f"{check.name}.log"
    line: dict[str, Any] = {"check": check.name, "passed": False, "device": options.device}
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, cwd=options.out, start_new_session=True
        )
        try:
            process.wait(check.limit * options.scale)
        except subprocess.TimeoutExpired:
            line["reason"] = f"It took longer than {check.limit * options.scale:.0f} s."
            process.send_signal(signal.SIGINT)  # so that it stops the server that it may have started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started and left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = [text for text in log.read_text(errors="replace").splitlines() if text.startswith(RESULT)]
    late = "reason" in line  # then it has not passed, whatever it still said
    if said:
        measured = json.loads(said[-1].removeprefix(RESULT))
        line = measured | line if late else line | measured
    elif not late:
        end = log.read_text(errors="replace").splitlines()[-3:]
        line["reason"] = f"It ended with code {process.returncode}: {' / '.join(end)}"
    return line | {"seconds": round(time.monotonic() - begin, 1)}


def inside(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
    (name,) = options.only
    check = next(check for check in CHECKS if check.name == name)
    try:
        function = getattr(importlib.import_module(f"gpu_checks.{check.module}"), name)
        line = {"passed": True, **function(options)}
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the check's result
        traceback.print_exc()
        line = {"passed": False, "reason": f"{type(error).__name__}: {str(error)[:600]}"}
    print(RESULT + json.dumps(line), flush=True)
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
