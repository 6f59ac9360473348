"""Known data sets into the plain layout. Sources are only read; nothing is downloaded.

| kind | the source | becomes |
| --- | --- | --- |
| mvimgnet | class/object/images/*.jpg, masks/ beside images/ where there are any | variant/class__object |
| co3d | category/sequence/images/*.jpg, masks/ | variant/category__sequence |
| template | as `template` says, such as "{class}/{subject}/images/{picture}" | variant/class__subject |
| dreambench | google/dreambooth: dataset/subject/*.jpg, prompts_and_classes.txt | variant/subject |
| ip_adapter | the JSON list of tencent's scripts, [{"image_file": ..., "text": ...}] | invariant |
| kohya | 10_name/ folders with .txt or .caption | variant/10_name, or invariant/10_name |
| comfyui | what LoadImageTextDataSetFromFolder reads: pictures with .txt, and 10_name/ folders of them | invariant |
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files.folders import is_system, masks
from ..files.parse import parse_json, read_json
from ..files.weights import write_atomically
from ..pictures.opened import TooLarge, open_picture
from .pictures import CLIPS, PICTURES
from .stores import CAPTIONS, CLASS, UNSAFE, FolderStore, safe_name

MANIFEST = "import.json"
WAYS = ("copy", "link")
_TEMPLATES = {
    "mvimgnet": "{class}/{subject}/images/{picture}",
    "co3d": "{class}/{subject}/images/{picture}",
}


@dataclass(frozen=True)
class Item:
    """One file to write: a copy of `source`, or `content`."""

    name: str  # in the plain layout
    source: Path | None = None
    content: bytes = b""


def import_data(
    kind: str,
    source: str | os.PathLike,
    target: str | os.PathLike,
    way: str = "copy",
    template: str | None = None,
    pictures: str | os.PathLike | None = None,
    to: str | None = None,
    views: int | None = None,
) -> int:
    """Number of pictures and clips in `target` afterwards. The same call continues an interrupted import.

    way "link" makes hard links instead of copies where it can: no disk space, but whoever edits a picture in `target` edits the
    source's. `pictures`: where an ip_adapter list's files lie, unless beside it. `to`: "variant" or "invariant", for kohya.
    `views`: take at most this many of each subject, evenly over the sequence. ValueError, one sentence, for what does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"Import: the kind {kind!r} is unknown; choose {', '.join(KINDS)}.")
    if way not in WAYS:
        raise ValueError(f"Import: the way {way!r} is unknown; choose copy or link.")
    if to not in (None, "variant", "invariant"):
        raise ValueError(f"Import: to must be variant or invariant, got {to!r}.")
    if views is not None and views < 2:
        raise ValueError(f"Import: views must be at least 2, got {views}.")
    source, target = Path(source), Path(target)
    if not source.exists():
        raise ValueError(f"Import: {source} does not exist; check its name.")
    if target.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"Import: {source} and {target} lie inside each other; choose a target elsewhere.")
    if source.is_dir():
        FolderStore(source)  # refuses links, whose contents would be brought from anywhere
    items = _items(kind, source, template, pictures and Path(pictures), to, views)
    return _bring(items, target, {"kind": kind, "source": str(source.resolve()), "template": template}, way)


def _items(
    kind: str, source: Path, template: str | None, pictures: Path | None, to: str | None, views: int | None
) -> list[Item]:
    if kind == "ip_adapter":
        return list(_ip_adapter(source, pictures or source.parent))
    if not source.is_dir():
        raise ValueError(f"Import: {source} is a file, but {kind} data are a folder; give that.")
    if kind == "dreambench":
        return list(_dreambench(source))
    if kind in ("kohya", "comfyui"):
        return list(_captioned(source, to or ("variant" if kind == "kohya" else "invariant"), loose=kind == "comfyui"))
    if kind == "template" and not template:
        raise ValueError(
            'Import: the kind template needs a template such as "{class}/{subject}/images/{picture}"; add it.'
        )
    return list(_by_template(source, template or _TEMPLATES[kind], views))


