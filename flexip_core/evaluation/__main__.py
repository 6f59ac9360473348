"""python -m flexip_core.evaluation generate BENCHMARK FOLDER --server URL ...    pictures, by running ComfyUI servers
python -m flexip_core.evaluation score FOLDER --weights DIR ...                scores of a folder of pictures, also of another method's
python -m flexip_core.evaluation score --mini-world conflict --to FILE         scores of the small world that comes with the pack
python -m flexip_core.evaluation compare SCORES [SCORES ...] --to DIR          tables beside the paper's, and measures of the gate
python -m flexip_core.evaluation plot SCORES [SCORES ...] --to DIR             figures
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.parse import read_json
from ..files.weights import write_atomically
from ..measuring import scores_file
from ..measuring.scores_file import Scores
from ..run.schedule import parse_numbers
from . import benchmark, control, figures, generate, instruments, published, statistics, tables

SCORES = "scores.json"
MOST_GATES = 10_000
SHEET_CASES = 8

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.command(options)
    except (ValueError, RuntimeError, OSError) as error:  # a ServerError is a RuntimeError
        logging.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logging.error("Stopped; the same command continues.")
        return 130
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flexip_core.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    one = commands.add_parser(
        "generate", help="make a benchmark's pictures on running ComfyUI servers; continues where it stopped"
    )
    one.add_argument("benchmark", type=Path, help="DreamBench, DreamBench++, or prompts.txt and a folder per subject")
    one.add_argument("folder", type=Path, help="where the pictures are written")
    one.add_argument(
        "--server", action="append", required=True, metavar="URL", help="of a running ComfyUI; several share the work"
    )
    one.add_argument("--workflow", type=Path, help="a file saved by ComfyUI (default: the one that comes with this)")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, such as checkpoint=sd15.safetensors, steps=30 or LoadFlexIPAdapters.clip_vision=...",
    )
    one.add_argument("--gates", default="", help="such as 0, 0.5, 1 (default: the workflow's own gate)")
    one.add_argument(
        "--strengths",
        default="",
        help="sweep the strength instead, as an IP-Adapter's scale: at gate 1, where one adapter acts alone",
    )
    one.add_argument(
        "--refine",
        type=Path,
        metavar="SCORES",
        help="instead of --gates: 21 points around the largest jump of these scores",
    )
    one.add_argument("--images", type=int, default=1, help="per prompt (DreamBench: 4)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--reference", default=0, help="number of the subject's picture, or all for each in turn (default: 0)"
    )
    one.add_argument("--at-once", type=int, help="most gates in one prompt, where memory is short")
    one.add_argument("--models", type=Path, help="the server's models folder, to note the files' hashes")
    one.add_argument("--method", default="FlexIP", help="what the pictures are called in tables")
    one.add_argument("--quick", action="store_true", help="4 subjects and 5 prompts of each only")
    one.add_argument("--dry-run", action="store_true", help="only say how many pictures there are to make")
    one.set_defaults(command=generate_pictures)

    one = commands.add_parser(
        "score", help="score a folder of pictures; what cannot be measured says which file it lacks"
    )
    one.add_argument(
        "folder", type=Path, nargs="?", help="of pictures, ours or any method's (src_image, text, tgt_image)"
    )
    one.add_argument(
        "--benchmark",
        type=Path,
        help="the benchmark that the pictures show; without it, the folder's own references and prompts are used",
    )
    one.add_argument(
        "--weights", type=Path, action="append", default=[], metavar="DIR", help="folders with CLIP, DINO and the rest"
    )
    one.add_argument(
        "--use",
        action="append",
        default=[],
        metavar="ROLE=FILE",
        help=f"take this file, standard or not; roles: {', '.join(instruments.ROLES)}",
    )
    one.add_argument("--columns", help="only these, with commas between them")
    one.add_argument("--images", type=int, default=1, help="per prompt, with --benchmark")
    one.add_argument("--quick", action="store_true", help="4 subjects and 5 prompts of each only, with --benchmark")
    one.add_argument("--method", help="what the pictures are called in tables (default: what the folder says)")
    one.add_argument("--device", help="default: the GPU, if there is one")
    one.add_argument("--to", type=Path, metavar="FILE", help=f"default: {SCORES} in the folder")
    one.add_argument(
        "--mini-world",
        choices=("conflict", "omit"),
        help="sweep the small world: the prompt names another place than the reference's, or none",
    )
    one.add_argument(
        "--run",
        default="flexip",
        help="of the mini world: flexip or ip, which come with the pack, or a trained one's name with --trained",
    )
    one.add_argument("--trained", type=Path, metavar="DIR", help="the folder of scripts/mini_world.py")
    one.add_argument("--run-seed", type=int, default=1, help="the trained run's seed")
    one.add_argument("--cases", type=int, default=64)
    one.add_argument("--refine", action="store_true", help="of the mini world: 21 points more around the largest jump")
    one.set_defaults(command=score)

    one = commands.add_parser("compare", help="tables and gate measures of one or more files of scores")
    one.add_argument("scores", type=Path, nargs="+")
    one.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="METHOD=GATE",
        help="the gate at which a swept method stands in the table",
    )
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one.set_defaults(command=compare)

    one = commands.add_parser("plot", help="figures of one or more files of scores")
    one.add_argument("scores", type=Path, nargs="+")
    one.add_argument(
        "--pictures",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="the folder that was scored, for a sheet of its gates; of several a sheet with the methods side by side",
    )
    one.add_argument(
        "--gate", action="append", default=[], metavar="METHOD=GATE", help="at which a swept method is on that sheet"
    )
    one.add_argument("--subjects", action="store_true", help="a thin line for each subject, too")
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one.set_defaults(command=plot)
    return parser.parse_args(arguments)


def generate_pictures(options: argparse.Namespace) -> None:
    wanted = benchmark.read_benchmark(options.benchmark)
    if sum(map(bool, (options.gates, options.strengths, options.refine))) > 1:
        raise ValueError("--gates, --strengths and --refine exclude each other; choose one.")
    knob, values = "gate", parse_numbers(options.gates, 0.0, 1.0, "--gates", MOST_GATES)
    if options.strengths:
        knob, values = "strength", parse_numbers(options.strengths, 0.0, 5.0, "--strengths", MOST_GATES)
    if options.refine:
        swept = scores_file.read(options.refine)
        knob, values = swept.header.get("knob", "gate"), control.refinement(swept)
    outcome = generate.generate(
        wanted.quick() if options.quick else wanted,
        options.folder,
        options.server,
        options.workflow,
        values,
        options.images,
        options.seed,
        _pairs(options.set, "--set"),
        knob=knob,
        reference=options.reference,
        at_once=options.at_once,
        models=options.models,
        method=options.method,
        dry_run=options.dry_run,
    )
    log.info("%s: %d pictures made, %d were there.", options.folder, outcome.made, outcome.kept)


def score(options: argparse.Namespace) -> None:
    if options.mini_world:
        if options.to is None:
            raise ValueError("--mini-world has no folder of its own; use --to to say where the scores go.")
        found, path = mini_world_scores(options), options.to
    else:
        if options.folder is None:
            raise ValueError("Name the folder of pictures to score, or --mini-world.")
        found, path = picture_scores(options), options.to or options.folder / SCORES
    scores_file.write(path, found)
    log.info("%s: %d pictures.", path, len(found.rows))
    for column in found.columns:
        log.info("%s", f"{column}: {statistics.summarize(found.rows, column).mean:.3f} ({found.columns[column]})")
    for column, why in found.missing.items():
        log.info("%s not available: %s", column, why)


def picture_scores(options: argparse.Namespace) -> Scores:
    if options.benchmark:
        wanted = benchmark.read_benchmark(options.benchmark)
        wanted = wanted.quick() if options.quick else wanted
        pictures = benchmark.find_pictures(wanted, options.folder, options.images)
    else:
        wanted, pictures = benchmark.read_outputs(options.folder)
    tools = instruments.find(options.weights, _pairs(options.use, "--use"))
    if options.columns:
        tools = tools.only(name.strip() for name in options.columns.split(","))
    if not tools.columns:
        raise ValueError("Nothing can be measured.\n" + "\n".join(tools.missing.values()))
    with generate.progress_bar(0, len(pictures), options.folder.name) as moved:
        measured = tools.score(pictures, on_progress=moved, device=options.device)
    header = _run_header(options.folder, wanted)
    if calibration := _calibration(tools, wanted, options.device):
        header[tables.CALIBRATION] = calibration
    method = options.method or header.get("method") or options.folder.resolve().name
    return Scores(method, header, tools.columns, tools.missing, measured.rows, measured.features)


def mini_world_scores(options: argparse.Namespace) -> Scores:
    if importlib.util.find_spec("..mini_world.scored", __package__) is None:
        raise ValueError(
            "The installed pack has the small world's models, but not what measures them; run this command in a clone of "
            "the repository that pyproject.toml names."
        )
    from ..mini_world import files, runs, scored, task  # needs diffusers

    folder = options.trained or files.WEIGHTS
    if options.trained:
        run, adapters = options.run, runs.adapters_file(options.trained, options.run, options.run_seed)
    elif options.run in files.SHIPPED:
        run, file = files.SHIPPED[options.run]
        adapters = folder / file
    else:
        raise ValueError(
            f"The pack brings {' and '.join(files.SHIPPED)}, not {options.run!r}; name a --trained folder for others."
        )
    setup = replace(runs.setup_for(options.run_seed), cases=options.cases)
    base, tools = task.load_world(folder), task.load_instruments(folder)
    swept = scored.score_run(base, tools, adapters, run, setup, options.mini_world)
    if options.refine:
        fine = replace(setup, gates=control.refinement(swept))
        swept = control.refined(swept, scored.score_run(base, tools, adapters, run, fine, options.mini_world))
    return replace(swept, method=options.method or options.run)


def compare(options: argparse.Namespace) -> None:
    runs = [scores_file.read(path) for path in options.scores]
    for path in tables.write_tables(options.to, tables.compare(runs, _gates(options))):
        log.info("%s", path)
    swept = [run for run in runs if len(run.gates) >= 3]
    if swept:
        found = [control.compare(swept[0], other) for other in swept[1:]] or [control.control(swept[0])]
        text = "\n\n".join(control.markdown(result) for result in found) + "\n"
        write_atomically(options.to / "gate_measures.md", text.encode())
        data = [control.to_json(result) for result in found]
        write_atomically(options.to / "gate_measures.json", json.dumps(data, indent=1).encode())
        log.info("%s", options.to / "gate_measures.md")


def plot(options: argparse.Namespace) -> None:
    runs = [scores_file.read(path) for path in options.scores]
    swept, fixed = [run for run in runs if run.gates], [run for run in runs if not run.gates]
    columns = [column for column in runs[0].columns if all(column in run.columns for run in runs)]
    made = []
    for kind in ("svg", "png"):
        if swept:
            path = options.to / f"gate_curves.{kind}"
            figures.gate_curves(swept, path, columns, options.subjects)
            made.append(path)
        if {control.PRIMARY.text, control.PRIMARY.subject} <= set(columns):
            path = options.to / f"front.{kind}"
            figures.front(swept, path, fixed, _published_points(runs))
            made.append(path)
    if len(options.pictures) == 1:
        path = options.to / "gate_sheet.png"
        figures.gate_sheet(*sheet_of(options.pictures[0]), path)
        made.append(path)
    elif options.pictures:
        path = options.to / "method_sheet.png"
        figures.picture_sheet(*sheet_of_methods(options.pictures, _gates(options)), path)
        made.append(path)
    for path in made:
        log.info("%s", path)


def sheet_of(folder: Path) -> tuple[list[figures.SheetRow], list[float]]:
    """Each subject's first picture at every gate, each of another of its prompts, as far as there are several."""
    swept = [picture for picture in benchmark.read_outputs(folder)[1] if picture.gate is not None]
    if not swept:
        raise ValueError(f"{folder} has no sweep of gates to lay side by side.")
    gates = sorted({picture.gate for picture in swept})
    by_key = {(*_key(picture), picture.gate): picture for picture in swept}
    rows = []
    for key in _shown({_key(picture) for picture in swept}):
        pictures = [by_key[(*key, gate)] for gate in gates]
        rows.append(_row(pictures[0], [picture.path for picture in pictures]))
    return rows, gates


