"""Which scores the weight files of some folders allow, and the scores themselves.

Files are found by content, never by name, and only the standard file of each role is taken automatically: scores by other
weights cannot be compared with published ones. Others serve where the caller names them, and the column says so. Nothing is
downloaded; every column without its files says in a sentence which are missing.

Two sets of columns: CLIP ViT-B/32 with DINO v1 ViT-S/16, which DreamBooth measured with, and CLIP ViT-L/14 with DINOv2
ViT-S/14. (The latter is DreamBench++'s; larger DINOv2s are what adapters read, FlexIP's among them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import layouts, scorer_files
from ..files.folders import any_system
from ..files.stored import first_parts
from ..files.weights import Header, name_of, read_header, sha256
from ..measuring.scores import image_scores
from ..measuring.scores_file import Row
from . import aesthetic, clip_iqa, metrics
from .benchmark import Picture, Subject
from .loaded_encoders import Bench, Column, chunks, float32
from .published import NOT_COMPARABLE

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
CONVERT = (
    'write its weights to a plain file with: python -c "import torch; '
    "torch.save(dict(torch.jit.load('{name}', map_location='cpu').state_dict()), 'plain_{name}')\""
)
_L14 = (1024, 24, 14, 256, 768)  # width, layers, patch, positions, embedding
_DINOV2_S14 = (384, 12, 1536, 14, 0)  # width, layers, MLP, patch, registers


@dataclass(frozen=True)
class Role:
    """What a file is needed for. `make` recognises it (header -> file or None), `standard` tells the one of published scores."""

    title: str
    advice: str
    make: Callable[[str, Header], Any]
    standard: Callable[[Any], bool]


def _make_clip(name: str, header: Header) -> scorer_files.ScorerFile | None:
    file = layouts.identify(header)
    return scorer_files.clip_scorer(name, header.path) if file and file.shape.kind == "clip" else None


def _make_dino(name: str, header: Header) -> scorer_files.ScorerFile | None:
    file = layouts.identify(header) or layouts.identify_vit(header)
    return scorer_files.dino_scorer(name, header.path) if file and file.shape.kind == "dino" else None


def _is_openai_l14(file: scorer_files.ScorerFile) -> bool:
    shape = file.file.shape
    return file.quick_gelu and (shape.width, shape.depth, shape.patch, shape.positions, shape.out) == _L14


def _is_dinov2_s14(file: scorer_files.ScorerFile) -> bool:
    shape = file.file.shape
    return (shape.width, shape.depth, shape.mlp, shape.patch, shape.registers) == _DINOV2_S14


ROLES: Mapping[str, Role] = {
    "clip": Role(scorer_files.CLIP_STANDARD, scorer_files.CLIP_ADVICE, _make_clip, lambda file: file.standard),
    "dino": Role(scorer_files.DINO_STANDARD, scorer_files.DINO_ADVICE, _make_dino, lambda file: file.standard),
    "clip-l14": Role(
        "OpenAI's CLIP ViT-L/14", "model.safetensors of openai/clip-vit-large-patch14", _make_clip, _is_openai_l14
    ),
    "dinov2": Role("DINOv2 ViT-S/14", "model.safetensors of facebook/dinov2-small", _make_dino, _is_dinov2_s14),
    "clip-rn50": Role(
        "OpenAI's CLIP RN50",
        "open_clip_model.safetensors of timm/resnet50_clip.openai",
        clip_iqa.identify,
        lambda file: file.standard,
    ),
    "aesthetic": Role(
        "LAION's aesthetic predictor",
        f"{aesthetic.STANDARD} of christophschuhmann/improved-aesthetic-predictor",
        aesthetic.identify,
        lambda file: file.standard,
    ),
}


COLUMNS: Mapping[str, Column] = {
    "CLIP-T": Column("prompt", ("clip",), "cosine of picture and prompt"),
    "CLIP-I": Column("identity", ("clip",), "mean cosine with the subject's real pictures"),
    "DINO-I": Column("identity", ("dino",), "mean cosine with the subject's real pictures"),
    "CLIP-IQA": Column("quality", ("clip-rn50",), '"Good photo." against "Bad photo.", pictures at their own size'),
    "Aesthetic": Column("aesthetic", ("aesthetic", "clip-l14"), "predicted rating, about 1 to 10"),
    "CLIP-T (L/14)": Column("prompt", ("clip-l14",), "cosine of picture and prompt"),
    "CLIP-I (L/14)": Column("identity", ("clip-l14",), "mean cosine with the subject's real pictures"),
    "DINO-I (DINOv2)": Column("identity", ("dinov2",), "mean cosine with the subject's real pictures"),
}
FEATURES = "dino"  # the role whose features go into the file of scores


@dataclass(frozen=True)
class Measured:
    """`rows` in the order of the pictures, `features` (rows, d) by DINO (v1) if there is one: what Scores takes."""

    rows: tuple[Row, ...]
    features: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Instruments:
    """What can be measured. `columns`: column -> what it is and by which file; `missing`: column -> why there is none."""

    columns: Mapping[str, str]
    missing: Mapping[str, str]
    files: Mapping[str, Any]  # role -> its file

    def only(self, names: Iterable[str]) -> Instruments:
        """The same with fewer columns. ValueError for a column that cannot be measured."""
        names = list(names)
        for name in names:
            if name not in self.columns:
                raise ValueError(
                    self.missing.get(name, f"There is no column {name!r}; choose from {', '.join(COLUMNS)}.")
                )
        return replace(self, columns={name: text for name, text in self.columns.items() if name in names})

    def score(
        self,
        pictures: Sequence[Picture],
        batch: int = 8,
        on_progress: Callable[[int, int], None] | None = None,
        device: torch.device | str | None = None,
    ) -> Measured:
        """Every picture by every column. `on_progress(done, all)` is called after each batch.

        ValueError, naming it, for a picture that cannot be read, and for a subject without real pictures.
        """
        with float32():
            bench = Bench(self._wanted(), self.files, batch, device)
            prompts = bench.prompts({picture.case.prompt for picture in pictures})
            real: dict[Subject, dict[str, Tensor]] = {}
            rows: list[Row] = []
            features = []
            for chunk in chunks(pictures, batch):
                seen, scores = bench.look([picture.path for picture in chunk])
                for name, column in bench.columns("prompt"):
                    texts = torch.stack([prompts[column.roles[0]][picture.case.prompt] for picture in chunk])
                    scores[name] = metrics.clip_t(seen[column.roles[0]], texts)
                for name, column in bench.columns("identity"):
                    role, values = column.roles[0], []
                    for number, picture in enumerate(chunk):
                        subject = picture.case.subject
                        if subject not in real:
                            real[subject] = bench.real(subject)
                        values.append(image_scores(seen[role][number : number + 1], real[subject][role]))
                    scores[name] = torch.cat(values)
                for number, picture in enumerate(chunk):
                    case, subject = f"{picture.case.number:02d}", picture.case.subject
                    own = {name: scores[name][number].item() for name in self.columns}
                    rows.append(Row(subject.name, subject.category, case, picture.image, picture.gate, own))
                if FEATURES in seen:
                    features.append(seen[FEATURES])
                if on_progress:
                    on_progress(len(rows), len(pictures))
        return Measured(tuple(rows), torch.cat(features) if features else None)

    def real_features(
        self,
        subjects: Iterable[Subject],
        batch: int = 8,
        on_progress: Callable[[int, int], None] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Column (CLIP-I, DINO-I, ...) -> subject -> features (r, d) of its real pictures: what calibrates the column."""
        subjects = list(subjects)
        with float32():
            bench = Bench(self._wanted("identity"), self.files, batch, device)
            found: dict[str, dict[str, Tensor]] = {name: {} for name in bench.wanted}
            for done, subject in enumerate(subjects, 1):
                real = bench.real(subject)
                for name, column in bench.wanted.items():
                    found[name][subject.name] = real[column.roles[0]]
                if on_progress:
                    on_progress(done, len(subjects))
        return found

    def _wanted(self, *kinds: str) -> dict[str, Column]:
        wanted = {name: COLUMNS[name] for name in self.columns if not kinds or COLUMNS[name].kind in kinds}
        if not wanted:
            raise ValueError("\n".join(self.missing.values()) or "There is no column to measure.")
        return wanted


