"""Benchmarks as their authors ship them, and folders of generated pictures.

read_benchmark    DreamBench (google/dreambooth), DreamBench++ (yuangpeng/dreambench_plus) or a plain folder -> Benchmark
find_pictures     a method's pictures of a benchmark; whatever is missing is an error, so that half a run is never averaged
read_outputs      a method's folder that brings its own prompts and references; no benchmark folder is needed

A tree of generated pictures is DreamBench++'s: src_image/, text/ and tgt_image/ with equal names. A sweep has one such
tree per gate, gate_0.50/ and so on. A picture is called `picture_name`, "dog6-03-0", or, as DreamBench++'s own code
writes it, "dog6/3_0": prompt 3 of the subject, image 0 of that prompt. Both count from 0.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.folders import any_system, is_system, masks

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
QUICK_SUBJECTS, QUICK_PROMPTS = 4, 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    name: str
    category: str
    references: tuple[Path, ...]  # real pictures of it
    class_word: str  # "dog"; empty where it is not known


@dataclass(frozen=True)
class Case:
    subject: Subject
    number: int  # counts the subject's prompts, from 0
    prompt: str  # without the unique token: "a dog in the jungle"


@dataclass(frozen=True)
class Benchmark:
    name: str
    cases: tuple[Case, ...]

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return tuple(dict.fromkeys(case.subject for case in self.cases))

    def quick(self) -> Benchmark:
        """4 subjects x 5 prompts, always the same ones: categories take turns, and both are spread over their lists."""
        by_category: dict[str, list[Subject]] = defaultdict(list)
        for subject in sorted(self.subjects, key=lambda subject: (subject.category, subject.name)):
            by_category[subject.category].append(subject)
        turns = [category for i in range(QUICK_SUBJECTS) for category in by_category if i < len(by_category[category])]
        shares = {category: turns[:QUICK_SUBJECTS].count(category) for category in by_category}
        chosen = {
            subject.name for category, share in shares.items() for subject in _spread(by_category[category], share)
        }
        cases = (
            case
            for subject in self.subjects
            if subject.name in chosen
            for case in _spread([case for case in self.cases if case.subject == subject], QUICK_PROMPTS)
        )
        return Benchmark(f"{self.name} (quick)", tuple(cases))


@dataclass(frozen=True)
class Picture:
    case: Case
    image: int  # counts the pictures of one case, from 0
    gate: float | None  # None: not swept
    path: Path


def picture_name(case: Case, image: int) -> str:
    """Name of a picture in the folders src_image, text and tgt_image, without its ending."""
    return f"{case.subject.name}-{case.number:02d}-{image}"


def read_benchmark(folder: str | Path) -> Benchmark:
    """ValueError, one sentence, if the folder is none of the three layouts or one of its files is missing or broken.

    DreamBench     dataset/prompts_and_classes.txt, dataset/<subject>/00.jpg ...       (the checkout, or its dataset/)
    DreamBench++   data/images/<category>/00.jpg, data/captions/<category>/00.txt      (the download, or its data/)
    plain          prompts.txt, each line with {class}; <subject>/class.txt and pictures
    """
    folder = Path(folder)
    for root in (folder, folder / "dataset", folder / "data"):
        if (root / "prompts_and_classes.txt").is_file():
            return _dreambench(root)
        if (root / "images").is_dir() and (root / "captions").is_dir():
            return _dreambench_plus(root)
    if (folder / "prompts.txt").is_file():
        return _plain(folder)
    if _trees(folder):
        raise ValueError(f"{_shown(folder)} holds generated pictures, not a benchmark; score it without one.")
    raise ValueError(
        f"{_shown(folder)} is not a benchmark: expected DreamBench (prompts_and_classes.txt and a folder per subject), "
        "DreamBench++ (images/ and captions/), or prompts.txt and a folder per subject with class.txt and pictures."
    )


def find_pictures(benchmark: Benchmark, folder: str | Path, images: int) -> list[Picture]:
    """`images` pictures of every case, at every gate of the folder, in the order of gates, cases, images.

    ValueError lists what is missing or empty, and prompts in text/ that are not the benchmark's. Files that were not asked
    for are named in a warning and left out.
    """
    if images < 1:
        raise ValueError(f"The number of images per prompt must be at least 1, got {images}.")
    folder = Path(folder)
    pictures, missing, extra, other_prompts = [], [], [], []
    for gate, tree in _needed_trees(folder):
        files, strangers = _files(tree / "tgt_image", PICTURES)
        texts, _ = _files(tree / "text", (".txt",))
        for case in benchmark.cases:
            for image in range(images):
                name, path = _one_of(files, _names(case, image), tree)
                if path is None or path.stat().st_size == 0:
                    missing.append(_shown((tree / "tgt_image" / name).relative_to(folder)))
                    continue
                pictures.append(Picture(case, image, gate, path))
                if name in texts and _words(_read(texts[name])) != _words(case.prompt):
                    other_prompts.append(_shown(texts[name].relative_to(folder)))
        used = {picture.path for picture in pictures}
        extra += [_shown(path.relative_to(folder)) for path in (*files.values(), *strangers) if path not in used]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(missing) + len(pictures)} pictures of {benchmark.name} are missing or empty in "
            f"{_shown(folder)}: {_first(missing)}. Generate them first; half a run is not averaged."
        )
    if other_prompts:
        raise ValueError(
            f"{len(other_prompts)} prompts in {_shown(folder)} are not those of {benchmark.name}: {_first(other_prompts)}. "
            "Score it with the benchmark that it was made from, and write prompts without a unique token."
        )
    if extra:
        log.warning(
            "%s: %d files are not pictures of %s: %s", _shown(folder), len(extra), benchmark.name, _first(extra)
        )
    return pictures


def read_outputs(folder: str | Path) -> tuple[Benchmark, list[Picture]]:
    """Any method's pictures with the prompts and references beside them, in folders src_image, text and tgt_image.

    Names that are neither `picture_name`s nor DreamBench++'s are one subject each. The references of a subject are all
    its different source pictures. ValueError lists the names that do not exist in all three folders, at all gates.
    """
    folder = Path(folder)
    trees = [(gate, tree, *_three_folders(tree)) for gate, tree in _needed_trees(folder)]
    names = sorted({name for _, _, *parts in trees for part in parts for name in part}, key=_natural)
    missing = [
        _shown((tree / kind / name).relative_to(folder))
        for _, tree, *parts in trees
        for kind, files in zip(("src_image", "text", "tgt_image"), parts, strict=True)
        for name in names
        if name not in files or files[name].stat().st_size == 0
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing or empty in {_shown(folder)}: {_first(missing)}. "
            "Every picture needs its source picture and its prompt under the same name; half a run is not averaged."
        )
    if not names:
        raise ValueError(f"{_shown(folder)} has the folders src_image, text and tgt_image, but no picture in them.")
    places = {name: _place(name) for name in names}
    sources = trees[0][2]
    by_subject: dict[str, list[Path]] = defaultdict(list)
    for name, (subject, _, _) in places.items():
        by_subject[subject].append(sources[name])
    subjects = {name: Subject(name, _category(name), _different(paths), "") for name, paths in by_subject.items()}
    cases: dict[tuple[str, int], Case] = {}
    pictures = []
    for gate, _, _, texts, files in trees:
        for name, (subject, number, image) in places.items():
            prompt = _read(texts[name])
            case = cases.setdefault((subject, number), Case(subjects[subject], number, prompt))
            if _words(case.prompt) != _words(prompt):
                raise ValueError(
                    f"{_shown(texts[name])} says {prompt!r}, but by its name it belongs to the prompt {case.prompt!r}; "
                    "give the pictures of different prompts different numbers."
                )
            pictures.append(Picture(case, image, gate, files[name]))
    return Benchmark(folder.resolve().name, tuple(cases.values())), pictures


# benchmarks ------------------------------------------------------------------------------------------------------------

_LIVE = (
    "cat",
    "dog",
)  # the classes of DreamBench's nine live subjects; its file has two lists of prompts, but does not say for whom


_LISTS = {"ObjectPrompts": "object", "LiveSubjectPrompts": "live"}
_LONGEST_TEXT = 2**20  # bytes of prompts, a class or a caption


def _dreambench(root: Path) -> Benchmark:
    file = root / "prompts_and_classes.txt"
    text = _read(file)
    subjects, lists = _sections(text)
    prompts = {kind: _formats(code, file) for kind, code in lists.items()}
    if subjects is None or set(prompts) != {"live", "object"}:
        raise ValueError(
            f"{_shown(file)}: expected a list 'subject_name,class', 'Object Prompts' and 'Live Subject Prompts'."
        )
    cases = []
    for line in subjects:
        name, comma, class_word = (part.strip() for part in line.partition(","))
        if not (name and comma and class_word):
            raise ValueError(f"{_shown(file)}: expected a line 'subject,class', got {line!r}.")
        category = "live" if class_word in _LIVE else "object"
        subject = Subject(name, category, _references(root / name), class_word)
        cases += _cases(subject, [text.replace("{1}", class_word) for text in prompts[category]])
    return Benchmark("DreamBench", tuple(cases))


def _sections(text: str) -> tuple[list[str] | None, dict[str, str]]:
    """The lines after "subject_name,class" up to an empty one, and the code of the two lists of prompts; each line is read once."""
    subjects, lists = None, {}
    lines = iter(text.splitlines())
    for line in lines:
        title = "".join(line.split())
        if title == "subject_name,class" and subjects is None:
            subjects = [first for first in [_next_filled(lines)] if first]
            subjects += itertools.takewhile(str.strip, lines)
        elif title in _LISTS:
            code = [_next_filled(lines)]
            if not re.match(r"prompt_list\s*=\s*\[", code[0]):
                continue
            for line in lines:
                code.append(line)
                if line.startswith("]"):
                    lists[_LISTS[title]] = "\n".join(code)
                    break
    return subjects, lists


def _next_filled(lines: Iterator[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")


def _formats(code: str, file: Path) -> list[str]:
    """'a {0} {1} in the jungle'.format(unique_token, class_token) -> "a {1} in the jungle". Parsed, never run."""
    try:
        calls = ast.parse(code.strip()).body[0].value.elts
        found = [(ast.literal_eval(call.func.value), call.func.attr, [a.id for a in call.args]) for call in calls]
    except (SyntaxError, ValueError, TypeError, AttributeError, IndexError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(file)}: a list of prompts cannot be read ({error}).") from None
    prompts = []
    for text, method, names in found:
        if (
            not isinstance(text, str)
            or method != "format"
            or names != ["unique_token", "class_token"]
            or "{1}" not in text
        ):
            raise ValueError(
                f"{_shown(file)}: expected prompts '... {{0}} {{1}} ...'.format(unique_token, class_token)."
            )
        prompts.append(_words(text.replace("{0}", "")))
    return prompts


def _dreambench_plus(root: Path) -> Benchmark:
    pictures, _ = _files(root / "images", PICTURES)
    captions, _ = _files(root / "captions", (".txt",))
    alone = sorted(set(pictures) ^ set(captions))
    if alone or not pictures:
        raise ValueError(
            f"{_shown(root)}: every picture in images needs its text in captions: {_first(alone) or 'none'}."
        )
    subjects = {}
    for name, path in pictures.items():
        category, number = path.parent.name, path.stem
        word, *prompts = [line.strip() for line in _read(captions[name]).splitlines()] or [""]
        if not prompts or not all(prompts):
            raise ValueError(f"{_shown(captions[name])}: expected the subject's word and then one prompt per line.")
        # the id that its own code gives to folders of results
        prefix = f"live_subject_{category}" if category in ("animal", "human") else category
        label = f"{prefix}_{number}_{word.lower().replace(' ', '_')}"
        if label in subjects:
            raise ValueError(f"{_shown(path)}: there is another picture {number} of {word!r} in {category}; keep one.")
        subjects[label] = _cases(Subject(label, category, (path,), word), prompts)
    return Benchmark("DreamBench++", tuple(case for label in sorted(subjects) for case in subjects[label]))


def _plain(root: Path) -> Benchmark:
    prompts = [line.strip() for line in _read(root / "prompts.txt").splitlines() if line.strip()]
    for line in prompts:
        if "{class}" not in line:
            raise ValueError(f"{_shown(root / 'prompts.txt')}: expected {{class}} in every line, got {line!r}.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_system(path.name))
    if not prompts or not folders:
        raise ValueError(f"{_shown(root)}: expected prompts in prompts.txt and a folder per subject.")
    cases = []
    for folder in folders:
        if not (folder / "class.txt").is_file():
            raise ValueError(f"{_shown(folder)}: class.txt is missing; write the subject's word into it, such as dog.")
        word = _words(_read(folder / "class.txt"))
        if not word:
            raise ValueError(f"{_shown(folder / 'class.txt')} is empty; write the subject's word into it, such as dog.")
        subject = Subject(folder.name, word, _references(folder), word)
        cases += _cases(subject, [line.replace("{class}", word) for line in prompts])
    return Benchmark(root.resolve().name, tuple(cases))


def _cases(subject: Subject, prompts: Iterable[str]) -> list[Case]:
    return [Case(subject, number, prompt) for number, prompt in enumerate(prompts)]


def _references(folder: Path) -> tuple[Path, ...]:
    """Directly in the folder, "00.jpg" first."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in files if path.suffix.lower() in PICTURES and not is_system(path.name)]
    files, left_out = _without_masks(files)
    if left_out:
        log.info("%s: masks are not references: %s", _shown(folder), _first([path.name for path in left_out]))
    if not files:
        raise ValueError(f"{_shown(folder)}: the pictures of this subject are missing.")
    return tuple(files)


