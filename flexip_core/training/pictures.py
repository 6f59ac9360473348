"""Pictures of training data: files decoded to RGB, the square that becomes a target, the cut that becomes a reference.

What is decided here:
- Transparent pixels become white: the target is what the model learns to draw. The alpha channel is the mask of the subject,
  unless a mask lies beside the picture.
- A target is the largest square of its picture, in the middle or, with a mask, around the middle of the subject.
- Pictures are kept no larger than `MORE_THAN_SIZE` times what is drawn, so that many fit into memory. That is done when they
  are decoded, so it does not depend on what is in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from ..pictures.opened import FORMATS, MOST_PIXELS, open_picture, refuse_large
from .data import INVARIANT

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CLIPS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
DECODED = 2 * MOST_PIXELS  # at one time, by all threads together
MORE_THAN_SIZE = 2
CUT_DRAWS = 6  # numbers in 0..1 that `draw_cut` takes
CUTS = 4  # references of one picture and kind in a cache, as `fixed_cuts` gives them
_READERS = {".mp4": "mov", ".mov": "mov", ".m4v": "mov", ".webm": "matroska", ".mkv": "matroska", ".avi": "avi"}
_VISIBLE = 128  # of 255: from here on a pixel of a mask is the subject
_WHITE = (255, 255, 255)
_BLUR = 8  # a blurred ground has that many patches each way


@dataclass(frozen=True)
class CutOptions:
    """Shares and ranges of how references are made (all are chances or shares in 0..1)."""

    subject: float = 0.5  # of variant references with a mask: the subject alone; the others whole
    invariant_subject: float = 0.5  # of invariant references with a mask: the subject alone
    invariant_whole: float = 0.3  # of invariant references: the target itself; the rest is a part of it
    blurred: float = 0.5  # of subjects alone: on the blurred picture instead of white
    margin: tuple[float, float] = (0.1, 0.2)  # around the subject, on each side, of the longer side of its box
    area: tuple[float, float] = (0.6, 1.0)  # of the target, shown by a part of it


@dataclass(frozen=True)
class Cut:
    """How one reference is made. Fields that a mode does not look at keep their defaults, so equal cuts are equal."""

    mode: str  # "whole": the target square; "part" of it; "subject" alone
    area: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)  # of a part: left, top; 0 and 1 are the edges
    margin: float = 0.0
    blurred: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    rgb: Image.Image
    mask: Image.Image | None  # "L", as large as rgb; never empty
    whole: tuple[int, int] | None = None  # width and height before it was made smaller; None: as rgb

    @property
    def bytes(self) -> int:
        width, height = self.rgb.size
        return width * height * (3 if self.mask is None else 4)


def draw_cut(options: CutOptions, kind: int, masked: bool, draws: list[float]) -> Cut:
    """From CUT_DRAWS numbers in 0..1: the mode, the ground, the margin, the area, and the place (x, y)."""
    mode, ground, margin, area, x, y = draws
    if kind == INVARIANT:
        subject = options.invariant_subject if masked else 0.0
        # without a mask, whole and part keep the proportion that they have to each other
        whole = options.invariant_whole / (1 if masked else 1 - options.invariant_subject or 1)
    else:
        subject, whole = (options.subject if masked else 0.0), 1.0
    if mode < subject:
        return Cut("subject", margin=_between(options.margin, margin), blurred=ground < options.blurred)
    if mode < subject + whole:
        return Cut("whole")
    return Cut("part", area=_between(options.area, area), place=(x, y))


def fixed_cuts(options: CutOptions, kind: int, masked: bool, count: int) -> list[Cut]:
    """`count` cuts that stand for all that could be drawn: the modes in their shares, the rest from a fixed seed.

    The same ones for every picture, so that a cut is a part of the name under which features are kept.
    """
    draws = torch.rand(count, CUT_DRAWS, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    draws[:, 0] = (torch.arange(count) + 0.5) / count
    draws[:, 1] = (torch.arange(count) % 2 + 0.5) / 2  # grounds in turn
    return [draw_cut(options, kind, masked, row.tolist()) for row in draws]


def target_box(picture: Picture) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the largest square: in the middle, or around the subject's middle."""
    width, height = picture.rgb.size
    side = min(width, height)
    x, y = width / 2, height / 2
    if picture.mask is not None:
        left, top, right, bottom = subject_box(picture.mask)
        x, y = (left + right) / 2, (top + bottom) / 2
    left, top = (min(max(middle - side / 2, 0), length - side) for middle, length in ((x, width), (y, height)))
    return left, top, left + side, top + side


