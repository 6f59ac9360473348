#!/usr/bin/env python3
"""The test suite in the demo's environment. Arguments that are not listed here go to pytest.

python3 scripts/test.py [--fast | --all] [--only core server] [--comfyui-versions all] [-k gate ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the portable build's Python leaves this out
import environment

TESTS = environment.REPO / "tests"
# One pytest each: core must work without ComfyUI, and ComfyUI cannot be imported twice with different options.
FOLDERS = ("core", "packaging", "comfy", "server")
# What is run with other versions of ComfyUI than the environment's own, as far as it needs no browser; () is all.
WITH_OTHERS = {"comfy": (), "server": ("test_control.py", "test_errors.py", "test_http.py", "test_templates.py")}
# Two processes, each file in one of them, in the order of their names; one that dies would only die again on the same
# test. tests/server shares one server instead.
IN_PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
# Only with --comfyui-versions are these run on the oldest ComfyUI, too: long, and about our arithmetic, not core's API.
LONG_FILES = (
    "test_compile.py",
    "test_cost.py",
    "test_demo_tradeoff.py",
    "test_depth_runs.py",
    "test_many_references.py",
    "test_space.py",
    "test_time.py",
    "test_training_example.py",
    "test_training_sd_vs_comfy.py",
)
# --fast leaves out of tests/core what is fuzzed and what trains, and has of tests/comfy what compares a run with formulas.
NOT_FAST = (
    "core/evaluation/test_evaluation_commands.py",
    "core/files/test_check_weights.py",
    "core/files/test_fuzz_files.py",
    "core/files/test_fuzz_pickles.py",
    "core/characters/test_characters_training.py",
    "core/mini_world",
    "core/training/test_training_background.py",
    "core/training/test_training_loop.py",
    "core/training/test_training_memory.py",
    "core/training/test_training_ranks.py",
    "core/training/test_training_resume.py",
    "core/training/test_training_sd.py",
    "core/untrained/test_mini_models_script.py",
)
ORACLES = ("test_conditioning.py", "test_gated_unet.py", "test_guiders.py", "test_life_cycle.py")
NO_TESTS = 5  # pytest's exit code when nothing was selected
COUNTS = ("tests", "failures", "errors", "skipped")


class Run(NamedTuple):
    """One pytest on one folder of tests/."""

    folder: str
    version: str  # of ComfyUI; empty is the environment's own
    files: tuple[str, ...]  # of the folder; none is all
    arguments: list[str]

    def __str__(self) -> str:
        return f"tests/{self.folder}" + (f" with ComfyUI {self.version}" if self.version else "")


def plan(options: argparse.Namespace, owned: bool) -> list[Run]:
    """With --fast a part of core and comfy. Else everything with the environment's ComfyUI, then what needs no browser with others:
    those that are asked for, or, if the environment is our `owned` one, a part on the oldest that is supported."""
    if options.fast:
        fast = [*_select(["not long"]), "--hypothesis-profile=fast"]
        left_out = [f"--ignore={TESTS / name}" for name in NOT_FAST]
        return [Run("core", "", (), [*fast, *left_out]), Run("comfy", "", ORACLES, fast)]
    asked, newest = options.comfyui_versions, environment.COMFYUI_VERSION if owned else ""
    if "all" in asked:
        asked = environment.COMFYUI_VERSIONS
    versions = asked or ([environment.COMFYUI_OLDEST] if owned else [])
    marked = [] if options.all else ["not long"]
    marked_there = ["not page"] if options.all and asked else ["not long", "not page"]
    profile = ["--hypothesis-profile=thorough"] if options.all else []
    left_out = [] if asked else [f"--ignore={TESTS / 'comfy' / name}" for name in LONG_FILES]
    runs = [Run(folder, "", (), [*_select(marked), *profile]) for folder in options.only]
    for version in environment.COMFYUI_VERSIONS:
        if version in versions and version != newest:
            for folder, files in WITH_OTHERS.items():
                if folder in options.only and (asked or folder == "comfy"):  # a server's start and runs take minutes
                    runs.append(Run(folder, version, files, [*_select(marked_there), *left_out]))
    return runs


def _select(marked: list[str]) -> list[str]:
    return ["-m", " and ".join(marked)] if marked else []


def start(
    run: Run, python: Path, comfyui: Path, logs: Path, arguments: list[str], beside: bool = False
) -> tuple[int, Counter[str]]:
    """pytest's exit code and its counts. One `beside` another shows what it said when it is through."""
    name = f"tests-{run.folder}{f'-{run.version}' if run.version else ''}"
    report, said = logs / f"{name}.xml", logs / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-c", TESTS / "pytest.ini", f"--junitxml={report}"]
    command += [TESTS / run.folder / name for name in run.files or ("",)]
    command += [*(() if run.folder == "server" else IN_PARALLEL), *run.arguments, *arguments]
    variables = {**os.environ, "COMFYUI_TREE": str(comfyui), "OMP_NUM_THREADS": "1"}
    if beside:
        with said.open("w") as log:
            code = subprocess.run(
                list(map(str, command)), cwd=environment.REPO, env=variables, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        print(f"\n== {run}\n{said.read_text(errors='replace')}", flush=True)
    else:
        print(f"\n== {run}", flush=True)
        code = subprocess.run(list(map(str, command)), cwd=environment.REPO, env=variables).returncode
    suites = ElementTree.parse(report).getroot().iter("testsuite") if report.is_file() else []
    return code, sum((Counter({key: int(suite.get(key, 0)) for key in COUNTS}) for suite in suites), Counter())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    environment.add_arguments(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--fast", action="store_true", help="a part that answers in two minutes; the options below have no effect on it"
    )
    amount.add_argument(
        "--all", action="store_true", help="the tests marked long, too, and more examples of each property"
    )
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=FOLDERS, help="these folders of tests/")
    parser.add_argument(
        "--comfyui-versions",
        nargs="+",
        choices=("all", *environment.COMFYUI_VERSIONS),
        default=(),
        help="after the normal run, tests/comfy and what of tests/server needs no browser with these, too, in the same "
        f"environment; without it only a part, with {environment.COMFYUI_OLDEST}",
    )
    return parser