def _bring(items: list[Item], target: Path, about: Mapping[str, str | None], way: str) -> int:
    """Writes what is not there yet."""
    shown = [item for item in items if item.name.lower().endswith((*PICTURES, *CLIPS)) and not _is_mask(item.name)]
    if not shown:
        raise ValueError(f"Import: {about['source']} holds no pictures in the layout of {about['kind']}; check both.")
    names: dict[str, Item] = {}
    for item in items:
        if not safe_name(item.name):
            raise ValueError(f"Import: there is a file {item.name!r}, {UNSAFE}; rename it.")
        if item.name.lower() in names:
            raise ValueError(f"Import: two files would become {item.name}; rename one of them in the source.")
        names[item.name.lower()] = item
    if target.exists() and any(target.iterdir()):
        try:
            known = read_json(target / MANIFEST)
        except (OSError, ValueError):
            known = None
        if known != dict(about):
            raise ValueError(f"Import: {target} already holds something else; choose an empty or new folder.")
    for item in shown:
        if item.source is not None and item.name.lower().endswith(PICTURES):
            _check_pixels(item.source)
    write_atomically(target / MANIFEST, json.dumps(about).encode())
    for item in items:
        _place(item, target / item.name, way)
    return len(shown)


def _check_pixels(source: Path) -> None:
    """A picture that training would refuse for its size is not imported. `check` reports what is not a picture at all."""
    try:
        open_picture(source).close()
    except TooLarge as error:
        raise ValueError(f"Import: {source} cannot be used: {error}.") from None
    except Exception:  # noqa: BLE001 - damaged files fail with any exception
        return


def _is_mask(name: str) -> bool:
    return os.path.splitext(name)[0].lower().endswith(".mask")


def _place(item: Item, path: Path, way: str) -> None:
    if item.source is None:
        if not path.exists() or path.read_bytes() != item.content:
            write_atomically(path, item.content)
        return
    source = item.source.resolve()
    if path.exists() and path.stat().st_size == source.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            if way == "copy":
                raise OSError
            os.link(source, temporary)
        except OSError:  # other disk, or a file system without links
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RuntimeError(
            f"Import: {source} cannot be written to {path} ({error.strerror}); check disk space."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _by_template(root: Path, template: str, views: int | None) -> Iterator[Item]:
    """A subject's name is made of the class and the rest; masks lie in a folder `masks` or `mask` beside the pictures' folder."""
    pattern = _pattern(template)
    names = _class_names(root)
    depth = template.count("/")
    subjects: dict[tuple[str, str], list[Path]] = {}
    beside: dict[Path, Path | None] = {}
    for path, mask in _with_masks(_files(root, depth), PICTURES):
        if found := pattern.fullmatch(path.relative_to(root).as_posix()):
            groups = found.groupdict()
            subjects.setdefault((groups.get("class") or "", groups["subject"]), []).append(path)
            beside[path] = mask
    for (label, subject), paths in subjects.items():
        if views is not None and len(paths) > views:
            paths = [paths[round(i * (len(paths) - 1) / (views - 1))] for i in range(views)]
        folder = f"variant/{_name(f'{label}__{subject}' if label else subject)}"
        word = names.get(label, "" if label.isdigit() else label.replace("_", " "))
        if word:
            yield Item(f"{folder}/{CLASS}", content=word.encode())
        for path in paths:
            yield Item(f"{folder}/{path.name}", path)
            mask = _mask_of(path) or beside[path]
            if mask is not None:
                yield Item(f"{folder}/{path.stem}.mask{mask.suffix}", mask)


def _pattern(template: str) -> re.Pattern[str]:
    found = re.findall(r"\{(\w+)\}", template)
    known = ("class", "subject", "picture")
    if "subject" not in found or set(found) - set(known) or len(set(found)) != len(found):
        raise ValueError(
            f"Import: the template {template!r} must name each folder once, with {{subject}} and perhaps {{class}}, {{picture}}, * ; "
            'an example is "{class}/{subject}/images/{picture}".'
        )
    parts = re.split(r"(\{\w+\}|\*)", template)
    return re.compile(
        "".join(f"(?P<{p[1:-1]}>[^/]+)" if p[:1] == "{" else "[^/]*" if p == "*" else re.escape(p) for p in parts)
    )


def _mask_of(path: Path) -> Path | None:
    """CO3D's and MVImgNet's: in a folder of their own beside the pictures' folder, under the picture's name or that and .png."""
    for folder in ("masks", "mask", "Masks", "Mask"):
        for name in (f"{path.stem}.png", f"{path.name}.png", path.name):
            candidate = path.parent.parent / folder / name
            if candidate.is_file():
                return candidate
    return None


def _with_masks(paths: Iterable[Path], endings: tuple[str, ...]) -> Iterator[tuple[Path, Path | None]]:
    """Of these files the pictures and clips (`endings`), each with the mask beside it; masks of uncertain meaning are left out and reported."""
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    for folder, files in by_folder.items():
        found = masks([path.name for path in files], PICTURES, CLIPS)
        for path in files:
            if path.suffix.lower() in endings and path.name not in found:
                yield path, folder / found.of[path.name] if path.name in found.of else None
        if found.left_out:
            logging.warning(
                "Import: %d masks in %s are left out, because in them white may mean the background: %s. Rename them to NAME.mask.png "
                "where white is the subject.",
                len(found.left_out),
                folder,
                ", ".join(found.left_out[:3]),
            )


def _class_names(root: Path) -> dict[str, str]:
    """MVImgNet's table from numbers to words, if it lies in the folder."""
    table = root / "mvimgnet_category.txt"
    if table.is_file():
        lines = (re.split(r"[,\t]", line.strip(), maxsplit=1) for line in _text(table).splitlines())
        return {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    table = root / "mvimgnet2_category.json"
    if table.is_file():
        data = _json(table)
        if isinstance(data, dict):
            return {str(key): str(value) for key, value in data.items() if isinstance(value, str)}
    return {}


def _dreambench(source: Path) -> Iterator[Item]:
    root = source / "dataset" if (source / "dataset").is_dir() else source
    table = root / "prompts_and_classes.txt"
    lines = _text(table).split("Prompts")[0].splitlines() if table.is_file() else []
    classes = dict(line.strip().split(",", 1) for line in lines if "," in line)
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not is_system(path.name)):
        if folder.name in classes:
            yield Item(f"variant/{folder.name}/{CLASS}", content=classes[folder.name].strip().encode())
        for path, mask in _with_masks(_files(folder, 0), PICTURES):
            yield Item(f"variant/{folder.name}/{path.name}", path)
            if mask is not None:
                yield Item(f"variant/{folder.name}/{path.stem}.mask{mask.suffix}", mask)


def _ip_adapter(source: Path, root: Path) -> Iterator[Item]:
    if source.is_dir():
        raise ValueError(f"Import: {source} is a folder, but ip_adapter data are a JSON file; give that.")
    data = _json(source)
    if not isinstance(data, list) or not all(
        isinstance(row, dict) and isinstance(row.get("image_file"), str) and isinstance(row.get("text"), str)
        for row in data
    ):
        raise ValueError(f'Import: {source.name} is not a list of {{"image_file": ..., "text": ...}}; check the file.')
    for number, row in enumerate(data):
        name = row["image_file"].replace("\\", "/")
        path = root / name
        if not safe_name(name) or not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"Import: entry {number} names {row['image_file']!r}, which lies outside {root}; correct the list."
            )
        if not path.is_file():
            raise ValueError(
                f"Import: entry {number} names {name}, which is not in {root}; put it there or give its folder."
            )
        stem = f"{number:07d}_{_name(path.stem)}"
        yield Item(f"invariant/{stem}{path.suffix.lower()}", path)
        yield Item(f"invariant/{stem}.txt", content=row["text"].encode())


