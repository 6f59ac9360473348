"""The scores of pictures, as the papers that use them define them, and the encoders behind them.

CLIP-T          cosine of the picture's and the prompt's embedding
CLIP-I, DINO-I  mean of the cosines with every real picture of the subject
CLIP-IQA        clip_iqa.py
Aesthetic       aesthetic.py

Published protocols scale the 8-bit picture with PIL, CLIP's by its own processor, DINO's by Resize(256, bicubic),
CenterCrop(224). So pictures are read and scaled with PIL here. The nodes' way (scorer_files.prepare, on tensors) does
not clip between the two passes of the scaling, 10 of 255 levels at most on DreamBench's photos, 0.08 on average, and
cuts pictures that are not square up to a pixel elsewhere. With random weights, cosines of two square photos moved by
up to 0.0001 (CLIP ViT-B/32) and 0.0008 (DINO ViT-S/16), of photos of 3:2 by up to 0.002 and 0.008: too much for scores
that are compared to the third decimal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..encoders import layouts, scorer_files, text_tower
from ..encoders.scorer_files import ScorerFile
from ..files.weights import name_of, read_header, read_tensors
from ..pictures.opened import open_picture

# --- on features ---


def clip_t(pictures: Tensor, prompts: Tensor) -> Tensor:
    """Embeddings (n, d) of pictures and of their prompts -> (n,), float64."""
    return (normalize(pictures.double(), dim=1) * normalize(prompts.double(), dim=1)).sum(1).clamp(-1, 1)


# --- pictures ---


def read_picture(path: Path) -> Image.Image:
    """The picture as viewers show it, 8-bit RGB. ValueError, naming the file, if it is none or damaged."""
    try:
        with open_picture(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"The picture {name_of(path)} does not exist.") from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: broken PNG
        raise ValueError(f"The picture {name_of(path)} cannot be read ({error}); make it again.") from None


def pixels(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture -> normalised pixels (3, h, w)."""
    values = torch.from_numpy(np.array(picture)).movedim(2, 0).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def square(picture: Image.Image, scorer: ScorerFile) -> Tensor:
    """An RGB picture -> normalised pixels (3, crop, crop) for this encoder, by the rules of its publishers."""
    short = min(picture.size)
    size = [scorer.resize if side == short else int(scorer.resize * side / short) for side in picture.size]
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    # where the rest is odd, transformers' crop (CLIP's processor) rounds down and torchvision's (DINO) to even
    left, top = (
        (side - scorer.crop) // 2 if scorer.kind == "clip" else round((side - scorer.crop) / 2) for side in size
    )
    middle = scaled.crop((left, top, left + scorer.crop, top + scorer.crop))
    return pixels(middle, *scorer_files.towers.normalisation(scorer.encoder))


# --- encoders ---


class ImageEncoder:
    """The image tower of a scorer file, in float32 on `device`."""

    def __init__(self, scorer: ScorerFile, device: torch.device | str) -> None:
        self.scorer, self.device = scorer, device
        self.tower = scorer_files.load_image_tower(scorer)
        _place_as_published(scorer, self.tower)
        self.tower.to(device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> what is compared (n, d), float32 on the CPU."""
        batch = torch.stack([square(picture, self.scorer) for picture in pictures])
        return scorer_files.embed(self.tower, batch.to(self.device)).float().cpu()


def _place_as_published(scorer: ScorerFile, tower: torch.nn.Module) -> None:
    """Resamples the positions of a DINOv2 without registers as transformers and its authors do, without antialias.

    timm smooths them, and published files have 37 x 37 positions for 16 x 16 patches. With registers, all smooth.
    (The authors also shift by 0.1 of a patch. transformers did and no longer does: so do not compare third decimals.)
    """
    shape = scorer.file.shape
    grid, side = isqrt(shape.positions), scorer.crop // shape.patch
    if shape.kind != "dino" or shape.registers or grid == side:
        return
    (key,) = layouts.tower_sources(read_header(scorer.path).shapes, scorer.file)["pos_embed"]
    positions = read_tensors(scorer.path, [key])[key].float()  # (1, [CLS] + n, width)
    first = positions.shape[1] - shape.positions
    patches = positions[:, first:].reshape(1, grid, grid, -1).movedim(-1, 1)
    patches = interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    placed = torch.cat([positions[:, :first], patches.flatten(2).mT], dim=1)
    tower.model.pos_embed = torch.nn.Parameter(placed, requires_grad=False)


@torch.no_grad()
def encode_prompts(
    tower: text_tower.TextTower, prompts: Iterable[str], context: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Every different prompt -> its embedding (d,), float32 on the CPU. What exceeds `context` tokens is cut off."""
    different = list(dict.fromkeys(prompts))
    tower = tower.to(device)
    found = [
        tower(text_tower.tokenize(different[i : i + 32], context)).float().cpu() for i in range(0, len(different), 32)
    ]
    return dict(zip(different, torch.cat(found))) if found else {}