def target_place(picture: Picture, size: int, flip: bool = False) -> torch.Tensor:
    """(4,): height and width of the whole picture, and top and left of the target in it as it was scaled for that, as SDXL reads them."""
    left, top, right, _ = target_box(picture)
    scale = size / (right - left)
    if flip:
        left = picture.rgb.width - right
    width, height = picture.whole or picture.rgb.size
    return torch.tensor([height, width, round(top * scale), round(left * scale)])


def target(picture: Picture, size: int, flip: bool = False) -> torch.Tensor:
    """(3, size, size) in -1..1."""
    return _tensor(_part(picture.rgb, target_box(picture), size), flip)


def reference(picture: Picture, cut: Cut, size: int, flip: bool = False) -> torch.Tensor:
    """(3, size, size) in -1..1. A subject alone of a picture without a mask is the whole picture."""
    if cut.mode == "subject" and picture.mask is not None:
        return _tensor(_subject(picture, cut, size), flip)
    left, top, right, bottom = target_box(picture)
    if cut.mode == "part":
        side = (right - left) * cut.area**0.5
        left += cut.place[0] * (right - left - side)
        top += cut.place[1] * (bottom - top - side)
        right, bottom = left + side, top + side
    return _tensor(_part(picture.rgb, (left, top, right, bottom), size), flip)


def subject_box(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what is white; None for an empty mask."""
    return mask.point(lambda value: 255 * (value >= _VISIBLE)).getbbox()


def _subject(picture: Picture, cut: Cut, size: int) -> Image.Image:
    """A square around the subject; around it and beyond the picture's edges there is only background."""
    left, top, right, bottom = subject_box(picture.mask)
    side = round(max(right - left, bottom - top) * (1 + 2 * cut.margin))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    box = (x, y, x + side, y + side)
    mask = picture.mask.crop(box).resize((size, size), Image.Resampling.BICUBIC)  # black beyond the edges
    subject = picture.rgb.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if cut.blurred:
        width, height = picture.rgb.size
        inside = picture.rgb.crop((max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)))
        ground = inside.resize((_BLUR, _BLUR), Image.Resampling.BOX).resize((size, size), Image.Resampling.BICUBIC)
    else:
        ground = Image.new("RGB", (size, size), _WHITE)
    return Image.composite(subject, ground, mask)


def _part(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _tensor(image: Image.Image, flip: bool) -> torch.Tensor:
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def _between(span: tuple[float, float], draw: float) -> float:
    return span[0] + (span[1] - span[0]) * draw


class Budget:
    """How many pixels are decoded at one time, by whichever threads. One picture alone always is."""

    def __init__(self, most: int):
        self.most, self.used = most, 0
        self._change = threading.Condition()

    @contextlib.contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        """Waits until they are free. A thread holds one picture at a time, so no thread waits for a waiting one."""
        pixels = min(pixels, self.most)
        with self._change:
            self._change.wait_for(lambda: self.used + pixels <= self.most)
            self.used += pixels
        try:
            yield
        finally:
            with self._change:
                self.used -= pixels
                self._change.notify_all()


DECODING = Budget(DECODED)


def pixels_of(file: BinaryIO, name: str, at_least: int | None = None) -> int:
    """How many pixels decoding will give (a frame of a clip, a picture as `decode_picture` reads it), by the header alone.

    ValueError naming what cannot be read; `file` is at its beginning again.
    """
    try:
        if os.path.splitext(name)[1].lower() in CLIPS:
            with _opened_clip(file, name) as stream:
                return stream.width * stream.height
        try:
            image = open_picture(file)
            if at_least:
                image.draft(None, (at_least, at_least))
            return image.width * image.height
        except Exception as error:  # noqa: BLE001 - damaged files fail with any exception
            raise ValueError(unreadable(name, error)) from None
    finally:
        file.seek(0)


class MaskMisfit(ValueError):
    """A mask that is not as large as its picture."""


@dataclass(frozen=True, eq=False)
class Decoded:
    rgb: Image.Image
    alpha: Image.Image | None  # "L", where there is transparency
    size: tuple[int, int]  # of the whole picture, upright; rgb may be smaller


def decode_picture(file: BinaryIO, name: str, at_least: int | None = None) -> Decoded:
    """RGB, turned as its EXIF data say. With `at_least` a JPEG may be read at a half, a quarter or an eighth of its size.

    Neither side gets shorter than `at_least` then. ValueError naming the picture if it cannot be read.
    """
    try:
        image = open_picture(file)
        size = image.size
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # lies on its side
            size = size[::-1]
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are decimal numbers of unknown range; save it with 8 or 16 bits per channel")
        image = _eight_bit(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            rgb = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, _WHITE), alpha)
            return Decoded(rgb, alpha if alpha.getextrema()[0] < 255 else None, size)
        return Decoded(image.convert("RGB"), None, size)
    except Exception as error:  # noqa: BLE001 - damaged files fail with any exception
        raise ValueError(unreadable(name, error)) from None