def _captioned(root: Path, kind: str, loose: bool) -> Iterator[Item]:
    """Folders of pictures with captions beside them; with `loose` also pictures that lie in `root` itself."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_system(path.name))
    for folder in [root, *folders] if loose else folders:
        prefix = kind if folder == root else f"{kind}/{folder.name}"
        files = list(_files(folder, 0))
        texts = {(path.stem, path.suffix.lower()): path for path in files}
        for path, mask in _with_masks(files, (*PICTURES, *CLIPS)):
            yield Item(f"{prefix}/{path.name}", path)
            if mask is not None:
                yield Item(f"{prefix}/{path.stem}.mask{mask.suffix}", mask)
            for ending in CAPTIONS:
                if (path.stem, ending) in texts:
                    yield Item(f"{prefix}/{path.stem}.txt", content=texts[path.stem, ending].read_bytes())
                    break


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """The files that lie `depth` folders below, sorted; hidden ones are skipped."""
    for path in sorted(folder.iterdir()):
        if is_system(path.name):
            continue
        if depth and path.is_dir():
            yield from _files(path, depth - 1)
        elif not depth and path.is_file():
            yield path


def _name(name: str) -> str:
    return re.sub(r'[\\/:*?"<>|]', "_", name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"Import: {path.name} is not text in UTF-8; save it as such.") from None


def _json(path: Path):
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise ValueError(f"Import: {path.name} is not JSON ({error}); check the file.") from None


KINDS = (*_TEMPLATES, "template", "dreambench", "ip_adapter", "kohya", "comfyui")
