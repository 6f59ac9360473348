"""CLIP-IQA (Wang, Chan, Loy 2023): how probable CLIP finds "Good photo." against "Bad photo.", as a number in 0..1.

OpenAI's CLIP RN50 sees the picture at its own size, because scaling would hide its faults. Therefore the attention pool
has no positions, which exist for 7 x 7 places only. (pyiqa's "clipiqa+" and its averages over several pairs of
words are other scores.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..encoders import text_tower
from ..encoders.layouts import EncoderFile, TowerShape
from ..encoders.text_tower import TextFile
from ..files.weights import Header, read_header, read_tensors, read_weights
from ..measuring.scores import cosine
from .metrics import encode_prompts, pixels

PROMPTS = ("Good photo.", "Bad photo.")
SCALE = 100  # CLIP's learned exp(logit_scale), which training held at this bound
SMALLEST = 32  # pixels: the ResNet halves its picture five times
_POSITIONS = "attnpool.positional_embedding"
_FIRST = "layer1.0.conv1.weight"
_RN50 = (64, (3, 4, 6, 3), 7, 1024)
_MOST_PIXELS = 2**21  # at once: 8 pictures of 512 px; bounds the memory


@dataclass(frozen=True)
class ResNetFile:
    """A CLIP whose image tower is CLIP's ResNet, with its text tower."""

    name: str
    path: Path
    prefix: str  # before the keys of the image tower
    width: int
    layers: tuple[int, ...]
    grid: int  # positions per side, which are not used
    out: int  # width of the embedding
    text: TextFile
    openai: bool | None  # whose weights; None: the file does not tell

    @property
    def title(self) -> str:
        return f"{'OpenAI ' if self.openai else ''}CLIP {'RN50' if self._is_rn50 else f'ResNet of width {self.width}'}"

    @property
    def standard(self) -> bool:
        return self._is_rn50 and self.openai is not False

    @property
    def remark(self) -> str:
        hidden = "it is stored in half precision, which hides whose weights they are: they are taken for OpenAI's"
        return hidden if self.openai is None else ""

    @property
    def _is_rn50(self) -> bool:
        return (self.width, self.layers, self.grid, self.out) == _RN50


def identify(name: str, header: Header) -> ResNetFile | None:
    """The CLIP ResNet in a file, by names and shapes; None if there is none. ValueError if it has no text tower."""
    prefixes = [key.removesuffix(_POSITIONS) for key in header.shapes if key.endswith(_POSITIONS)]
    prefix = next((p for p in prefixes if p + _FIRST in header.shapes and p[-1:] in ("", ".")), None)
    if prefix is None:
        return None
    try:
        width = header.shapes[prefix + _FIRST][0]
        out = header.shapes[f"{prefix}attnpool.c_proj.weight"][0]
        positions = header.shapes[prefix + _POSITIONS][0]
    except (KeyError, IndexError):
        raise ValueError(f"{name} has an incomplete CLIP ResNet; download it again.") from None
    layers = tuple(
        len({key.split(".")[0] for key in _after(header.shapes, f"{prefix}layer{number}.")}) for number in (1, 2, 3, 4)
    )
    shape = TowerShape("clip", width, sum(layers), 4 * width, SMALLEST, positions - 1, out)
    text = text_tower.find_text_tower(name, header.shapes, EncoderFile("open_clip", shape, prefix))
    grid = isqrt(positions - 1)
    return ResNetFile(name, header.path, prefix, width, layers, grid, out, text, _openai(header, prefix))


def _after(keys, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _openai(header: Header, prefix: str) -> bool | None:
    """OpenAI's code rounds convolutions, but not batch norms, to half precision before anybody gets them.

    So its files hold half precision convolutions beside float32 norms, or float32 ones that are all exactly half
    precision numbers. (See scorer_files.) None for a file that is in half precision throughout.
    """
    stored, norm = header.dtypes[prefix + _FIRST], header.dtypes.get(f"{prefix}layer1.0.bn1.weight")
    if stored == "float32":
        weight = read_tensors(header.path, [prefix + _FIRST])[prefix + _FIRST]
        return torch.equal(weight.half().float(), weight)
    return True if stored == "float16" and norm == "float32" else None


def build(file: ResNetFile) -> nn.Module:
    """open_clip's ResNet without positions, on the meta device. ValueError unless the file has exactly its tensors."""
    from open_clip.modified_resnet import ModifiedResNet  # slow to import

    with torch.device("meta"):
        model = ModifiedResNet(
            list(file.layers), file.out, heads=file.width // 2, image_size=SMALLEST * file.grid, width=file.width
        )
        model.attnpool.positional_embedding = nn.Parameter(torch.empty(1, 32 * file.width))
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if _is_read(key)}
    shapes = {
        key.removeprefix(file.prefix): shape
        for key, shape in read_header(file.path).shapes.items()
        if key.startswith(file.prefix)
    }
    odd = [key for key in wanted if shapes.get(key) != wanted[key]]
    odd += [key for key in shapes if file.prefix and _is_read(key) and key not in wanted]
    if odd:
        raise ValueError(
            f"{file.name} is not a whole CLIP ResNet of width {file.width}: its {odd[0]} is {shapes.get(odd[0], 'missing')} "
            f"instead of {wanted.get(odd[0], 'missing')} ({len(odd)} such tensors); use another file."
        )
    return model


def _is_read(key: str) -> bool:
    return key != _POSITIONS and not key.endswith("num_batches_tracked")  # a counter of training


def load_resnet(file: ResNetFile) -> nn.Module:
    """As `build`, with the file's weights in float32 on the CPU, in eval mode, frozen."""
    model = build(file)
    keys = [key for key in model.state_dict() if _is_read(key)]
    tensors = read_weights(file.path, [file.prefix + key for key in keys])
    state = {key: tensors[file.prefix + key].float() for key in keys}
    state |= {key: torch.zeros((), dtype=torch.long) for key in model.state_dict() if not _is_read(key)}
    state[_POSITIONS] = torch.zeros(1, 32 * file.width)  # one row of zeros is added to any number of places
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def probability_of_good(pictures: Tensor, good: Tensor, bad: Tensor) -> Tensor:
    """Embeddings (n, d) of pictures, (d,) of the two prompts -> (n,) in 0..1, float64."""
    return (SCALE * cosine(pictures, torch.stack([good, bad]))).softmax(1)[:, 0]


class QualityScorer:
    """CLIP-IQA by one file, in float32 on `device`."""

    def __init__(self, file: ResNetFile, device: torch.device | str) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.statistics = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        self.file, self.device = file, device
        self.model = load_resnet(file).to(device)
        text = text_tower.load_text_tower(file.name, file.path, file.text, quick_gelu=True)  # all CLIP ResNets have it
        prompts = encode_prompts(text, PROMPTS, file.text.shape.context, device)
        self.good, self.bad = (prompts[prompt] for prompt in PROMPTS)

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes from 32 px on -> (n,)."""
        return probability_of_good(self.embed(pictures), self.good, self.bad)

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes from 32 px on -> embeddings (n, d), float32 on the CPU."""
        found = []
        for (width, height), group in groupby(pictures, key=lambda picture: picture.size):
            batch = torch.stack([pixels(picture, *self.statistics) for picture in group])
            for part in batch.split(max(1, _MOST_PIXELS // (width * height))):
                found.append(self.model(part.to(self.device)).float().cpu())
        return torch.cat(found)
