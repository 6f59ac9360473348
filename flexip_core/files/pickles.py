"""Looks through a torch.save file's pickle before torch reads it: nothing is built, and every claimed size is checked.

What this guards is memory. Against code, torch's own loader is guard enough: `weights_only` runs none. But it allocates what a
pickle claims, before it looks at what the file holds: storages of any size in the old format, tensors
larger than their storage, `torch.Tensor(2**40)`. Only what plain weights need passes here; the opcodes are those that torch
reads, so that both read the same. For the same reason a zipped file must be packed in the one way that torch and Python's
zipfile, which is used here, cannot understand differently.

It relies on `pickle._Unpickler`, the reader in Python that CPython keeps beside the one in C, which is not a public name. Run on
CPython 3.10.13, 3.11.7, 3.12.1 and 3.13.0: whole files pass in both formats, false sizes and foreign names are refused; all its
tests run on 3.11.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_CODES = (
    pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS,
    pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE, pickle.NEWFALSE,
    pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINPERSID,
    pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.LONG1, pickle.PROTO, pickle.STOP,
)  # fmt: skip
_BYTES = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Double": 8,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "Untyped": 1,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
_LEGACY_PICKLES = 5  # magic number, protocol, machine, the data, names of the storages
MOST_OPCODES = 1_000_000  # of one pickle; a tensor takes about 30
_PICKLE = "data.pkl"  # its name in a zipped file, in the one folder at the top


class NotPlain(ValueError):
    """Something other than weights."""


class FalseSize(ValueError):
    """Sizes that the file does not hold."""


class TooManyOpcodes(ValueError):
    """More than any file of weights needs."""


class NotAsTorchPacks(ValueError):
    """A zipped file in which torch could find other contents than we do."""


class _Name(NamedTuple):
    """What a global stands for; it is never imported."""

    module: str
    name: str


class _Storage(NamedTuple):
    elements: int


class _Inert:
    """A tensor or another value that is not looked at."""


def scan_zip(path: Path) -> None:
    """The pickle of a zipped file, against the bytes that are there for each storage."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        folder = next(iter(sizes)).partition("/")[0] + "/"
        if not _ends_after_its_list(file) or not _names_are_clear(archive.namelist(), folder):
            raise NotAsTorchPacks
        scan = _Scan(io.BytesIO(archive.read(folder + _PICKLE)))
    scan.load()
    for key, size in scan.claimed.items():
        if size > sizes.get(f"{folder}data/{key}", -1):
            raise FalseSize(key)


def _names_are_clear(names: list[str], folder: str) -> bool:
    """Torch looks into the folder of the first entry, ignoring case, and takes one of several equal names."""
    inside = [name.removeprefix(folder).lower() for name in names if name.startswith(folder)]
    pickles = [name for name in inside if name.endswith(_PICKLE)]
    return (
        len(names) == len(inside) == len(set(inside))
        and all(name.isascii() for name in inside)  # others have two spellings in bytes
        and pickles in ([], [_PICKLE])
    )


def _ends_after_its_list(file: BinaryIO) -> bool:
    """The list of entries stands where the end of the file says, with nothing in between or after it.

    Python's zipfile takes what is right before the end for the list, torch what the end points to.
    """
    list_end = file.seek(0, 2) - 22
    file.seek(max(0, list_end - 76))
    tail = file.read()
    mark, length, start = struct.unpack("<4s8xLL2x", tail[-22:])
    if tail[-42:-38] == b"PK\6\7":  # the end as torch writes it, for large files
        list_end -= 76
        (record,) = struct.unpack("<8xQ4x", tail[-42:-22])
        large_mark, length, start = struct.unpack("<4s36xQQ", tail[-98:-42])
        if (large_mark, record) != (b"PK\6\6", list_end):
            return False
    return mark == b"PK\5\6" and start + length == list_end


def scan_legacy(file: Any, size: int) -> None:
    """The pickles of a file in the format before torch 1.6, which has `size` bytes with the storages."""
    scans = [_Scan(file) for _ in range(_LEGACY_PICKLES)]
    for scan in scans:
        scan.load()
    if sum(sum(scan.claimed.values()) for scan in scans) > size:
        raise FalseSize


