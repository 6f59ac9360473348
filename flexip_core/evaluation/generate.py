"""Makes the pictures of a benchmark on one or more running ComfyUI servers, and continues where it was stopped.

<folder>/run.json                                   what they were made from
<folder>/gate_0.50/{src_image,text,tgt_image}/      one such tree per gate; without gates they lie in <folder> itself
<folder>/references/                                the subjects' pictures, once each; src_image holds links to them

One prompt makes a case at all gates, from the same noise. A sweep of strengths, as for an IP-Adapter, lies in the same
folders: gate_0.50 is then strength 0.5, and "knob" in run.json says so; its gate is 1, or what the settings give.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..files.weights import write_atomically
from . import run_file
from .benchmark import Benchmark, Case, picture_name
from .client import PromptError, ServerError
from .crew import Server, as_crew, reachable, share
from .recipe import DEFAULT, REPORT_NODE, Recipe, read_recipe

KNOBS = {"gate": 1.0, "strength": 5.0}  # and their largest values
MOST = 64  # values in one prompt, FlexIPSampler's limit
IN_TURN = "all"  # references
GATE, WHOLE = (
    "ApplyFlexIPGate.gate",
    1.0,
)  # of a strength sweep: one adapter alone, so that strength 1 is its own scale 1
PNG_END = b"IEND\xaeB`\x82"
UPLOADS = "flexip_evaluation"  # in the server's input folder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One prompt: a case, an image of it, and the gates of it that are sampled together."""

    case: Case
    image: int
    values: tuple[float, ...]  # none: the workflow's own gate
    seed: int
    reference: Path

    @property
    def name(self) -> str:
        return picture_name(self.case, self.image)


@dataclass(frozen=True)
class Outcome:
    made: int  # pictures
    kept: int


def generate(
    benchmark: Benchmark,
    folder: str | Path,
    servers: Sequence[str],
    workflow: str | Path | None = None,
    gates: Sequence[float] = (),
    images: int = 1,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    *,
    knob: str = "gate",
    reference: int | str = 0,
    at_once: int | None = None,
    models: str | Path | None = None,
    method: str = "FlexIP",
    dry_run: bool = False,
) -> Outcome:
    """`workflow` and `settings`: see recipe.py. `gates`: values of the knob, none for the workflow's own gate.
    `reference`: number of the subject's picture, or "all" for each in turn. `at_once`: most gates in one prompt, where memory
    is short. `models`: a server's models folder, to hash the files. `on_progress` gets pictures done and in all. `dry_run`: only
    say how many there are to make.

    What is there already is kept. ValueError: the request, or a folder of another run. ServerError: no server is left.
    """
    folder, models = Path(folder), Path(models) if models else None
    values, reference = check_values(gates, knob), check_reference(reference)
    if images < 1 or (at_once is not None and at_once < 1):
        raise ValueError("The number of images per prompt, and of gates at once, must be at least 1.")
    if not benchmark.cases:
        raise ValueError(f"The benchmark {benchmark.name} has no cases.")
    crew = as_crew(servers)
    settings = dict(settings or {})
    if knob == "strength" and values:
        settings.setdefault(GATE, WHOLE)
    recipe = read_recipe(workflow, settings, lambda: reachable(crew)[0].client.object_info())
    title = Path(workflow or DEFAULT).name
    head = run_file.header(benchmark, recipe, method, title, knob, values, images, seed, reference, models)
    head = run_file.joined(folder, head)
    # of the whole run, which may be larger than what was asked for
    jobs = list(all_jobs(benchmark, tuple(head[f"{knob}s"]), head["images"], seed, reference, at_once))
    missing = [job for job in jobs if not all(is_complete(folder, job, value) for value in job.values or (None,))]
    total, left = sum(map(_pictures, jobs)), sum(map(_pictures, missing))
    logging.info(
        "%s: %d cases x %d images x %d %ss = %d pictures, %d of them to make.",
        benchmark.name, len(benchmark.cases), head["images"], max(1, len(head[f"{knob}s"])), knob, total, left,
    )  # fmt: skip
    if dry_run:
        return Outcome(0, total - left)
    if missing:
        crew = reachable(crew)
        head = run_file.with_servers(head, [server.stats for server in crew])
    run_file.write(folder, head)
    if missing:
        bar = progress_bar(total - left, total, method) if on_progress is None else contextlib.nullcontext(on_progress)
        with bar as progress:
            _make_all(missing, total, folder, crew, recipe, head, models, progress)
    return Outcome(left, total - left)


def _make_all(
    jobs: Sequence[Job],
    total: int,
    folder: Path,
    crew: Sequence[Server],
    recipe: Recipe,
    head: dict[str, Any],
    models: Path | None,
    progress: Progress,
) -> None:
    copies = {reference: _keep(folder, reference) for reference in {job.reference for job in jobs}}
    kept = done = total - sum(map(_pictures, jobs))
    header, begin = head, time.monotonic()

    def make(server: Server, job: Job) -> str:
        pictures, report = _make(server, recipe, head["knob"], job)
        for value, data in zip(job.values or (None,), pictures):
            _write(tree_of(folder, value), job, data, copies[job.reference])
        return report

    def finished(job: Job, report: str) -> None:
        nonlocal done, header
        if done == kept:  # the first, so that nobody finds out tomorrow that it takes a week
            each = (time.monotonic() - begin) / _pictures(job)
            left = timedelta(seconds=round(each * (total - kept) / len(crew)))
            logging.info("%.1f s per picture on a server, so about %s in all (h:mm:ss).", each, left)
        if report and header["report"] is None:
            header = run_file.with_report(header, report, models)
            run_file.write(folder, header)
        done += _pictures(job)
        progress(done, total)

    progress(done, total)
    try:
        share(jobs, crew, make, finished)
    except ServerError as error:
        raise ServerError(
            f"No server is left; {done} of {total} pictures are there, and the same command goes on from them.\n{error}"
        ) from None