def find(folders: str | Path | Iterable[str | Path], use: Mapping[str, str | Path] | None = None) -> Instruments:
    """What the weight files in these folders (and below) can measure. Reads headers, and the chosen files once for sha256.

    `use`, role -> file, names files that are taken whatever they are, standard or not. ValueError, one sentence, for a
    folder that is not one and a named file that cannot serve.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    found: dict[str, list[Any]] = {role: [] for role in ROLES}
    programs = []
    for path in _weight_files(folders):
        try:
            header = read_header(path)
        except ValueError as error:
            programs += [path.name] if "TorchScript" in str(error) else []
            continue
        for role, file in _recognise(path.name, header):
            found[role].append(file)
    chosen = {role: file for role in ROLES if (file := _best(role, found[role])) is not None}
    for role, path in (use or {}).items():
        chosen[role] = _named(role, Path(path))
    columns, missing, hashes = {}, {}, {}
    where = " or ".join(str(folder) for folder in folders) or "a folder and name it with --weights"
    for name, column in COLUMNS.items():
        why = _lacking(name, column, chosen, found, where, programs)
        if why:
            missing[name] = why
        else:
            columns[name] = _describe(column, chosen, hashes)
    return Instruments(columns, missing, chosen)


def _weight_files(folders: Iterable[str | Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder; name one with weight files, such as ComfyUI's models/clip_vision."
            )
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        named = sorted(str(path.relative_to(folder)) for path in files)
        found |= dict.fromkeys(folder / name for name in first_parts([name for name in named if not any_system(name)]))
    return list(found)


def _recognise(name: str, header: Header) -> Iterator[tuple[str, Any]]:
    """The roles that a file could play, standard or not."""
    found: dict[Any, Any] = {}  # some roles want the same kind of file
    for role in ROLES.values():
        if role.make not in found:
            try:
                found[role.make] = role.make(name, header)
            except ValueError:  # naming it for the role says what is wrong with it
                found[role.make] = None
    yield from ((name, file) for name, role in ROLES.items() if (file := found[role.make]) is not None)


def _best(role: str, files: Iterable[Any]) -> Any:
    """The standard file, with a text tower if one has it, preferably one that is certain; None if there is none."""

    def rank(file: Any) -> tuple:
        return (getattr(file, "text", None) is None, bool(file.remark), file.name)

    for file in sorted(filter(ROLES[role].standard, files), key=rank):
        try:
            _check(file)
        except ValueError:
            continue
        return file
    return None


def _check(file: Any) -> None:
    """ValueError unless the file is whole. Reads no tensor."""
    if isinstance(file, scorer_files.ScorerFile):
        scorer_files.check(file)
    elif isinstance(file, clip_iqa.ResNetFile):
        clip_iqa.build(file)


def _named(role: str, path: Path) -> Any:
    if role not in ROLES:
        raise ValueError(f"There is no role {role!r} for a file; choose from {', '.join(ROLES)}.")
    file = ROLES[role].make(path.name, read_header(path))
    if file is None:
        raise ValueError(f"{name_of(path)} cannot serve as {role}; choose {ROLES[role].advice}.")
    _check(file)
    return file


def _lacking(
    name: str,
    column: Column,
    chosen: Mapping[str, Any],
    found: Mapping[str, list[Any]],
    where: str,
    programs: Sequence[str],
) -> str:
    """The sentence that says which file the column lacks; nothing if it has all."""
    for role in column.roles:
        if role not in chosen:
            wanted = ROLES[role]
            text = f"{name} lacks {wanted.title}: put {wanted.advice} into {where}"
            others = sorted(f"{file.name} is {file.title}" for file in found[role] if not wanted.standard(file))
            if others:
                more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                text += f" ({', '.join(others[:3])}{more}; to measure by another file, name it as {role})"
            if programs and "clip" in role:
                text += f" (not opened: {programs[0]}, a TorchScript program; {CONVERT.format(name=programs[0])})"
            return f"{text}."
    if column.kind == "prompt" and chosen[column.roles[0]].text is None:
        return f"{name} lacks the text tower of {ROLES[column.roles[0]].title}: {chosen[column.roles[0]].no_text}"
    if column.kind == "aesthetic" and (out := chosen["clip-l14"].file.shape.out) != aesthetic.WIDTHS[0]:
        return f"{name} lacks embeddings of width {aesthetic.WIDTHS[0]}: {chosen['clip-l14'].name} makes {out} numbers."
    return ""


def _describe(column: Column, chosen: Mapping[str, Any], hashes: dict[Path, str]) -> str:
    """For the heads of tables: "OpenAI CLIP ViT-B/32 (model.safetensors, sha256 ...), ...". Fills `hashes`."""
    parts = []
    for role in column.roles:
        file = chosen[role]
        if file.path not in hashes:
            with file.path.open("rb") as content:
                hashes[file.path] = sha256(content)
        text = f"{file.title} ({file.name}, sha256 {hashes[file.path]})"
        if isinstance(file, scorer_files.ScorerFile):
            text += f" at {file.crop} px"
        if not ROLES[role].standard(file):
            text += f", {NOT_COMPARABLE} with scores by {ROLES[role].title}"
        if file.remark:
            text += f". {file.remark[0].upper()}{file.remark[1:].rstrip('.')}"
        parts.append(text)
    return f"{column.meaning}; {' on '.join(parts)}"
