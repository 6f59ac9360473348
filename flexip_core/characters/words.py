"""What a caption of the world says: slots, the words of each slot, and captions as word numbers.

A caption is a row of word numbers (slots,), 0 where nothing is said. The first slots are a prompt's; the last five are identity
words, which only the base's training and its measurement use.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

SUBJECTS = ("a person",)
# drawing of the package -> how a person would write it
EXPRESSIONS = {
    "angryWithFang": "snarling",
    "awe": "amazed",
    "blank": "without a face",
    "calm": "calm",
    "cheeky": "cheeky",
    "concerned": "concerned",
    "concernedFear": "afraid and concerned",
    "contempt": "contemptuous",
    "cute": "cute",
    "cyclops": "as a cyclops",
    "driven": "determined",
    "eatingHappy": "eating happily",
    "explaining": "explaining",
    "eyesClosed": "with closed eyes",
    "fear": "afraid",
    "hectic": "hectic",
    "lovingGrin1": "in love",
    "lovingGrin2": "grinning in love",
    "monster": "as a monster",
    "old": "wrinkled",
    "rage": "raging",
    "serious": "serious",
    "smile": "smiling",
    "smileBig": "smiling broadly",
    "smileLOL": "laughing out loud",
    "smileTeethGap": "smiling with a gap in the teeth",
    "solemn": "solemn",
    "suspicious": "suspicious",
    "tired": "tired",
    "veryAngry": "very angry",
}
CLOTHES = {  # a shirt's colour
    "red": "e78276",
    "orange": "ffb454",
    "yellow": "fdea6b",
    "green": "78e185",
    "turquoise": "9ddadb",
    "blue": "8fa7df",
    "pink": "e279c7",
}
GROUNDS = {
    "white": "fafafa",
    "grey": "9a9a9e",
    "red": "d63c3c",
    "yellow": "fae16e",
    "green": "6ebe6e",
    "blue": "5a96e6",
    "purple": "966ed2",
    "brown": "8c6446",
}
PATTERNS = ("plain", "stripes", "dots", "checks")
STYLES = ("comic", "ink", "pencil sketch", "pixel art", "sticker")  # the artist's own, then rules
PLACES = ("close up", "in the middle", "on the left", "on the right")

HAIR = (
    "afro",
    "bangs",
    "bangs2",
    "bantuKnots",
    "bear",
    "bun",
    "bun2",
    "buns",
    "cornrows",
    "cornrows2",
    "dreads1",
    "dreads2",
    "flatTop",
    "flatTopLong",
    "grayBun",
    "grayMedium",
    "grayShort",
    "hatBeanie",
    "hatHip",
    "hijab",
    "long",
    "longAfro",
    "longBangs",
    "longCurly",
    "medium1",
    "medium2",
    "medium3",
    "mediumBangs",
    "mediumBangs2",
    "mediumBangs3",
    "mediumStraight",
    "mohawk",
    "mohawk2",
    "noHair1",
    "noHair2",
    "noHair3",
    "pomp",
    "shaved1",
    "shaved2",
    "shaved3",
    "short1",
    "short2",
    "short3",
    "short4",
    "short5",
    "turban",
    "twists",
    "twists2",
)
SKINS = ("ffdbb4", "edb98a", "d08b5b", "ae5d29", "694d3d")
HAIR_COLOURS = (
    "2c1b18",
    "4a312c",
    "724133",
    "a55728",
    "b58143",
    "d6b370",
    "ecdcbf",
    "e8e1e1",
    "f59797",
    "c93305",
)
NONE = "none"
GLASSES = (
    NONE,
    "eyepatch",
    "glasses",
    "glasses2",
    "glasses3",
    "glasses4",
    "glasses5",
    "sunglasses",
    "sunglasses2",
)
BEARDS = (
    NONE,
    "chin",
    "full",
    "full2",
    "full3",
    "full4",
    "goatee1",
    "goatee2",
    "moustache1",
    "moustache2",
    "moustache3",
    "moustache4",
    "moustache5",
    "moustache6",
    "moustache7",
    "moustache8",
    "moustache9",
)

IDENTITY = ("hair", "skin", "hair colour", "glasses", "beard")
STAGING = ("expression", "clothes", "ground", "pattern", "style", "place")
WORDS: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "expression": tuple(EXPRESSIONS.values()),
    "clothes": tuple(CLOTHES),
    "ground": tuple(GROUNDS),
    "pattern": PATTERNS,
    "style": STYLES,
    "place": PLACES,
    "hair": HAIR,
    "skin": SKINS,
    "hair colour": HAIR_COLOURS,
    "glasses": GLASSES,
    "beard": BEARDS,
}
SLOTS = tuple(WORDS)
FIRST = {slot: 1 + sum(len(WORDS[before]) for before in SLOTS[:number]) for number, slot in enumerate(SLOTS)}
VOCABULARY = 1 + sum(map(len, WORDS.values()))
IN_PROMPTS = SLOTS[: len(SLOTS) - len(IDENTITY)]


def without(captions: Tensor, *slots: str) -> Tensor:
    """The captions (n, slots) with the words of these slots left out."""
    captions = captions.clone()
    captions[:, [SLOTS.index(slot) for slot in slots]] = 0
    return captions


def prompts(captions: Tensor) -> Tensor:
    """The captions (n, slots) without identity words."""
    return without(captions, *IDENTITY)


def in_words(caption: Tensor) -> str:
    """One caption (slots,) as a person would write it: "a person smiling, in a green shirt, ink, on yellow with dots"."""
    said = {slot: WORDS[slot][number - FIRST[slot]] for slot, number in zip(SLOTS, caption.tolist()) if number}
    first = " ".join(["a person", said["expression"]] if "expression" in said else ["a person"])
    ground = ""
    if "ground" in said:
        ground = f"on {said['ground']}" + (
            f" with {said['pattern']}" if said.get("pattern", "plain") != "plain" else ""
        )
    elif said.get("pattern", "plain") != "plain":
        ground = f"before {said['pattern']}"
    clothes = f"in a {said['clothes']} shirt" if "clothes" in said else ""
    parts = (first, clothes, said.get("style", ""), ground, said.get("place", ""))
    identity = (f"{slot} {said[slot]}" for slot in IDENTITY if slot in said)
    return ", ".join(part for part in (*parts, *identity) if part)


def read_words(text: str) -> Tensor:
    """The caption (slots,) that a prompt stands for: its words in any order; what the world does not know is passed over.

    A colour belongs to the clothes before "shirt", and to the ground behind "on" or "before". A ground without a pattern's name
    is plain. Identity words are not read: they are for the base's training only.
    """
    text = f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
    caption = torch.zeros(len(SLOTS), dtype=torch.long)

    def say(slot: str, word: str) -> None:
        caption[SLOTS.index(slot)] = FIRST[slot] + WORDS[slot].index(word)

    if " person " in text:
        say("subject", SUBJECTS[0])
    for slot in ("expression", "style", "place"):
        found = [word for word in WORDS[slot] if f" {word} " in text]
        if found:
            say(slot, max(found, key=len))  # "smiling broadly", not "smiling"
    if clothes := re.search(rf" ({'|'.join(CLOTHES)}) (?:shirt|clothes|sweater) ", text):
        say("clothes", clothes[1])
    ground = re.search(rf" (?:on|before) (?:an? )?({'|'.join(GROUNDS)})(?! shirt| clothes| sweater) ", text)
    pattern = re.search(rf" ({'|'.join(PATTERNS)}) ", text)
    if ground:
        say("ground", ground[1])
    if pattern or ground:
        say("pattern", pattern[1] if pattern else "plain")
    return caption