def check_values(values: Sequence[float], knob: str) -> tuple[float, ...]:
    """In rising order, each once."""
    if knob not in KNOBS:
        raise ValueError(f"The knob must be one of {', '.join(KNOBS)}, got {knob!r}.")
    numbers = tuple(sorted({round(float(value), 4) for value in values}))
    if not all(0.0 <= value <= KNOBS[knob] for value in numbers):
        raise ValueError(f"A {knob} lies between 0 and {KNOBS[knob]:g}, got {', '.join(f'{v:g}' for v in numbers)}.")
    return numbers


def all_jobs(
    benchmark: Benchmark, values: tuple[float, ...], images: int, seed: int, reference: int | str, at_once: int | None
) -> Iterator[Job]:
    size = min(at_once or MOST, MOST)
    parts = [values[start : start + size] for start in range(0, len(values), size)] or [()]
    for case in benchmark.cases:
        for image in range(images):
            name = picture_name(case, image)
            for part in parts:
                yield Job(case, image, part, seed_of(seed, name), reference_of(case, image, reference))


def seed_of(seed: int, name: str) -> int:
    """Its own for each picture, and the same in every method, at every gate, and in a part of the benchmark."""
    return int(hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:8], 16)


def check_reference(reference: int | str) -> int | str:
    try:
        return reference if reference == IN_TURN else int(reference)
    except ValueError:
        raise ValueError(f"The reference must be a number or {IN_TURN!r}, got {reference!r}.") from None


def reference_of(case: Case, image: int, reference: int | str) -> Path:
    pictures = case.subject.references
    number = (case.number + image) % max(len(pictures), 1) if reference == IN_TURN else int(reference)
    if not 0 <= number < len(pictures):
        raise ValueError(f"{case.subject.name} has {len(pictures)} pictures, so there is no reference {number}.")
    return pictures[number]


def tree_of(folder: Path, value: float | None) -> Path:
    if value is None:
        return folder
    return folder / f"gate_{value:.2f}" if round(value, 2) == value else folder / f"gate_{value:g}"


def is_complete(folder: Path, job: Job, value: float | None) -> bool:
    """The picture is written last, and whole; one that was cut off since, by a copy, is made again."""
    tree = tree_of(folder, value)
    try:
        with (tree / "tgt_image" / f"{job.name}.png").open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            whole = file.read() == PNG_END
    except OSError:
        return False
    return whole and (tree / "text" / f"{job.name}.txt").is_file() and _source(tree, job).is_file()


def _make(server: Server, recipe: Recipe, knob: str, job: Job) -> tuple[list[bytes], str]:
    """The job's pictures, as PNG, and the sampler's report."""
    picture = server.upload(job.reference, lambda data: _name_by_content(data, job.reference), UPLOADS)
    try:
        outputs = server.run(recipe.filled(picture, job.case.prompt, job.seed, knob, job.values))
    except PromptError as error:
        hint = " Sample fewer at once." if "OutOfMemory" in str(error.details.get("exception_type")) else ""
        raise PromptError(f"{job.name}: {error}{hint}", error.details) from None
    entries = outputs.get(recipe.output, {}).get("images", [])
    if len(entries) != _pictures(job):
        raise PromptError(
            f"The workflow made {len(entries)} pictures where {_pictures(job)} were asked for; it must keep one for each "
            f"{knob}.",
            outputs,
        )
    pictures = [server.client.view(entry) for entry in entries]
    if not all(data.endswith(PNG_END) for data in pictures):
        raise ServerError(f"ComfyUI at {server.client.url} sent a picture that is not a whole PNG.")
    return pictures, "".join(outputs.get(REPORT_NODE, {}).get("text", []))


def _pictures(job: Job) -> int:
    return len(job.values) or 1


def _keep(folder: Path, picture: Path) -> Path:
    data = picture.read_bytes()
    copy = folder / "references" / _name_by_content(data, picture)
    if not copy.is_file():
        write_atomically(copy, data)
    return copy


def _name_by_content(data: bytes, picture: Path) -> str:
    return hashlib.sha256(data).hexdigest()[:24] + picture.suffix.lower()


def _write(tree: Path, job: Job, data: bytes, reference: Path) -> None:
    """The picture last: once it is there, the rest is."""
    write_atomically(tree / "text" / f"{job.name}.txt", job.case.prompt.encode())
    source = _source(tree, job)
    if not source.is_file():
        source.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(reference, source)  # thousands of copies would be gigabytes
        except OSError:
            shutil.copyfile(reference, source)
    write_atomically(tree / "tgt_image" / f"{job.name}.png", data)


def _source(tree: Path, job: Job) -> Path:
    return tree / "src_image" / (job.name + job.reference.suffix.lower())


@contextlib.contextmanager
def progress_bar(kept: int, total: int, title: str) -> Iterator[Progress]:
    """On stderr."""
    from tqdm import tqdm

    with tqdm(initial=kept, total=total, desc=title, unit="picture", file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda done, _: bar.update(done - bar.n)
