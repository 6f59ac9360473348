"""Pictures and captions of the mini world.

A subject is a shape and two hues, of its upper and its lower half. Captions name the shape, the ground, the corner and (a word
that training mostly drops) a sixth of the colour circle for the upper hue: the lower hue is never in the text and the upper one
hardly, so that a subject's look can only come from the reference.

Pictures are (n, 3, 16, 16) in -1..1. A caption is four words, one per slot, as numbers (n, 4); 0 is a word that was left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 16
SLOTS = ("shape", "ground", "corner", "hue")
WORDS = {
    "shape": ("disc", "square", "triangle", "cross"),
    "ground": ("sky", "grass", "sand", "night", "brick", "snow"),
    "corner": ("top left", "top right", "bottom left", "bottom right"),
    "hue": ("red", "yellow", "green", "cyan", "blue", "magenta"),
}
SHAPE, GROUND, CORNER, HUE = range(4)
FIRST = {slot: 1 + sum(len(WORDS[before]) for before in SLOTS[:number]) for number, slot in enumerate(SLOTS)}
VOCABULARY = 1 + sum(len(words) for words in WORDS.values())

_GROUNDS = torch.tensor(
    [(0.55, 0.75, 1), (0.15, 0.45, 0.12), (0.9, 0.8, 0.55), (0.05, 0.04, 0.18), (0.55, 0.25, 0.2), (0.95, 0.95, 0.98)]
)
_CENTRES = torch.tensor([(5, 5), (5, 10.5), (10.5, 5), (10.5, 10.5)])
_HUE_CELLS = 12


@dataclass(frozen=True, eq=False)
class Scene:
    """n subjects, each in a place: shape (n,), hues (n, 2) in 0..1, ground (n,), corner (n,)."""

    shape: Tensor
    hues: Tensor
    ground: Tensor
    corner: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]

    def at(self, ground: Tensor, corner: Tensor) -> Scene:
        """The same subjects elsewhere."""
        return Scene(self.shape, self.hues, ground, corner)


def draw_subjects(n: int, g: torch.Generator, held_out: bool = False) -> Scene:
    """Subjects in random places. A sixth of the plane of the two hues is held out: training never draws from there."""
    hues = torch.empty(0, 2)
    while len(hues) < n:
        upper, apart = torch.rand(2, 8 * n, generator=g)
        drawn = torch.stack([upper, (upper + 0.2 + 0.6 * apart) % 1], dim=1)
        hues = torch.cat([hues, drawn[is_held_out(drawn) == held_out]])
    shape = torch.randint(len(WORDS["shape"]), (n,), generator=g)
    ground = torch.randint(len(WORDS["ground"]), (n,), generator=g)
    corner = torch.randint(len(WORDS["corner"]), (n,), generator=g)
    return Scene(shape, hues[:n], ground, corner)


def is_held_out(hues: Tensor) -> Tensor:
    """hues (n, 2) -> bool (n,): which subjects only tests may show."""
    cells = (hues * _HUE_CELLS).long() % _HUE_CELLS
    return (cells[:, 0] + 3 * cells[:, 1]) % 6 == 0


def move(scene: Scene, g: torch.Generator) -> Scene:
    """The same subjects, each on another ground and in another corner."""

    def other(value: Tensor, count: int) -> Tensor:
        return (value + torch.randint(1, count, value.shape, generator=g)) % count

    return scene.at(other(scene.ground, len(WORDS["ground"])), other(scene.corner, len(WORDS["corner"])))


def render(scene: Scene, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 16, 16) in -1..1 and where their subjects are, bool (n, 1, 16, 16).

    Position, size, the light on the ground and a little noise differ from picture to picture.
    """
    n = len(scene)
    light, dy, dx, size = torch.rand(4, n, 1, 1, generator=g)
    rows = torch.arange(SIZE).view(1, -1, 1).expand(n, -1, SIZE).float()
    y = rows - _CENTRES[scene.corner, 0].view(-1, 1, 1) - (dy - 0.5)
    x = rows.transpose(1, 2) - _CENTRES[scene.corner, 1].view(-1, 1, 1) - (dx - 0.5)
    inside = _inside(scene.shape, y, x, 4.2 + 0.6 * size).unsqueeze(1)
    slope = ((rows / SIZE - 0.5) * 0.15 * (2 * light - 1)).unsqueeze(1)
    noise = 0.02 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    ground = _GROUNDS[scene.ground].view(n, 3, 1, 1) + slope + noise
    upper = rgb(scene.hues[:, 0], 0.95).view(n, 3, 1, 1)
    lower = rgb(scene.hues[:, 1], 0.75).view(n, 3, 1, 1)
    subject = torch.where((y < 0).unsqueeze(1), upper, lower)
    return torch.where(inside, subject, ground).clamp(0, 1) * 2 - 1, inside


