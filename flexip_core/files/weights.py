"""Reading weight files safely: what they contain (header) and the tensors themselves.

The format is recognised by content, never by extension. Pickles are only read with torch's `weights_only=True`, so no
code in a file ever runs. Nothing is allocated beyond what the file really holds. Every failure is a ValueError of one
sentence that names the file and says what to do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import mmap
import os
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from . import stored
from .pickles import FalseSize, NotAsTorchPacks, NotPlain, TooManyOpcodes, scan_legacy, scan_zip

# https://github.com/huggingface/safetensors#format: 8 bytes of header length, JSON header, data.
_LENGTH_BYTES = 8
_LONGEST_HEADER = 16_000_000  # 100,000 tensors; read, it takes 25 times that. The library's own limit is 100 MB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DEEPEST_NESTING = 8  # of dicts in a pickle; also ends dicts that contain themselves
_MOST_ENTRIES = 1_000_000  # of all dicts in a pickle; a dict that is in many others counts each time
_MOST_DIMENSIONS = 64
_AGAIN = "download it again"


@dataclass(frozen=True)
class Header:
    """What a weight file contains. `dtypes` holds torch's names without "torch.", e.g. "float16"."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Names, shapes and dtypes of all tensors in a weight file, without reading the tensors.

    Reads safetensors and torch.save files, and for one part of a model the whole set of parts. Scales of float8 weights are not
    tensors of their own here: `read_tensors` multiplies them out. Raises ValueError, one sentence naming the file, if it is not a whole,
    plain weight file.
    """
    path = Path(path)
    header = _merged(path, [_open(part)[0] for part in _parts(path)])
    hidden = stored.aside(header.shapes, stored.scales(header.shapes, header.dtypes))
    if not hidden:
        return header
    shapes = {key: shape for key, shape in header.shapes.items() if key not in hidden}
    return Header(path, shapes, {key: header.dtypes[key] for key in shapes}, header.metadata)


def read_tensors(path: str | Path, keys: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weight file on the CPU, all or only `keys`; memory-mapped where the format allows it.

    A "state_dict" at the top of a pickle is unwrapped and nested dicts are joined with dots ({"image_proj": {"norm":
    t}} is "image_proj.norm"). Tensors of a pickle may be views of each other: clone before writing. Raises ValueError
    as `read_header` does, and if one of `keys` is missing.
    """
    path = Path(path)
    opened = [_open(part) for part in _parts(path)]
    header = _merged(path, [one for one, _ in opened])
    scales = stored.scales(header.shapes, header.dtypes)
    hidden = stored.aside(header.shapes, scales)
    wanted = _check_keys(path, [key for key in header.shapes if key not in hidden], keys)
    needed = {*wanted, *(scales[key] for key in wanted if key in scales)}
    tensors: dict[str, torch.Tensor] = {}
    for one, read in opened:
        tensors |= read([key for key in one.shapes if key in needed])
    return {
        key: stored.multiplied(tensors[key], tensors[scales[key]]) if key in scales else tensors[key] for key in wanted
    }


def _parts(path: Path) -> list[Path]:
    try:
        return stored.parts_of(path)
    except ValueError as error:
        raise _bad(path, str(error)) from None


def _open(path: Path) -> tuple[Header, Callable[[list[str]], dict[str, torch.Tensor]]]:
    """What one file contains, and how to read tensors of it."""
    if is_safetensors(path):
        return _safetensors_header(path), functools.partial(_read_safetensors, path)
    tensors = _unpickle(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: _dtype_name(tensor.dtype) for key, tensor in tensors.items()}
    return Header(path, shapes, dtypes), lambda keys: {key: tensors[key] for key in keys}