def sheet_of_methods(folders: Sequence[Path], gates: Mapping[str, float]) -> tuple[list[figures.SheetRow], list[str]]:
    """The same cases by each method, a row per subject and prompt. `gates`: method -> gate; without one the middle of its sweep."""
    found: dict[str, dict[tuple, Any]] = {}
    for folder in folders:
        wanted, pictures = benchmark.read_outputs(folder)
        method = str(_run_header(folder, wanted).get("method") or folder.resolve().name)
        if method in found:
            raise ValueError(f"Two folders are called {method}; give one of them another method in its run.json.")
        values = sorted({picture.gate for picture in pictures if picture.gate is not None})
        gate = tables.nearest_gate(method, values, gates.get(method))
        label = method if gate is None else f"{method} ({gate:g})"
        found[label] = {_key(picture): picture for picture in pictures if picture.gate == gate}
    common = set.intersection(*(set(pictures) for pictures in found.values()))
    if not common:
        raise ValueError("The folders have no subject and prompt in common to lay side by side.")
    rows = [
        _row(next(iter(found.values()))[key], [pictures[key].path for pictures in found.values()])
        for key in _shown(common)
    ]
    return rows, list(found)


def _key(picture: benchmark.Picture) -> tuple[str, int, int]:
    return picture.case.subject.name, picture.case.number, picture.image