# folders of generated pictures ---------------------------------------------------------------------------------------


def _trees(folder: Path) -> list[tuple[float | None, Path]]:
    """(gate, tree), by rising gate; the gate of a tree that lies directly in the folder is None."""
    gates: dict[float, Path] = {}
    for path in sorted(folder.glob("gate_*")):
        match = re.fullmatch(r"gate_([0-9]+(?:\.[0-9]+)?)", path.name)
        if match is None or not (path / "tgt_image").is_dir():
            log.warning("%s is not read: expected a folder like gate_0.50 with tgt_image in it.", _shown(path))
            continue
        gate = float(match[1])
        if gate in gates:
            raise ValueError(f"{_shown(gates[gate])} and {_shown(path)} are the same gate; keep one of them.")
        gates[gate] = path
    if (folder / "tgt_image").is_dir():
        if gates:
            raise ValueError(f"{_shown(folder)} holds tgt_image beside folders of gates; keep one of the two.")
        return [(None, folder)]
    return sorted(gates.items())


def _needed_trees(folder: Path) -> list[tuple[float | None, Path]]:
    trees = _trees(folder)
    if not trees:
        raise ValueError(
            f"{_shown(folder)} holds no generated pictures: expected src_image, text and tgt_image in it, or in folders "
            "like gate_0.50."
        )
    return trees


