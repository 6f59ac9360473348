#!/usr/bin/env python3
"""The test suite in the demo's environment. Arguments that are not listed here go to pytest.

python3 scripts/test.py [--all] [--only core server] [-k gate ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the portable build's Python leaves this out
import environment  # noqa: E402

# One process each: core must work without ComfyUI, and ComfyUI cannot be imported twice with different options.
FOLDERS = ("core", "packaging", "comfy", "server")
NO_TESTS = 5  # pytest's exit code when nothing was selected
COUNTS = ("tests", "failures", "errors", "skipped")


def run_folder(env: environment.Environment, folder: str, arguments: list[str]) -> tuple[int, Counter[str]]:
    """pytest's exit code and its counts."""
    tests, report = environment.REPO / "tests", env.home / "logs" / f"tests-{folder}.xml"
    report.unlink(missing_ok=True)
    command = [
        env.python,
        "-m",
        "pytest",
        "-c",
        tests / "pytest.ini",
        f"--junitxml={report}",
        tests / folder,
        *arguments,
    ]
    variables = {**os.environ, "COMFYUI_TREE": str(env.comfyui), "OMP_NUM_THREADS": "1"}
    print(f"\n== tests/{folder}", flush=True)
    code = subprocess.run(list(map(str, command)), cwd=environment.REPO, env=variables).returncode
    suites = ElementTree.parse(report).getroot().iter("testsuite") if report.is_file() else []
    return code, sum((Counter({key: int(suite.get(key, 0)) for key in COUNTS}) for suite in suites), Counter())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    environment.add_arguments(parser)
    parser.add_argument("--all", action="store_true", help="the tests marked long, too")
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=FOLDERS, help="these folders of tests/")
    options, arguments = parser.parse_known_args()
    if os.environ.get("CI") and not environment.find_browser():
        print(f"{environment.NO_BROWSER} In CI the browser tests must run.", file=sys.stderr)
        return 1
    try:
        env = environment.prepare(options, environment.REPO / "tests" / "requirements.txt")
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    selection = [] if options.all else ["-m", "not long"]
    results = {folder: run_folder(env, folder, [*selection, *arguments]) for folder in options.only}
    failed = [folder for folder, (code, _) in results.items() if code not in (0, NO_TESTS if arguments else 0)]
    total = sum((counts for _, counts in results.values()), Counter())
    bad = total["failures"] + total["errors"]
    print(
        f"\n{total['tests'] - bad - total['skipped']} passed, {bad} failed, {total['skipped']} skipped"
        + (f"; failed: {', '.join(f'tests/{folder}' for folder in failed)}" if failed else "")
    )
    return 1 if failed or not total["tests"] else 0


if __name__ == "__main__":
    sys.exit(main())
