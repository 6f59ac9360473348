"""Reference pictures for the encoders: one square of `size` pixels, however the picture was shaped. Torch, on the CPU.

What is decided here:
- The neutral ground (borders of "pad" and "subject", what lies behind transparent pixels) is mid grey: it is close to every
  encoder's mean colour and, unlike that colour, the same for both encoders.
- An alpha channel is blended onto the neutral ground, because the colour of a transparent pixel is arbitrary. It is
  also the subject mask, unless a mask is wired.
- A wired mask only steers the crop "subject". It never changes pixels; "center", "pad" and "squash" do not look at it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

CROPS = ("center", "pad", "squash", "subject")
GROUND = 0.5
MARGIN = 0.15  # around the subject, on each side, of the longer side of its box
_ABSURD = 1e6  # far outside 0 to 1: scaling such numbers may overflow
_EMPTY = 1 / 255  # a mask that nowhere exceeds this is empty
# Longer strips are cut to this aspect before they are scaled: 16384 x 1 px would otherwise become 3.7 million x 224.
_LONGEST_STRIP = 16


def prepare(image: Tensor, mask: Tensor | None, crop: str, size: int) -> Tensor:
    """One picture (h, w, 1 | 3 | 4) in 0..1 -> (size, size, 3) in 0..1, float32 on the CPU.

    center: short side scaled to `size`, middle cut out, as ComfyUI does. pad: the whole picture on neutral ground.
    squash: the whole picture, the only crop that changes its proportions. subject: a square around `mask` (or the
    alpha channel) with a margin, inside the picture where possible, otherwise on neutral ground. `mask` is a ComfyUI MASK
    of 2 to 4 dimensions, 1 = subject, of any size (it is stretched to the picture); several are joined.
    ValueError, one sentence, for anything that is not a picture or mask, and for "subject" without a subject.
    """
    if crop not in CROPS:
        raise ValueError(f"The crop {crop!r} is unknown; choose {', '.join(CROPS)}.")
    if type(size) is not int or size < 1:
        raise ValueError(f"The size of the prepared picture must be a whole number of pixels above 0, got {size!r}.")
    image = _check_image(image)
    alpha = image[..., 3].clamp(0, 1) if image.shape[2] == 4 else None
    subject = as_masks(mask, "The mask").amax(0) if mask is not None else alpha
    picture = image[..., :3] if image.shape[2] >= 3 else image.expand(-1, -1, 3)
    if alpha is not None:
        picture = picture * alpha[..., None]
        picture += GROUND * (1 - alpha[..., None])  # in place: of 16384 x 16384 px a copy takes 3 GB
    picture = picture[None].movedim(-1, 1)  # 1 3 h w
    height, width = picture.shape[2:]
    if crop == "center":
        picture = _center(picture, size)
    elif crop == "pad":
        side = max(height, width)
        picture = _square(picture, (height - side) // 2, (width - side) // 2, side, size)
    elif crop == "squash":
        picture = _resize(picture, size, size)
    else:
        picture = _square(picture, *_subject_box(subject, height, width), size)
    return picture[0].movedim(0, -1).clamp(0, 1).contiguous()


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Prepared pictures (b, s, s, 3) in 0..1 -> pixels (b, 3, s, s) for a tower with that mean and std.

    Values are rounded to 8 bit first, as ComfyUI's clip_preprocess does, so that both see the same picture.
    """
    pixels = (255 * images.movedim(-1, 1)).clamp(0, 255).round() / 255
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    return (pixels - mean) / std


def as_masks(mask: torch.Tensor, name: str) -> torch.Tensor:
    """A ComfyUI MASK of 2 to 4 dimensions, one or a batch -> (m, height, width), float32 in 0..1 on the CPU."""
    if not isinstance(mask, torch.Tensor) or not 2 <= mask.ndim <= 4:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"{name} has the shape {shape} instead of height x width; connect a mask.")
    if mask.numel() == 0:
        raise ValueError(f"{name} has no pixels; connect a mask.")
    if mask.ndim == 4 and mask.shape[3] == 1 != mask.shape[1]:  # (b, h, w, 1), as some packs make it
        mask = mask[..., 0]
    mask = mask.detach().reshape(-1, *mask.shape[-2:]).to("cpu", torch.float32)
    if not finite(mask):
        raise ValueError(f"{name} contains values that are not numbers (NaN or infinite); connect another mask.")
    return mask.clamp(0, 1)


