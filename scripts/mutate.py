#!/usr/bin/env python3
"""Do the tests notice? Changes the pack in one place after another, in a copy, and shows that a test fails for each change.

python scripts/mutate.py [--only WORDS] [--folder core comfy]     (with a Python that has the tests' requirements)

Changes for tests/comfy need COMFYUI_TREE in the environment, ComfyUI's folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
TESTS_FAILED = 1  # pytest's exit code; 2 to 5 would be a change that no test ever saw


class Mutation(NamedTuple):
    what: str
    file: str
    old: str  # stands there exactly once
    new: str
    tests: tuple[str, ...]


RUN, LAYOUT, PROJECTION, GATE = (
    f"flexip_core/{name}.py" for name in ("run/run", "run/layout", "run/projection", "network/gate")
)
ORACLE = ("tests/core/run/test_oracle.py",)
PARTS = ("tests/core/run/test_run_parts.py",)
MUTATIONS = (
    Mutation(
        "kept K and V of a reference serve as those of the null reference",
        PROJECTION,
        "return self.adapter, self.null, self.dtype,",
        "return self.adapter, self.dtype,",
        ORACLE,
    ),
    Mutation(
        "a conditioning of another node gets the reference instead of the null reference",
        RUN,
        "null=True",
        "null=False",
        ORACLE,
    ),
    Mutation(
        "a sweep's first strength for all rows",
        LAYOUT,
        "strengths[row.item % len(strengths)]",
        "strengths[0]",
        ORACLE,
    ),
    Mutation(
        "copies of a sweep get references by row, not by latent",
        "flexip_core/run/chain.py",
        "return item % self.latents",
        "return item",
        ORACLE,
    ),
    Mutation(
        "no further room for K and V where the gate changes",
        RUN,
        "return 2 * most if self.changes else most",
        "return most",
        (*ORACLE, "tests/comfy/test_life_cycle.py::test_comfyui_makes_room_for_k_and_v_of_every_row"),
    ),
    Mutation("the window's end is left out", RUN, "self.window[1] <= sigma", "self.window[1] < sigma", ORACLE),
    Mutation("the window's start is left out", RUN, "sigma <= self.window[0]", "sigma < self.window[0]", ORACLE),
    Mutation(
        "factors of rows in half precision",
        GATE,
        "torch.tensor(factors, dtype=torch.float32,",
        "torch.tensor(factors, dtype=t.dtype,",
        ORACLE,
    ),
    Mutation("gates of a kept layout are stale", RUN, "if layout.gates != gates:", "if not layout.gates:", ORACLE),
    Mutation(
        "the first row's mask for all rows",
        LAYOUT,
        "not (maps[1:] == maps[:1]).all() else",
        "False else",
        ORACLE,
    ),
    Mutation(
        "a prompt's own gate is not read",
        PROJECTION,
        "else (own.gates, own.strength)",
        "else (link.gates, own.strength)",
        ORACLE,
    ),
    Mutation(
        "a prompt's own strength is not read",
        PROJECTION,
        "else (own.gates, own.strength)",
        "else (own.gates, 1.0)",
        ORACLE,
    ),
    Mutation(
        "a prompt's own reference is not read",
        PROJECTION,
        "link.reference if own is None or own.reference is None else own.reference",
        "link.reference",
        ORACLE,
    ),
    Mutation(
        "the negative reference is not read",
        "flexip_core/run/reference.py",
        "if null and self.negative is not None:",
        "if False:",
        ORACLE,
    ),
    Mutation(
        "the weight of a reference per batch item or region is not read",
        "flexip_core/run/reference.py",
        'return weights[latent % len(weights)] if mode == "one per batch item" else 1.0',
        "return 1.0",
        ORACLE,
    ),
    Mutation(
        "mode tokens: the gate is not folded into K",
        GATE,
        "k = scale(branch.k, tuple(of_gate(gate) for gate in gates))",
        "k = branch.k",
        ORACLE,
    ),
    Mutation(
        "mode outputs: both adapters with the first one's depth",
        GATE,
        "(personalization, _one_minus_gate, depth[1]),\n    ):\n        if branch is None or not factor:",
        "(personalization, _one_minus_gate, depth[0]),\n    ):\n        if branch is None or not factor:",
        ORACLE,
    ),
    Mutation(
        "one mask object stands twice in the branches that torch.compile sees",
        GATE,
        "None if t is None else t[:]",
        "t",
        PARTS,
    ),
    Mutation(
        "the softmax of a head of double width is scaled by that width",
        "flexip_core/network/attention.py",
        "scale = q.shape[-1] ** -0.5",
        "scale = (2 * q.shape[-1]) ** -0.5",
        ORACLE,
    ),
    Mutation(
        "a mask is laid on a block's grid by its first cells",
        "flexip_core/run/masks.py",
        "F.avg_pool2d(maps.unsqueeze(1), side, ceil_mode=True).squeeze(1)",
        "maps[:, ::side, ::side]",
        ORACLE,
    ),
    Mutation(
        "a block is not put under the two-part key, too",
        "nodes/runtime.py",
        "            model.set_model_attn2_replace(patch, kind, number)\n",
        "            pass\n",
        ("tests/comfy/test_neighbours.py",),
    ),
    Mutation(
        "no room is asked for K and V",
        "nodes/runtime.py",
        "if run is not None and (bytes_per_row := run.bytes_per_row()):",
        "if run is not None and not (bytes_per_row := run.bytes_per_row()):",
        ("tests/comfy/test_life_cycle.py::test_comfyui_makes_room_for_k_and_v_of_every_row",),
    ),
    Mutation(
        "tags also stay in the conditionings of the next run",
        "nodes/runtime.py",
        'entry["model_conds"] = {**entry["model_conds"], tags.TAG: tags.tag(number, batch)}',
        'entry["model_conds"][tags.TAG] = tags.tag(number, batch)',
        ("tests/comfy/test_life_cycle.py", "tests/comfy/test_conditioning.py"),
    ),
    Mutation(
        "the run is not dropped when it fails",
        "nodes/runtime.py",
        "        options.pop(RUN, None)",
        "        pass",
        ("tests/comfy/test_life_cycle.py",),
    ),
    Mutation(
        "a prompt's own reference goes to the first link of the chain",
        "nodes/runtime.py",
        "for position in acting[-1:]",
        "for position in acting[:1]",
        ("tests/comfy/test_conditioning.py",),
    ),
    Mutation(
        "K and V in the model's own type where it calculates in another",
        "nodes/runtime.py",
        'model.get_model_object("manual_cast_dtype") or model.model.get_dtype()',
        "model.model.get_dtype()",
        ("tests/comfy/test_numerics.py::test_the_dtype_that_a_later_node_computes_in_is_followed",),
    ),
)


def copy_of_the_pack(folder: Path) -> None:
    """The files as they lie in the working tree, those that git knows or does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)


