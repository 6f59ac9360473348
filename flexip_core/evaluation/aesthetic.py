"""Aesthetic: LAION's predictor of how much people like a picture, about 1 to 10, from OpenAI's CLIP ViT-L/14.

Five linear layers one after another (768, 1024, 128, 64, 16, 1; dropout between them in training only) on the embedding
of unit length. https://github.com/christophschuhmann/improved-aesthetic-predictor publishes two such files of the same
shapes; they are told apart by the last bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from ..files.weights import Header, read_tensors, read_weights

STANDARD = "sac+logos+ava1-l14-linearMSE.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)
_LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")  # the numbers between are dropout
_SHAPES = {
    f"{name}.{part}": (outputs, inputs) if part == "weight" else (outputs,)
    for name, inputs, outputs in zip(_LAYERS, WIDTHS, WIDTHS[1:])
    for part in ("weight", "bias")
}
_STANDARD_BIAS = 0.9899932  # layers.7.bias of the standard file; the other file's is 0.5037


@dataclass(frozen=True)
class AestheticFile:
    name: str
    path: Path
    prefix: str  # before layers.0
    standard: bool

    @property
    def title(self) -> str:
        return "LAION's aesthetic predictor sac+logos+ava1" if self.standard else "an aesthetic predictor"

    remark = ""


def identify(name: str, header: Header) -> AestheticFile | None:
    """The predictor in a file, by names and shapes; None if there is none."""
    first = next(iter(_SHAPES))
    for prefix in (key.removesuffix(first) for key in header.shapes if key.endswith(first)):
        if all(header.shapes.get(prefix + key) == shape for key, shape in _SHAPES.items()):
            bias = read_tensors(header.path, [f"{prefix}layers.7.bias"])[f"{prefix}layers.7.bias"].item()
            return AestheticFile(name, header.path, prefix, abs(bias - _STANDARD_BIAS) < 1e-2)  # also in bfloat16
    return None


class AestheticHead:
    """The predictor in float64 on the CPU: a few thousand multiplications per picture."""

    def __init__(self, file: AestheticFile) -> None:
        tensors = read_weights(file.path, [file.prefix + key for key in _SHAPES])
        parts = {key: tensors[file.prefix + key].double() for key in _SHAPES}
        self.layers = [(parts[f"{name}.weight"], parts[f"{name}.bias"]) for name in _LAYERS]

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """CLIP image embeddings (n, 768) of any length -> scores (n,)."""
        x = normalize(embeddings.double(), dim=1)
        for weight, bias in self.layers:
            x = linear(x, weight, bias)
        return x[:, 0]
