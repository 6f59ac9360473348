"""The self-description that travels in every FlexIP checkpoint (safetensors metadata `flexip.config`).

The paper leaves depth, width and token counts open; they are fields here, with defaults taken from the public
IP-Adapter-Plus recipe where the paper is silent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .strict import Count, build, table

GATE_MODES = ("outputs", "tokens")


@dataclass(frozen=True)
class ClipConfig:
    """The high-level encoder: an open_clip image tower whose projected [CLS] embedding is used.

    `model` names an open_clip model. A tower that open_clip has no name for brings its own `vision_cfg`
    (the arguments of open_clip's CLIPVisionCfg); `model` is then only a label.
    """

    model: str = "ViT-H-14"
    width: Count = 1024  # of the projected [CLS] embedding
    vision_cfg: dict[str, Any] | None = None


@dataclass(frozen=True)
class DinoConfig:
    """The low-level encoder: a timm ViT whose normed patch tokens are used.

    `image_size` is what the encoder is run at; position embeddings are resampled to it by timm's rule.
    `args` overrides arguments of timm's model function (the mini encoders use it).
    """

    model: str = "vit_large_patch14_dinov2"
    width: Count = 1024  # of a patch token
    image_size: Count = 224
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResamplerConfig:
    width: Count = 768
    depth: Count = 4
    heads: Count = 12
    dim_head: Count = 64
    ff_mult: Count = 4


@dataclass(frozen=True)
class FeatureNeed:
    """One thing that adapters read from the reference, under the name by which they ask for it.

    kind: CLIP's projected [CLS] "embedding" (r, width), its "penultimate" tokens (r, n, width), or DINO's "patches"
    (r, p, width). null: what stands for "no reference": "zeros", or the encoder's answer to "zero pixels".
    """

    name: str
    encoder: ClipConfig | DinoConfig
    kind: str
    width: Count
    null: str = "zeros"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the encoder's "type" tells the two kinds of encoder apart."""
        kind = next(name for name, cls in ENCODER_TYPES.items() if isinstance(self.encoder, cls))
        data = dataclasses.asdict(self)
        return {**data, "encoder": {"type": kind, **data["encoder"]}}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "need") -> FeatureNeed:
        """Strict, like FlexIPConfig.from_dict."""
        if "encoder" in table(data, where):
            encoder = dict(table(data["encoder"], f"{where}.encoder"))
            kind = encoder.pop("type", None)
            if kind not in list(ENCODER_TYPES):  # a list: what JSON holds need not be hashable
                raise ValueError(f"{where}.encoder.type must be one of {', '.join(ENCODER_TYPES)}, got {kind!r}.")
            data = {**data, "encoder": build(ENCODER_TYPES[kind], encoder, f"{where}.encoder")}
        return build(cls, data, where)


ENCODER_TYPES = {"clip": ClipConfig, "dino": DinoConfig}


@dataclass(frozen=True)
class FlexIPConfig:
    """Everything that rebuilds the network from nothing but the file.

    `blocks` maps ComfyUI's address of each cross-attention ("input.1.0": block kind, number, transformer index) to its
    inner width. `text_width` is the width of the base's text tokens and of all tokens that the adapters produce.
    """

    base: str
    text_width: Count
    blocks: dict[str, Count]
    gate_mode: str = "outputs"
    clip: ClipConfig = ClipConfig()
    dino: DinoConfig = DinoConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    detail_tokens: Count = 16  # learned queries of the preservation adapter
    semantic_tokens: Count = 4  # the [CLS] embedding as queries of the preservation adapter
    cls_tokens: Count = 4  # the [CLS] embedding as context of the personalization adapter

    def __post_init__(self) -> None:
        if self.gate_mode not in GATE_MODES:
            raise ValueError(f"gate_mode must be one of {', '.join(GATE_MODES)}, got {self.gate_mode!r}.")
        if not self.blocks:
            raise ValueError("blocks is empty: a FlexIP checkpoint names at least one cross-attention block.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FlexIPConfig:
        """Strict: unknown or missing fields and wrong types raise ValueError naming the field."""
        return build(cls, data, "flexip.config")


def deeper_than(data: object, levels: int) -> bool:
    """Whether JSON from a stranger nests lists and objects deeper than that, before anything walks through it."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else None
    return inner is not None and (levels == 0 or any(deeper_than(value, levels - 1) for value in inner))