def _three_folders(tree: Path) -> tuple[dict[str, Path], dict[str, Path], dict[str, Path]]:
    sources, _ = _files(tree / "src_image", PICTURES)
    texts, _ = _files(tree / "text", (".txt",))
    targets, strangers = _files(tree / "tgt_image", PICTURES)
    if strangers:
        log.warning("%s: not pictures: %s", _shown(tree), _first([_shown(path.name) for path in strangers]))
    return sources, texts, targets


def _files(folder: Path, endings: tuple[str, ...]) -> tuple[dict[str, Path], list[Path]]:
    """Files below the folder by their names without ending ("dog6/3_0"), and those that end otherwise."""
    found: dict[str, Path] = {}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    paths, strangers = _without_masks([path for path in paths if not any_system(str(path.relative_to(folder)))])
    for path in paths:
        if path.suffix.lower() not in endings:
            strangers.append(path)
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{_shown(found[name])} and {_shown(path)} have the same name; keep one of them.")
        found[name] = path
    return found, strangers


def _without_masks(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files, and those of them that are masks of others in their folder."""
    by_folder: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[path.parent].append(path.name)
    found = {folder: masks(names, PICTURES) for folder, names in by_folder.items()}
    taken = [path for path in paths if path.name in found[path.parent]]
    return [path for path in paths if path not in set(taken)], taken


def _names(case: Case, image: int) -> tuple[str, str]:
    return picture_name(case, image), f"{case.subject.name}/{case.number}_{image}"


def _one_of(files: Mapping[str, Path], names: tuple[str, ...], tree: Path) -> tuple[str, Path | None]:
    found = [name for name in names if name in files]
    if len(found) > 1:
        raise ValueError(f"{_shown(tree)} holds one picture under two names, {_first(found)}; keep one of them.")
    return (found[0], files[found[0]]) if found else (names[0], None)


def _place(name: str) -> tuple[str, int, int]:
    """Subject, prompt, image of a file's name."""
    for pattern in (r"(.+)-([0-9]{2,})-([0-9]+)", r"(.+)/([0-9]+)_([0-9]+)"):
        if match := re.fullmatch(pattern, name):
            return match[1], int(match[2]), int(match[3])
    return name, 0, 0


def _category(subject: str) -> str:
    match = re.match(r"(?:live_subject_)?(animal|human|object|style)_[0-9]+_", subject)
    return match[1] if match else ""


def _different(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Each method copies a subject's source picture once per result."""
    return tuple({hashlib.sha256(path.read_bytes()).digest(): path for path in reversed(list(paths))}.values())[::-1]


# text ----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_TEXT + 1)
        if len(data) > _LONGEST_TEXT:
            raise ValueError(f"{_shown(path)} is longer than {_LONGEST_TEXT} bytes; shorten it.")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{_shown(path)} cannot be read as text ({error}); save it as UTF-8.") from None


def _words(text: str) -> str:
    return " ".join(text.split())


def _shown(path: Path | str) -> str:
    """Names that are not valid UTF-8 would break whatever prints them."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name)]


def _first(names: Sequence[str], count: int = 20) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _spread(items: Sequence, count: int) -> list:
    """`count` of the items (all, if there are fewer), evenly spread from the first to the last."""
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