def _read_safetensors(path: Path, keys: list[str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in keys}
    except Exception:  # noqa: BLE001 - what our own header check lets through, in whatever way the library takes it
        raise _bad(path, f"is a damaged safetensors file; {_AGAIN}") from None


def _merged(path: Path, headers: list[Header]) -> Header:
    """The header of a set of parts, under the path that was asked for."""
    if len(headers) == 1:
        return headers[0]
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for header in headers:
        if twice := sorted(shapes.keys() & header.shapes.keys()):
            raise _bad(header.path, f"and another part both hold the tensor {one_line(twice[0], 80)!r}; {_AGAIN}")
        shapes |= header.shapes
        dtypes |= header.dtypes
    return Header(path, shapes, dtypes, headers[0].metadata)


def read_weights(path: str | Path, keys: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """As `read_tensors`, for tensors that a network computes with: all must be finite decimal numbers.

    Looking at all of them costs a tenth of a second per GB, in addition to reading the file.
    """
    tensors = read_tensors(path, keys)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise _bad(
                Path(path),
                f"stores tensor {one_line(key, 80)!r} as {_dtype_name(tensor.dtype)}, not as decimal numbers; choose a file "
                "in float32, float16 or bfloat16",
            )
        if not _finite(tensor):
            raise _bad(
                Path(path),
                f"holds values that are not numbers (NaN or infinite) in tensor {one_line(key, 80)!r}, so every picture "
                f"would be black; {_AGAIN}",
            )
    return tensors


def _finite(tensor: torch.Tensor) -> bool:
    # a view that repeats its memory is looked at once
    tensor = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
    if not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 knows no comparison
        tensor = tensor.to(torch.bfloat16)
    low, high = tensor.aminmax()  # both NaN if one value is
    return bool(low.isfinite() and high.isfinite())


def sha256(file: BinaryIO) -> str:
    """Of everything that is left in an open file, in hex."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def write_atomically(path: str | Path, data: bytes) -> None:
    """The file is there whole or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def name_of(path: str | Path) -> str:
    """How messages name a file: its name and its folder."""
    path = Path(path)
    return f"{one_line(path.name, 300)} (in {one_line(path.parent)})"


def one_line(text: object, longest: int = 1000) -> str:
    """For messages and reports: a stranger's text without line breaks and control characters, not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[: 2 * longest])
    return " ".join(line.split())[:longest]


def _bad(path: Path, what: str) -> ValueError:
    return ValueError(f"{name_of(path)} {what}.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_keys(path: Path, present: Iterable[str], keys: Iterable[str] | None) -> list[str]:
    present = list(present)
    if keys is None:
        return present
    keys = list(keys)
    missing = sorted(set(keys) - set(present))
    if missing:
        raise _bad(
            path,
            f"has no tensor {one_line(missing[0], 80)!r} ({len(missing)} of {len(keys)} wanted tensors are missing); "
            "choose another file",
        )
    return keys


def is_safetensors(path: Path) -> bool:
    """True for safetensors, False for a torch.save file; everything else is refused here by what it starts with."""
    try:
        if path.is_dir():
            raise _bad(path, "is a folder, a weight file (.safetensors) is needed; choose a file inside it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise _bad(path, "is not a file, a weight file (.safetensors) is needed; choose another one")
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(256)
    except FileNotFoundError:
        if path.is_symlink():
            raise _bad(
                path, "is a link that leads nowhere; bring back what it points at, or download it again"
            ) from None
        raise _bad(path, "does not exist; check the name or download the file") from None
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror}); check the file and its permissions") from None
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise _bad(path, f"is empty (0 bytes), a weight file is needed; {_AGAIN}")
    if text.startswith(b"version https://git-lfs"):
        raise _bad(
            path,
            f"is a Git-LFS pointer of {size} bytes, not the weights themselves; download the real file "
            "(git lfs pull, or the download button of the model page)",
        )
    if text.startswith((b"<!doctype", b"<html")):
        raise _bad(
            path,
            "is a web page, not weights (the download saved a page instead of the file); "
            "download it again by the file's direct link",
        )
    if start.startswith((b"PK\x03\x04", b"\x80")) and not start[_LENGTH_BYTES:].startswith(b"{"):
        return False
    if size > _LENGTH_BYTES and start[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{":
        return True
    raise _bad(
        path,
        "is not a weight file (neither safetensors nor a torch.save file); choose a .safetensors file "
        "or download it again",
    )


def _safetensors_header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
        begin = _LENGTH_BYTES + length
        if _LONGEST_HEADER < length <= size:
            raise _bad(
                path,
                f"has a header of {length} bytes, and {_LONGEST_HEADER} are the limit; choose a file with fewer tensors",
            )
        if begin > size:
            raise _bad(
                path,
                f"is cut off or not safetensors: its header should take {length} bytes, but the whole "
                f"file has {size}; {_AGAIN}",
            )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            kinds = {key: part.get_dtype() for key, part in slices.items()}
            metadata = file.metadata() or {}
    except Exception as error:  # noqa: BLE001 - in whatever way the library takes it
        raise _bad(path, f"{_refusal(one_line(error), size)}; {_AGAIN}") from None
    for key, kind in kinds.items():
        if kind not in _DTYPES or len(shapes[key]) > _MOST_DIMENSIONS:
            stored = f"as {one_line(kind, 20)!r}" if kind not in _DTYPES else f"with {len(shapes[key])} dimensions"
            raise _bad(
                path,
                f"stores tensor {one_line(key, 80)!r} {stored}, which FlexIP cannot read; "
                "choose a file in float32, float16 or bfloat16",
            )
    return Header(path, shapes, {key: _dtype_name(_DTYPES[kind]) for key, kind in kinds.items()}, metadata)


def _refusal(error: str, size: int) -> str:
    """What the safetensors library has found, in our own words. It checks that every byte belongs to one tensor, whose shape fits."""
    if tensor := re.search(r"offset for tensor `(.*)`", error):
        return f"is damaged: tensor {one_line(tensor[1], 80)!r} overlaps another one or leaves a gap before it"
    if "not fully covered" in error:
        return f"is cut off or too long: its header describes more or fewer bytes than the {size} that the file has"
    if "invalid shape" in error or "overflow" in error:
        return "is damaged: shape, type and size of a tensor in its header do not agree"
    return "is damaged or not safetensors (its header is not valid JSON of tensors and texts)"


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    zipped = _check_zip(path)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # about pickle protocols: an error follows or nothing does
            (scan_zip if zipped else _scan_legacy)(path)
            # mmap: tensors stay in the file until used, and views cost nothing. Only the zip format can be mapped.
            mapped = zipped and path.suffix != ".safetensors"  # by a path, torch would believe that ending
            source: Any = str(path) if mapped else stack.enter_context(path.open("rb"))
            data = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except NotPlain:
        raise _bad(
            path,
            "contains Python objects other than weights, which could run code, so it was not opened; "
            "use a .safetensors version of it",
        ) from None
    except NotAsTorchPacks:
        raise _bad(
            path,
            "is not packed as PyTorch packs weights, so it was not opened; "
            f"{_AGAIN} or use a .safetensors version of it",
        ) from None
    except TooManyOpcodes:
        raise _bad(
            path, "describes far more than weights, so it was not opened; use a .safetensors version of it"
        ) from None
    except FalseSize:
        raise _bad(path, f"is damaged: it describes larger tensors than it holds; {_AGAIN}") from None
    except Exception:  # noqa: BLE001 - a damaged pickle can fail with any exception
        raise _bad(path, f"is a damaged or cut off torch.save file of {path.stat().st_size} bytes; {_AGAIN}") from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in _flatten(path, data, "", 0, itertools.count()):
        if key in tensors:
            raise _bad(
                path, f"contains two tensors with the name {one_line(key, 80)!r}; use a .safetensors version of it"
            )
        tensors[key] = tensor
    if not tensors:
        raise _bad(path, "contains no tensors; choose a file with weights")
    return tensors


def _check_zip(path: Path) -> bool:
    """True for torch's zip format. Compressed entries are refused: torch writes none, and they could be bombs."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    size = path.stat().st_size
    cut = f"is a damaged or cut off torch.save file of {size} bytes; {_AGAIN}"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # noqa: BLE001 - a damaged archive can fail with any exception
        raise _bad(path, cut) from None
    if any("/code/" in e.filename for e in entries):
        raise _bad(
            path, "is a TorchScript program, not plain weights, so it was not opened; use a .safetensors version of it"
        )
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise _bad(path, "is a compressed archive, not a torch.save file; unpack it and choose the weight file inside")
    return True


def _scan_legacy(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        scan_legacy(mapped, len(mapped))


def _flatten(
    path: Path, data: Any, prefix: str, depth: int, count: Iterator[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts under dotted names; step counters, optimizer settings and the like are skipped."""
    if not isinstance(data, dict):
        return
    if depth > _DEEPEST_NESTING:
        raise _bad(path, "nests its tensors too deeply for a weight file; use a .safetensors version of it")
    for key, value in data.items():
        if next(count) > _MOST_ENTRIES:
            raise _bad(path, f"has more than {_MOST_ENTRIES} entries; use a .safetensors version of it")
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _flatten(path, value, f"{prefix}{key}.", depth + 1, count)