def finite(values: Tensor) -> bool:
    """Whether all are numbers. `isfinite` would make copies of a picture."""
    low, high = values.aminmax()  # both NaN if one value is
    return math.isfinite(low) and math.isfinite(high)


def _check_image(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise ValueError("The reference is not a ComfyUI image (decimal numbers from 0 to 1); connect an image.")
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"The reference has the shape {tuple(image.shape)} instead of height x width x 1, 3 or 4 "
            "channels; connect an image."
        )
    if image.numel() == 0:
        raise ValueError(f"The reference is empty ({image.shape[1]} x {image.shape[0]} pixels); connect an image.")
    image = image.detach().to("cpu", torch.float32)
    if not finite(image):
        raise ValueError(
            "The reference contains values that are not numbers (NaN or infinite); the node that made it "
            "failed, so use another picture."
        )
    if max(-image.min().item(), image.max().item()) > _ABSURD:
        image = image.clamp(0, 1)
    return image


def _resize(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[2:] == (height, width):
        return picture
    return interpolate(picture, size=(height, width), mode="bicubic", antialias=True)


def _center(picture: Tensor, size: int) -> Tensor:
    height, width = picture.shape[2:]
    short = min(height, width)
    longest = _LONGEST_STRIP * short
    longest += (max(height, width) - longest) % 2  # so that the middle stays the middle
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    picture = picture[:, :, top : top + longest, left : left + longest]
    height, width = picture.shape[2:]
    scale = size / short
    picture = _resize(picture, round(scale * height), round(scale * width))
    top, left = (picture.shape[2] - size) // 2, (picture.shape[3] - size) // 2
    return picture[:, :, top : top + size, left : left + size]


def _square(picture: Tensor, top: int, left: int, side: int, size: int) -> Tensor:
    """The square of the picture at top, left, scaled to `size`; what lies outside the picture becomes neutral ground.

    Scaled before it is padded: the square around a long strip would not fit into memory.
    """
    inside = picture[:, :, max(top, 0) : top + side, max(left, 0) : left + side]
    scale = size / side
    height, width = (max(1, round(scale * length)) for length in inside.shape[2:])
    above, before = min(round(scale * max(-top, 0)), size - height), min(round(scale * max(-left, 0)), size - width)
    margins = (before, size - width - before, above, size - height - above)
    return pad(_resize(inside, height, width), margins, value=GROUND)


def _subject_box(subject: Tensor | None, height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side, in pixels of the picture, of the square around the subject. May reach over the edges."""
    if subject is None:
        raise ValueError(
            'The crop "subject" needs to know where the subject is; connect a mask (white = subject), '
            "use a picture with transparency, or choose another crop."
        )
    peak = subject.max().item()
    if peak <= _EMPTY:
        raise ValueError(
            "The mask is empty (black everywhere), so there is no subject to crop to; paint the subject "
            "white, invert the mask, or choose another crop."
        )
    inside = subject >= peak / 2  # relative, so that a faint mask works, too
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    top, bottom = (v * height / subject.shape[0] for v in (rows[0].item(), rows[-1].item() + 1))
    left, right = (v * width / subject.shape[1] for v in (columns[0].item(), columns[-1].item() + 1))
    side = math.ceil(max(bottom - top, right - left) * (1 + 2 * MARGIN))
    side = min(max(side, 1), max(height, width))
    return _start((top + bottom) / 2, side, height), _start((left + right) / 2, side, width), side


def _start(center: float, side: int, length: int) -> int:
    """Where a span of `side` begins that is centred on the subject and then moved into the picture if possible."""
    if side > length:
        return (length - side) // 2
    return min(max(round(center - side / 2), 0), length - side)
