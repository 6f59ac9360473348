"""CLIP's text tower: found in a CLIP file by keys and shapes, built as open_clip's TextTransformer, fed by its tokenizer.

The vocabulary ships inside open_clip, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.weights import read_weights
from .layouts import CLIP_BLOCKS_FROM_TRANSFORMERS, EncoderFile, Shape, renamed

VOCABULARY = 49408  # of CLIP's byte pair encoding, the only one that open_clip's tokenizer holds
HEAD_WIDTH = 64  # of every published CLIP text tower with that vocabulary; the number of heads is not in a file

_FROM_TRANSFORMERS = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.", ""),
    *CLIP_BLOCKS_FROM_TRANSFORMERS,
)
_OWN_KEYS = re.compile(r"^(cls_emb|token_embedding|positional_embedding|transformer|ln_final|text_projection)(\.|$)")


@dataclass(frozen=True)
class TextShape:
    """What the tensors of a text tower reveal."""

    width: int
    depth: int
    mlp: int
    context: int  # tokens of a prompt, begin and end included
    out: int  # width of the embedding


@dataclass(frozen=True)
class TextFile:
    """The text tower inside a CLIP file. `sources`: open_clip's name of a tensor -> the file's keys that make it."""

    layout: str  # "open_clip" or "transformers"
    shape: TextShape
    sources: Mapping[str, list[str]]


class TextTower(nn.Module):
    """open_clip's text transformer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (b, context) -> projected embedding (b, out), not scaled to unit length."""
        return self.model(tokens.to(self.model.positional_embedding.device))


def find_text_tower(name: str, shapes: Mapping[str, Shape], image: EncoderFile) -> TextFile:
    """The text tower beside the image tower `image` of the CLIP file `name`. ValueError, one sentence, without one."""
    layout, sources = _sources(shapes, image)
    if "token_embedding.weight" not in sources:
        raise ValueError(
            f"{name} has no text tower that FlexIP can read; use a CLIP file that holds both towers, such as "
            "model.safetensors of openai/clip-vit-base-patch32."
        )
    try:
        words, width = shapes[sources["token_embedding.weight"][0]]
        context = shapes[sources["positional_embedding"][0]][0]
        mlp = shapes[sources["transformer.resblocks.0.mlp.c_fc.weight"][0]][0]
        projection = shapes[sources["text_projection"][0]]
        out = projection[1] if layout == "open_clip" else projection[0]
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{name} has an incomplete text tower, or another kind than CLIP's; use another CLIP file."
        ) from None
    if words != VOCABULARY:
        raise ValueError(
            f"{name} has a text tower for a vocabulary of {words} tokens, FlexIP can only feed CLIP's {VOCABULARY}; "
            "use another CLIP file."
        )
    if out != image.shape.out:
        raise ValueError(
            f"{name} has a text tower for embeddings of width {out} beside an image tower for {image.shape.out}; "
            "use another CLIP file."
        )
    if width % HEAD_WIDTH:
        raise ValueError(f"{name} has a text tower of the unusual width {width}; use another CLIP file.")
    blocks = {key.split(".")[2] for key in sources if key.startswith("transformer.resblocks.")}
    return TextFile(layout, TextShape(width, len(blocks), mlp, context, out), sources)


def _sources(shapes: Mapping[str, Shape], image: EncoderFile) -> tuple[str, dict[str, list[str]]]:
    """The layout, and open_clip's name -> the file's keys, of all that may belong to a text tower beside `image`."""
    if image.layout == "transformers":
        prefix = image.prefix.removesuffix("vision_model.")
        keys = [k for k in shapes if k.startswith((f"{prefix}text_model.", f"{prefix}text_projection."))]
        keys = [k for k in keys if not k.endswith(".position_ids")]  # a counter in old files, no weight
        return "transformers", renamed(keys, prefix, _FROM_TRANSFORMERS)
    prefix = image.prefix.removesuffix("visual.")
    if f"{prefix}text.token_embedding.weight" in shapes:  # open_clip's CustomTextCLIP
        prefix += "text."
    return "open_clip", renamed(
        [k for k in shapes if k.startswith(prefix) and _OWN_KEYS.match(k[len(prefix) :])], prefix, ()
    )


def load_text_tower(
    name: str, source: str | Path | Mapping[str, Tensor], file: TextFile, quick_gelu: bool
) -> TextTower:
    """The text tower `file` of a CLIP file (or of its tensors) in float32 on the CPU, in eval mode, frozen.

    `quick_gelu` must be what the image tower uses. ValueError, naming the file `name`, if tensors are missing or
    misshapen.
    """
    shape = file.shape
    with torch.device("meta"):
        model = build_text_tower(shape, quick_gelu)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if wanted.keys() != file.sources.keys():
        odd = sorted(wanted.keys() ^ file.sources.keys())
        raise ValueError(
            f"{name} has a text tower with missing or unknown tensors ({odd[0]}, {len(odd)} in all); use another CLIP file."
        )
    keys = [key for parts in file.sources.values() for key in parts]
    tensors = source if isinstance(source, Mapping) else read_weights(source, keys)
    state = {}
    for key, parts in file.sources.items():
        value = torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]]
        if key == "text_projection" and file.layout == "transformers":
            value = value.t()
        if tuple(value.shape) != wanted[key]:
            raise ValueError(
                f"{name} has a text tower whose {key} has the shape {tuple(value.shape)} instead of {wanted[key]}; "
                "use another CLIP file."
            )
        state[key] = value.float()
    model.load_state_dict(state, strict=True, assign=True)
    model.attn_mask = model.build_causal_mask()  # no file holds it
    return TextTower(model).eval().requires_grad_(False)


def build_text_tower(shape: TextShape, quick_gelu: bool) -> nn.Module:
    from open_clip.model import _build_text_tower  # slow to import; create_model cannot build on the meta device

    cfg = {
        "context_length": shape.context,
        "vocab_size": VOCABULARY,
        "width": shape.width,
        "heads": shape.width // HEAD_WIDTH,
        "layers": shape.depth,
        "mlp_ratio": (shape.mlp + 0.5) / shape.width,  # open_clip rounds down
    }
    return _build_text_tower(shape.out, cfg, quick_gelu)


def tokenize(prompts: Sequence[str], context: int) -> Tensor:
    """Prompts -> token numbers (b, context); what does not fit is cut off."""
    return _tokenizer()(list(prompts), context_length=context)


def count_tokens(prompt: str) -> int:
    """Tokens of a prompt, begin and end included, before anything is cut off."""
    return len(_tokenizer().encode(prompt)) + 2


@functools.lru_cache(maxsize=1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