def decode_mask(file: BinaryIO, name: str, size: tuple[int, int]) -> Image.Image:
    """ "L", white = subject. MaskMisfit, from its header, unless it has the `size` of its picture."""
    try:
        image = open_picture(file)
        if image.size != size:
            raise MaskMisfit(
                f"Training data: the mask {name} has {image.width} x {image.height} pixels, its picture {size[0]} x {size[1]}; "
                "make it again at the picture's size."
            )
        image.load()
        image = _eight_bit(image)
        # a mask that is nothing but transparency is its alpha channel; else transparency does not matter
        if image.mode in ("RGBA", "LA") and max(high for _, high in _extrema(image)[:-1]) == 0:
            return image.getchannel("A")
        return image.convert("RGB").convert("L") if image.mode == "P" else image.convert("L")
    except MaskMisfit:
        raise
    except Exception as error:  # noqa: BLE001
        raise ValueError(unreadable(name, error)) from None


def has_alpha(file: BinaryIO) -> bool:
    """Whether a picture file can have transparent pixels, without decoding it. False if it cannot be read."""
    try:
        return open_picture(file).has_transparency_data
    except Exception:  # noqa: BLE001
        return False


def unreadable(name: str, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if "cannot identify image file" in reason:
        reason = f"it is none of {', '.join(FORMATS)}"
    return f"Training data: {name} cannot be read ({reason[:160]}); replace it or take it out."


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    return [image.getchannel(band).getextrema() for band in image.getbands()]


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits are scaled; PIL's own conversion would cut them off at 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8))
    return image


def reduced(picture: Image.Image, mask: Image.Image | None, size: int, whole: tuple[int, int] | None = None) -> Picture:
    """No larger than needed for targets of `size`: the shorter side at most MORE_THAN_SIZE times that. `whole`: its size in the file."""
    whole = whole or picture.size
    scale = MORE_THAN_SIZE * size / min(picture.size)
    if scale < 1:
        smaller = tuple(max(1, round(length * scale)) for length in picture.size)
        picture = picture.resize(smaller, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if mask is not None:
        if mask.size != picture.size:
            mask = mask.resize(picture.size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        if subject_box(mask) is None:
            mask = None
    return Picture(picture, mask, whole)


def clip_length(file: BinaryIO, name: str) -> int:
    """Number of frames. ValueError naming the clip, RuntimeError without PyAV."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with _opened_clip(file, name) as stream:
        frames = stream.frames or sum(packet.size > 0 for packet in stream.container.demux(stream))
        if frames > size:  # no format keeps a frame in less than a byte
            raise ValueError(f"its header claims {frames} frames, which its {size} bytes cannot hold")
        return frames


def decode_frame(file: BinaryIO, name: str, number: int, frames: int) -> Image.Image:
    """The frame with that number (from 0) of a clip with `frames` of them, upright."""
    with _opened_clip(file, name) as stream:
        container = stream.container
        stream.thread_type = "NONE"  # the loader's own threads are enough
        if not stream.duration:
            frame = next(itertools.islice(container.decode(stream), number, None))
            return _upright(frame)
        # by time, because a clip may be cut anywhere: no other way finds a frame without decoding all before it
        begin, step = stream.start_time or 0, stream.duration / frames
        wanted = begin + (number - 0.5) * step
        container.seek(int(begin + number * step), stream=stream, backward=True)
        last = None
        for last in container.decode(stream):
            if last.pts is not None and last.pts >= wanted:
                break
        if last is None:
            raise ValueError(f"frame {number} of {frames} is missing")
        return _upright(last)


@contextlib.contextmanager
def _opened_clip(file: BinaryIO, name: str) -> Iterator[Any]:
    """The first video stream. Whatever fails while it is open is a ValueError naming the clip.

    The reader is chosen by the name's ending: by contents, FFmpeg would also find lists and session descriptions, and follow them to
    other files and into the network.
    """
    av = _av()
    try:
        with av.open(file, format=_READERS[os.path.splitext(name)[1].lower()]) as container:
            stream = container.streams.video[0]
            refuse_large(stream.width, stream.height)
            # for frames that are larger than the header says
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield stream
    except Exception as error:  # noqa: BLE001 - damaged clips fail with any exception
        raise ValueError(_bad_clip(name, error)) from None


def _upright(frame) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if getattr(frame, "rotation", 0) else image


def _bad_clip(name: str, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"Training data: the clip {name} cannot be read ({reason[:160]}); convert it to mp4 (H.264) or take it out."


def _av():
    try:
        import av  # only clips need it
    except ImportError:
        raise RuntimeError(
            "Training data: clips need PyAV, which is not installed; install it (pip install av) or take the clips out."
        ) from None
    return av