class _Codes(dict):
    """Opcode -> what to do. Their number is limited: some are one byte in the file and hundreds in memory."""

    def __init__(self, codes: dict[int, Callable]) -> None:
        super().__init__(codes)
        self.left = MOST_OPCODES

    def __getitem__(self, code: int) -> Callable:
        self.left -= 1
        if self.left < 0:
            raise TooManyOpcodes
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable:
        raise NotPlain


class _Scan(pickle._Unpickler):  # the one in C allocates as much as numbers in the file claim
    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _CODES}

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.dispatch = _Codes(self.dispatch)
        self.claimed: dict[str, int] = {}  # storage -> bytes

    def find_class(self, module: str, name: str) -> _Name:
        return _Name(module, name)

    def persistent_load(self, saved: Any) -> _Storage:
        match saved:
            case ("storage", _Name("torch" | "torch.storage", kind), str(key), str(), int(elements), *view):
                each = _BYTES.get(kind.removesuffix("Storage"))
                if each is None or any(part is not None for part in view):  # views went out with torch 0.3
                    raise NotPlain
                if elements < 0:
                    raise FalseSize(key)
                self.claimed[key] = max(elements * each, self.claimed.get(key, 0))
                return _Storage(elements)
        raise NotPlain

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise NotPlain
        self.stack[-1] = _made(function, args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if (
            type(self.stack[-1]) is not dict or type(state) is not dict
        ):  # attributes of an OrderedDict, such as _metadata
            raise NotPlain

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set(self.stack[-1], items)

    def load_append(self) -> None:
        _extend(self.stack[-2], [self.stack.pop()])

    def load_appends(self) -> None:
        items = self.pop_mark()
        _extend(self.stack[-1], items)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends


def _set(target: Any, items: list) -> None:
    if type(target) is not dict:
        raise NotPlain
    for key, value in zip(items[::2], items[1::2]):
        _check_key(key)
        target[key] = value


def _extend(target: Any, items: list) -> None:
    if type(target) is not list:
        raise NotPlain
    target.extend(items)


def _check_key(key: Any) -> None:
    if type(key) not in (str, int, float, bool, type(None)):  # hashing nested tuples can take forever
        raise NotPlain


def _made(function: _Name, args: tuple) -> Any:
    """What calling an allowed global gives, as far as the sizes need it."""
    match function, args:
        case (
            _Name("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"),
            (_Storage(elements), offset, size, stride, *_),
        ):
            return _tensor(elements, offset, size, stride)
        case (
            _Name("torch._utils", "_rebuild_tensor_v3"),
            (_Storage(elements), offset, size, stride, _, _, _Name("torch", dtype), *_),
        ):
            bits = int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8)  # float8_e4m3fn, uint16
            return _tensor(elements * 8 // max(bits, 8), offset, size, stride)
        case (_Name("torch._utils", "_rebuild_parameter"), (_Inert() as tensor, *_)):
            return tensor
        case (_Name("collections", "OrderedDict"), ()):
            return {}
        case (_Name("collections", "OrderedDict"), (list(pairs),)):  # as Python 2 wrote it
            if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                raise NotPlain
            made: dict = {}
            _set(made, [part for pair in pairs for part in pair])
            return made
        case (_Name("collections", "Counter"), (dict(),)) | (_Name("torch", "Size"), (tuple(),)):
            return _Inert()
        case (_Name("builtins" | "__builtin__", "set"), (list(members),)):
            for member in members:
                _check_key(member)
            return _Inert()
        case (_Name("torch", "device"), _) | (_Name("_codecs", "encode"), (str(), "latin1")):
            return _Inert()
    raise NotPlain


def _tensor(elements: int, offset: Any, size: Any, stride: Any) -> _Inert:
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise FalseSize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if (all(size) and last >= elements) or offset > elements:  # torch would make the storage larger
        raise FalseSize
    return _Inert()
