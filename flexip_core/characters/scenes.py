"""Who is shown and how: numbers from which `render` makes pictures and `captions` what they say.

Shape legend: n scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .words import BEARDS, FIRST, GLASSES, HAIR, IDENTITY, SLOTS, STAGING, STYLES, WORDS

HARD_HAIR = ("buns", "longCurly", "mohawk2", "pomp")  # no training picture shows them
HELD_OUT_EVERY = 10
OWN_STYLE = 0.5  # share of pictures in the artist's own style
PLAIN = 0.4  # share of grounds without a pattern, besides those that are drawn plain by chance
WITH = {"glasses": 0.5, "beard": 0.4}  # share of characters that have them
NUMBERS = 3  # of a jitter: distance, sideways, upwards


@dataclass(frozen=True, eq=False)
class Scenes:
    """Slot -> word of that slot (n,), counted from 0; and small random changes of the camera (n, NUMBERS) in 0..1."""

    words: Mapping[str, Tensor]
    jitter: Tensor

    def __len__(self) -> int:
        return len(self.jitter)

    def __getitem__(self, slot: str) -> Tensor:
        return self.words[slot]

    @property
    def device(self) -> torch.device:
        return self.jitter.device

    def to(self, device: str | torch.device) -> Scenes:
        return Scenes({slot: words.to(device) for slot, words in self.words.items()}, self.jitter.to(device))

    def rows(self, chosen: Tensor | slice) -> Scenes:
        return Scenes({slot: words[chosen] for slot, words in self.words.items()}, self.jitter[chosen])

    def but(self, **words: Tensor) -> Scenes:
        """The same with other words in some slots ("hair_colour" for "hair colour")."""
        return Scenes({**self.words, **{slot.replace("_", " "): value for slot, value in words.items()}}, self.jitter)


def number_of(words: Mapping[str, Tensor]) -> Tensor:
    """The number (n,) of a character among all that can be drawn."""
    number = torch.zeros_like(words["hair"])
    for part in IDENTITY:
        number = number * len(WORDS[part]) + words[part]
    return number


def is_held_out(words: Mapping[str, Tensor]) -> Tensor:
    """(n,) bool: every tenth character. Numbers are scattered first, so that every value of every part is in both."""
    return number_of(words) * 40503 % 65537 % HELD_OUT_EVERY == 0


def has_hard_hair(words: Mapping[str, Tensor]) -> Tensor:
    """(n,) bool"""
    return torch.isin(
        words["hair"], torch.tensor([HAIR.index(name) for name in HARD_HAIR], device=words["hair"].device)
    )


def characters(n: int, g: torch.Generator, split: str = "train") -> dict[str, Tensor]:
    """Part -> (n,). `split` is "train", "test" (held-out characters, known hair), "hard" (held-out hair) or
    "judge" (what a judge may see: no held-out character, but all hair).
    """
    wanted = {
        "train": lambda w: ~is_held_out(w) & ~has_hard_hair(w),
        "test": lambda w: is_held_out(w) & ~has_hard_hair(w),
        "hard": lambda w: is_held_out(w) & has_hard_hair(w),
        "judge": lambda w: ~is_held_out(w),
    }[split]
    drawn: list[dict[str, Tensor]] = []
    while sum(len(some["hair"]) for some in drawn) < n:
        some = _any_characters(4 * n + 16, g)
        if split == "hard":  # one in 120 by chance
            hard = torch.tensor([HAIR.index(name) for name in HARD_HAIR])
            some["hair"] = hard[torch.randint(len(hard), (len(some["hair"]),), generator=g)]
        rows = wanted(some)
        drawn.append({part: values[rows] for part, values in some.items()})
    return {part: torch.cat([some[part] for some in drawn])[:n] for part in IDENTITY}


def _any_characters(n: int, g: torch.Generator) -> dict[str, Tensor]:
    words = {part: torch.randint(len(WORDS[part]), (n,), generator=g) for part in ("hair", "skin", "hair colour")}
    for part, names in (("glasses", GLASSES), ("beard", BEARDS)):  # word 0 is "none"
        drawn = torch.randint(1, len(names), (n,), generator=g)
        words[part] = drawn.where(torch.rand(n, generator=g) < WITH[part], 0)
    return words


def stage(characters: Mapping[str, Tensor], g: torch.Generator, own_style: float = OWN_STYLE) -> Scenes:
    """These characters somewhere: all that a prompt can name is drawn anew."""
    n = len(characters["hair"])
    words = {slot: torch.randint(len(WORDS[slot]), (n,), generator=g) for slot in STAGING}
    words["style"] = words["style"].where(torch.rand(n, generator=g) >= own_style, STYLES.index("comic"))
    words["pattern"] = words["pattern"].where(torch.rand(n, generator=g) >= PLAIN, 0)
    subject = torch.zeros(n, dtype=torch.long)
    return Scenes({"subject": subject, **words, **characters}, torch.rand(n, NUMBERS, generator=g))


def captions(scenes: Scenes) -> Tensor:
    """(n, slots), everything said"""
    return torch.stack([scenes[slot] + FIRST[slot] for slot in SLOTS], 1)