def tested(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """(pytest's exit code, its last line): one pytest per folder of tests/, up to the first failure."""
    last = ""
    for part in sorted({name.split("/")[1] for name in tests}):
        chosen = [name for name in tests if name.split("/")[1] == part]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "tests/pytest.ini",
            "-q",
            "-x",
            "--tb=no",
            "-p",
            "no:cacheprovider",
        ]
        # the same examples each time, so that what is killed once is always killed
        command += ["--hypothesis-profile=mutate", "--hypothesis-seed=0", "-m", "not long", *chosen]
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        last = (failed or done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
        if done.returncode:
            return done.returncode, last
    return 0, last


def killed_by(folder: Path, mutation: Mutation) -> str | None:
    """The test that noticed, or None."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times instead of once.")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, last = tested(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    return last.removeprefix("FAILED ").split(" - ")[0] if code == TESTS_FAILED else None


def chosen(options: argparse.Namespace) -> list[Mutation]:
    out = []
    for mutation in MUTATIONS:
        tests = tuple(name for name in mutation.tests if name.split("/")[1] in options.folder)
        if tests and options.only in f"{mutation.what} {mutation.file}":
            out.append(mutation._replace(tests=tests))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="changes whose description or file has these words")
    parser.add_argument("--folder", nargs="+", default=["core"], choices=["core", "comfy"], help="of tests/; core")
    options = parser.parse_args()
    survivors = 0
    mutations = chosen(options)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy_of_the_pack(folder)
        code, last = tested(folder, tuple(dict.fromkeys(name for mutation in mutations for name in mutation.tests)))
        if code:
            print(f"Without any change the tests already fail: {last}")
            return 2
        for mutation in mutations:
            test = killed_by(folder, mutation)
            survivors += test is None
            print(
                f"{'killed  ' if test else 'SURVIVES'}  {mutation.what} ({mutation.file}){f': {test}' if test else ''}",
                flush=True,
            )
    print(f"{len(mutations) - survivors} of {len(mutations)} changes are noticed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
