"""An encoded reference as a file, to share a subject without its picture (format version 1).

One safetensors file. Metadata: `flexip.reference` = "1", `flexip.needs` = JSON of the FeatureNeeds that it was encoded for,
`flexip.encoders` = the encoders in words. Tensors: `0.features.<name>` and `0.null.<name>`, where 0 numbers the reference in the
file; there is one so far. Reading is strict and nothing is ever unpickled, because such files come from strangers.

The file is not anonymous: patch tokens describe the picture place by place, and much of it can be reconstructed from them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch

from ..network.config import ClipConfig, DinoConfig, FeatureNeed, deeper_than
from ..run.reference import Reference
from .weights import Header, is_safetensors, name_of, one_line, read_header, read_tensors, write_atomically

SUFFIX = ".flexip-ref.safetensors"  # how the nodes tell these files from weights, without opening thousands of files
FORMAT = "1"
FORMAT_KEY = "flexip.reference"
NEEDS_KEY = "flexip.needs"
ENCODERS_KEY = "flexip.encoders"
LARGEST = 2 * 2**30  # bytes of all tensors; a picture takes a few MB
_LONGEST_JSON = 100_000
_PARTS = ("features", "null")
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
# kind of feature -> the encoder that makes it, and its shape
_KINDS = {
    "embedding": (ClipConfig, ("pictures", "width")),
    "penultimate": (ClipConfig, ("pictures", "tokens", "width")),
    "patches": (DinoConfig, ("pictures", "tokens", "width")),
}
_NULLS = ("zeros", "zero pixels")


def save_reference(reference: Reference, path: str | os.PathLike) -> None:
    """The file is there whole or not at all, and `load_reference` reads back the same bits.

    Raises ValueError for a reference that could not be loaded again, OSError if the file cannot be written.
    """
    tensors = {
        f"0.{part}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part in _PARTS
        for name, value in getattr(reference, part).items()
    }
    needs = json.dumps([need.to_dict() for need in reference.needs], sort_keys=True)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()}
    with _problems("This reference cannot be saved", "Encode it again"):
        _check_layout(_read_needs(needs), shapes, dtypes)
        _check_finite(tensors)
    metadata = {FORMAT_KEY: FORMAT, NEEDS_KEY: needs, ENCODERS_KEY: one_line(reference.encoders)}
    # not save_file: it makes files that other users of the machine cannot read
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_reference(path: str | os.PathLike) -> Reference:
    """Raises ValueError in one sentence, naming the file, unless it is a whole reference of this format."""
    path = Path(path)
    header = _checked_format(path)
    damaged, again = f"{name_of(path)} is damaged", "Save or download it again"
    with _problems(damaged, again):
        for key in (NEEDS_KEY, ENCODERS_KEY):
            if key not in header.metadata:
                raise ValueError(f"its metadata has no {key!r}")
        needs = _read_needs(header.metadata[NEEDS_KEY])
        _check_layout(needs, header.shapes, header.dtypes)
    # cloned, because the file may be replaced or deleted while the reference lives
    tensors = {key: value.clone() for key, value in read_tensors(path).items()}
    with _problems(damaged, again):
        _check_finite(tensors)
    features, null = ({need.name: tensors[f"0.{part}.{need.name}"] for need in needs} for part in _PARTS)
    return Reference(features, null, one_line(header.metadata[ENCODERS_KEY]), needs)


@contextmanager
def _problems(subject: str, advice: str) -> Iterator[None]:
    """Turns what a check below finds wrong into a message for people."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject}: {one_line(error, 300).rstrip('.')}. {advice}.") from None


def _checked_format(path: Path) -> Header:
    foreign = f"{name_of(path)} is not a reference saved by FlexIP. Choose a file that FlexIPSaveReference wrote."
    if not is_safetensors(path):
        raise ValueError(foreign)
    header = read_header(path)
    version = header.metadata.get(FORMAT_KEY)
    if version is None:
        raise ValueError(foreign)
    if version != FORMAT:
        raise ValueError(
            f"{name_of(path)} has reference format {one_line(version, 20)!r}, this version of the pack reads format {FORMAT!r}. "
            "Update the pack or save the reference again."
        )
    return header


def _read_needs(text: str) -> tuple[FeatureNeed, ...]:
    if len(text) > _LONGEST_JSON:
        raise ValueError(f"its metadata {NEEDS_KEY!r} is {len(text)} characters long, and the limit is {_LONGEST_JSON}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its metadata {NEEDS_KEY!r} is not JSON") from None
    if deeper_than(data, 5):  # list, need, encoder, its settings, a list in them
        raise ValueError(f"its metadata {NEEDS_KEY!r} is nested too deeply")
    if not isinstance(data, list) or not data:
        raise ValueError(f"its metadata {NEEDS_KEY!r} does not list what the reference was encoded for")
    needs = tuple(FeatureNeed.from_dict(entry, f"{NEEDS_KEY}[{number}]") for number, entry in enumerate(data))
    for need in needs:
        _check_need(need)
    if len({need.name for need in needs}) < len(needs):
        raise ValueError(f"its metadata {NEEDS_KEY!r} uses a name twice")
    return needs


def _check_need(need: FeatureNeed) -> None:
    for text in (need.name, need.encoder.model):
        if text != one_line(text, 200) or not text:
            raise ValueError(f"{text[:40]!r} is not the name of a feature or an encoder")
    if need.kind not in _KINDS:
        raise ValueError(f"{need.name} is of kind {need.kind!r}, expected one of {', '.join(_KINDS)}")
    if not isinstance(need.encoder, _KINDS[need.kind][0]):
        raise ValueError(f"{need.name} is of kind {need.kind!r}, which {need.encoder.model} does not make")
    if need.null not in _NULLS:
        raise ValueError(f"{need.name} has the null reference {need.null!r}, expected one of {', '.join(_NULLS)}")


def _check_layout(
    needs: tuple[FeatureNeed, ...], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> None:
    """Features and null of every need and nothing else, all for the same number of pictures."""
    expected = {f"0.{part}.{need.name}": need for part in _PARTS for need in needs}
    for key in expected:
        if key not in shapes:
            raise ValueError(f"it has no tensor {key}")
    for key in shapes:
        if key not in expected:
            raise ValueError(f"it has an unknown tensor {key[:80]!r}")
    for key, need in expected.items():
        shape, (_, wanted) = shapes[key], _KINDS[need.kind]
        if len(shape) != len(wanted) or shape[-1] != need.width or 0 in shape:
            raise ValueError(f"tensor {key} has shape {list(shape)}, expected [{', '.join(wanted[:-1])}, {need.width}]")
        if shape != shapes[f"0.features.{need.name}"]:
            raise ValueError(f"tensor {key} has shape {list(shape)}, but the features have another one")
        if dtypes[key] not in _DTYPES:
            raise ValueError(f"tensor {key} is stored as {dtypes[key]}, expected one of {', '.join(_DTYPES)}")
    pictures = sorted({shapes[key][0] for key in expected})
    if len(pictures) > 1:
        raise ValueError(
            f"its tensors are for {' and '.join(map(str, pictures))} pictures, expected the same number for all"
        )
    size = sum(math.prod(shapes[key]) * _DTYPES[dtypes[key]] for key in expected)
    if size > LARGEST:
        raise ValueError(f"it holds {size / 2**30:.1f} GB of features, and the limit is {LARGEST / 2**30:g} GB")


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"tensor {key} holds values that are not numbers (NaN or infinite)")