def main() -> int:
    options, arguments = make_parser().parse_known_args()
    if os.environ.get("CI") and not environment.find_browser():
        print(f"{environment.NO_BROWSER} In CI the browser tests must run.", file=sys.stderr)
        return 1
    try:
        env = environment.prepare(options, environment.REPO / "tests" / "requirements.txt")
        runs = plan(options, env.owned)
        trees = {run.version: environment.get_comfyui(env.home, env.python, run.version) for run in runs if run.version}
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    trees[""] = env.comfyui

    def one_after_the_other(lane: list[Run], beside: bool = False) -> list[tuple[int, Counter[str]]]:
        return [start(run, env.python, trees[run.version], env.home / "logs", arguments, beside) for run in lane]

    # tests/server has one process that mostly waits for the page: it runs beside the others.
    served = [run for run in runs if run.folder == "server" and not run.version]
    rest = [run for run in runs if run not in served]
    with ThreadPoolExecutor(1) as second:
        pages = second.submit(one_after_the_other, served, beside=bool(rest))
        results = one_after_the_other(rest) + pages.result()
    runs = rest + served
    failed = [run for run, (code, _) in zip(runs, results) if code not in (0, NO_TESTS if arguments else 0)]
    total = sum((counts for _, counts in results), Counter())
    bad = total["failures"] + total["errors"]
    print(
        f"\n{total['tests'] - bad - total['skipped']} passed, {bad} failed, {total['skipped']} skipped"
        + (f"; failed: {', '.join(map(str, failed))}" if failed else "")
    )
    return 1 if failed or not total["tests"] else 0


if __name__ == "__main__":
    sys.exit(main())