def _row(picture: benchmark.Picture, paths: Sequence[Path]) -> figures.SheetRow:
    return figures.SheetRow(picture.case.prompt, picture.case.subject.references[0], paths)


def _shown(keys: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """One of each subject, each with the next prompt, until the sheet is full; the same whatever the order of `keys`."""
    by_subject: dict[str, list[tuple[str, int, int]]] = {}
    for key in sorted(keys):
        by_subject.setdefault(key[0], []).append(key)
    firsts = {subject: [key for key in some if key[2] == some[0][2]] for subject, some in by_subject.items()}
    rounds = max(map(len, firsts.values()), default=0)
    shown = [
        some[(number + turn) % len(some)]
        for turn in range(rounds)
        for number, some in enumerate(firsts.values())
        if turn < len(some)
    ]
    return shown[:SHEET_CASES]


def _published_points(runs: Sequence[Scores]) -> list[tuple[str, float, float]]:
    if any(str(run.header.get("benchmark", "")).startswith(tables.MINI_WORLD) for run in runs):
        return []  # another world: its scores say nothing about photographs
    text, subject = control.PRIMARY.text, control.PRIMARY.subject
    if any(len(published.comparable(run.columns, (text, subject))) < 2 for run in runs):
        return []  # files that the published scores were not made with
    return [(name, row[text], row[subject]) for name, row in published.table1().items()]


def _run_header(folder: Path, wanted: benchmark.Benchmark) -> dict[str, Any]:
    """What `generate` wrote there; of another method's folder only what can be seen."""
    path = folder / generate.run_file.NAME
    if not path.is_file():
        return {"benchmark": wanted.name, "cases": len(wanted.cases)}
    try:
        return {**read_json(path), "benchmark": wanted.name, "cases": len(wanted.cases)}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; remove it to score the pictures without it.") from None


def _calibration(tools: instruments.Instruments, wanted: benchmark.Benchmark, device: str | None) -> dict[str, float]:
    """Real pictures against other real ones of the same subject, where subjects have more than one."""
    several = [subject for subject in wanted.subjects if len(subject.references) > 1]
    if not several or not any(instruments.COLUMNS[name].kind == "identity" for name in tools.columns):
        return {}
    found = tools.real_features(several, device=device)
    return {column: statistics.real_against_real(features).mean for column, features in found.items()}


def _gates(options: argparse.Namespace) -> dict[str, float]:
    return {name: _number(text, "--gate") for name, text in _pairs(options.gate, "--gate").items()}


def _pairs(texts: Iterable[str], option: str) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"{option} {wrong[0]} has no value; write {option} {wrong[0]}=...")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} wants a number, got {text!r}.") from None


if __name__ == "__main__":
    sys.exit(main())