def _inside(shape: Tensor, y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """shape (n,); y, x (n, 16, 16) from the centre -> bool (n, 16, 16)"""
    ay, ax = y.abs(), x.abs()
    disc = y.square() + x.square() < r.square()
    square = (ay < r * 0.85) & (ax < r * 0.85)
    triangle = (y < r * 0.85) & (y > -r) & (ax < (y + r) * 0.58)
    cross = ((ay < r * 0.36) & (ax < r)) | ((ax < r * 0.36) & (ay < r))
    return torch.stack([disc, square, triangle, cross])[shape, torch.arange(len(shape))]


def rgb(hue: Tensor, value: float, saturation: float = 0.95) -> Tensor:
    """HSV -> RGB for hues (n,) in 0..1; returns (n, 3)."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue.unsqueeze(1) * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def angles(hues: Tensor) -> Tensor:
    """hues (n, k) -> (n, 2 k): cosine and sine of each hue on the colour circle."""
    turn = hues * 2 * math.pi
    return torch.stack([turn.cos(), turn.sin()], dim=-1).flatten(1)


def captions(scene: Scene) -> Tensor:
    """The full caption of every picture, (n, 4)."""
    hue = (scene.hues[:, 0] * len(WORDS["hue"])).long() % len(WORDS["hue"])
    columns = dict(zip(SLOTS, (scene.shape, scene.ground, scene.corner, hue)))
    return torch.stack([columns[slot] + FIRST[slot] for slot in SLOTS], dim=1)


def without(caption: Tensor, *slots: int) -> Tensor:
    """The captions with the words of these slots left out."""
    caption = caption.clone()
    caption[:, list(slots)] = 0
    return caption


def in_words(caption: Tensor) -> str:
    """One caption (4,) as a person would write it: "a red disc on sand, top left"."""
    words = {slot: WORDS[slot][number - FIRST[slot]] if number else "" for slot, number in zip(SLOTS, caption.tolist())}
    text = " ".join(word for word in ("a", words["hue"], words["shape"]) if word)
    text += f" on {words['ground']}" if words["ground"] else ""
    return text + (f", {words['corner']}" if words["corner"] else "")


def read_words(text: str) -> Tensor:
    """The caption (4,) that a prompt stands for; words that the world does not know are skipped, and the last word of a slot counts."""
    text = f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
    caption = torch.zeros(len(SLOTS), dtype=torch.long)
    for number, slot in enumerate(SLOTS):
        places = {index: text.rfind(f" {word} ") for index, word in enumerate(WORDS[slot])}
        last = max(places, key=lambda index: places[index])
        if places[last] >= 0:
            caption[number] = FIRST[slot] + last
    return caption


@dataclass(frozen=True, eq=False)
class TestSet:
    """References of held-out subjects, and what a perfect model makes of them: the same subjects elsewhere."""

    __test__ = False  # not for pytest

    reference: Tensor  # (n, 3, 16, 16)
    seen: Scene  # what the references show
    target: Tensor  # (n, 3, 16, 16)
    wanted: Scene  # what the captions ask for

    def __len__(self) -> int:
        return len(self.seen)

    def prompts(self, mode: str) -> Tensor:
        """Never the hue. "conflict": ground and corner too, both unlike the reference's; "omit": the shape alone."""
        full = captions(self.wanted)
        return {"conflict": without(full, HUE), "omit": without(full, GROUND, CORNER, HUE)}[mode]


def test_set(n: int, seed: int) -> TestSet:
    g = torch.Generator().manual_seed(seed)
    seen = draw_subjects(n, g, held_out=True)
    wanted = move(seen, g)
    return TestSet(render(seen, g)[0], seen, render(wanted, g)[0], wanted)


test_set.__test__ = False
