"""FlexIP's two adapters and their K/V projections (paper Fig. 3).

Shape legend: r reference images, p patch tokens, t text tokens, b batch, w text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn as nn

from .config import FeatureNeed, FlexIPConfig
from .resampler import Resampler

ADAPTERS = ("preservation", "personalization")
BlockKV = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Block address -> K, V, each (b, tokens, inner width of the block)."""


class PreservationAdapter(nn.Module):
    """Keeps the subject: learned queries (detail) and the CLIP [CLS] (semantic) each resample DINO's patch tokens."""

    def __init__(self, cfg: FlexIPConfig, operations: Any = nn, **factory: Any):
        super().__init__()
        width = cfg.resampler.width
        self.queries = nn.Parameter(torch.randn(1, cfg.detail_tokens, width, **factory) * width**-0.5)
        self.detail = Resampler(cfg.resampler, cfg.dino.width, cfg.text_width, operations, **factory)
        self.cls_in = operations.Linear(cfg.clip.width, cfg.semantic_tokens * width, **factory)
        self.semantic = Resampler(cfg.resampler, cfg.dino.width, cfg.text_width, operations, **factory)

    def forward(self, cls: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """cls (r, clip width), patches (r, p, dino width) -> [semantic ; detail] (r, semantic + detail, w)."""
        # a bare Parameter stays on the CPU under ComfyUI's partial load, so it is moved to its input
        queries = self.queries.to(patches).expand(patches.shape[0], -1, -1)
        semantic = self.cls_in(cls).unflatten(1, (-1, queries.shape[2]))
        return torch.cat([self.semantic(semantic, patches), self.detail(queries, patches)], dim=1)


class PersonalizationAdapter(nn.Module):
    """Follows the prompt: each text token asks the CLIP [CLS] what to take from the reference."""

    def __init__(self, cfg: FlexIPConfig, operations: Any = nn, **factory: Any):
        super().__init__()
        width = cfg.resampler.width
        self.width = width
        self.text_in = operations.Linear(cfg.text_width, width, **factory)
        self.cls_in = operations.Linear(cfg.clip.width, cfg.cls_tokens * width, **factory)
        self.resampler = Resampler(cfg.resampler, width, cfg.text_width, operations, **factory)

    def forward(self, text: torch.Tensor, cls: torch.Tensor) -> torch.Tensor:
        """text (b, t, w), cls (r, clip width) -> (b, t, w); the r references are one context."""
        return self._ask(text, self.cls_in(cls).reshape(1, -1, self.width))

    def rows(self, text: torch.Tensor, cls: torch.Tensor) -> torch.Tensor:
        """text (b, t, w), cls (b, clip width) -> (b, t, w); every row has a reference of its own."""
        return self._ask(text, self.cls_in(cls).unflatten(1, (-1, self.width)))

    def _ask(self, text: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.resampler(self.text_in(text), context.expand(text.shape[0], -1, -1))


class KVProjection(nn.Module):
    def __init__(self, token_width: int, inner: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.to_k = operations.Linear(token_width, inner, bias=False, **factory)
        self.to_v = operations.Linear(token_width, inner, bias=False, **factory)


class FlexIPNetwork(nn.Module):
    """Both adapters and one pair of to_k/to_v per adapter and cross-attention block; keys as in the checkpoint format."""

    def __init__(self, cfg: FlexIPConfig, operations: Any = nn, **factory: Any):
        super().__init__()
        self.cfg = cfg
        self.preservation = PreservationAdapter(cfg, operations, **factory)
        self.personalization = PersonalizationAdapter(cfg, operations, **factory)
        self.blocks = nn.ModuleDict()  # nested, so that the key reads blocks.input.1.0.preservation.to_k.weight
        for address, inner in cfg.blocks.items():
            node: Any = self.blocks
            for part in address.split("."):
                if part not in node:
                    node[part] = nn.ModuleDict()
                node = node[part]
            for name in ADAPTERS:
                node[name] = KVProjection(cfg.text_width, inner, operations, **factory)

    base = property(lambda self: self.cfg.base)
    gate_mode = property(lambda self: self.cfg.gate_mode)
    text_width = property(lambda self: self.cfg.text_width)
    block_widths = property(lambda self: self.cfg.blocks)
    adapters = ADAPTERS

    @staticmethod
    def reads_text(adapter: str) -> bool:
        return adapter == "personalization"

    def needs(self) -> tuple[FeatureNeed, ...]:
        clip, dino = self.cfg.clip, self.cfg.dino
        return FeatureNeed("cls", clip, "embedding", clip.width), FeatureNeed("patches", dino, "patches", dino.width)

    def tokens(
        self, adapter: str, features: Mapping[str, torch.Tensor], text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens of one adapter for features "cls" (r, clip width), "patches" (r, p, dino width) and text (b, t, w).

        preservation: (1, r * (semantic + detail), w), the references side by side; personalization: (b, t, w).
        """
        if adapter == "preservation":
            return self.preservation(features["cls"], features["patches"]).flatten(0, 1).unsqueeze(0)
        return self.personalization(text, features["cls"])

    def row_tokens(self, adapter: str, features: Mapping[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """As `tokens`, but row by row: features (b, ...), each row's reference, with text (b, t, w) -> (b, tokens, w)."""
        if adapter == "preservation":
            return self.preservation(features["cls"], features["patches"])
        return self.personalization.rows(text, features["cls"])

    def token_groups(self, adapter: str, count: int) -> dict[str, list[int]]:
        """Which of an adapter's `count` tokens came from where: every picture brings [semantic ; detail], side by side."""
        if adapter != "preservation":
            return {adapter: list(range(count))}
        first, picture = self.cfg.semantic_tokens, self.cfg.semantic_tokens + self.cfg.detail_tokens
        return {
            "detail": [token for token in range(count) if token % picture >= first],
            "semantic": [token for token in range(count) if token % picture < first],
        }

    def project(self, adapter: str, tokens: torch.Tensor) -> BlockKV:
        """tokens (b, n, w) of one adapter -> K and V for every block."""
        out = {}
        for address in self.cfg.blocks:
            kv = self.projection(address, adapter)
            out[address] = (kv.to_k(tokens), kv.to_v(tokens))
        return out

    def projection(self, address: str, adapter: str) -> KVProjection:
        return cast(KVProjection, self.blocks.get_submodule(f"{address}.{adapter}"))

    @torch.no_grad()
    def init_no_op(self) -> None:
        """to_v = 0: the gated model equals the bare one at every gate, and gradients still reach to_v."""
        for address in self.cfg.blocks:
            for name in ADAPTERS:
                self.projection(address, name).to_v.weight.zero_()

    @torch.no_grad()
    def init_from_text(self, projections: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start from the UNet's own text to_k, to_v per block address (the start that trains best in public recipes)."""
        for address in self.cfg.blocks:
            to_k, to_v = projections[address]
            for name in ADAPTERS:
                kv = self.projection(address, name)
                kv.to_k.weight.copy_(to_k)
                kv.to_v.weight.copy_(to_v)
