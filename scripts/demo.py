#!/usr/bin/env python3
"""A picture from scratch: makes an environment with a real ComfyUI, sweeps the gate in the demo world, and says where the picture is.

    python3 scripts/demo.py                      # everything in .flexip/, about 7 GB, minutes the first time
    python3 scripts/demo.py --comfyui DIR        # with an installation that is already there
    python3 scripts/demo.py --keep               # ComfyUI stays open afterwards, to try the gate in its page

The demo world comes trained with the pack: the picture shows subjects that are kept at gate 1 and let go at gate 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the portable build's Python leaves this out
import environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_arguments(parser)
    parser.add_argument("--keep", action="store_true", help="leave ComfyUI open until Ctrl+C, and say where")
    options = parser.parse_args()
    try:
        env = environment.prepare(options)
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    script = environment.REPO / "scripts" / "gate_sweep.py"
    command = [
        env.python,
        script,
        "--comfyui",
        env.comfyui,
        "--folder",
        env.home / "demo",
        *(["--keep"] if options.keep else []),
    ]
    process = subprocess.Popen(list(map(str, command)))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it got Ctrl+C, too, and stops its server first; subprocess.run would kill it
            pass


if __name__ == "__main__":
    sys.exit(main())
