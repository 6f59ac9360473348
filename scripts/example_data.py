"""Writes a small training folder out of real photographs that scikit-image and scikit-learn bring, to try the trainer with.

    pip install scikit-image scikit-learn
    python scripts/example_data.py TARGET [--size 256]
    python -m flexip_core.training check TARGET --size 256 --sheet pairs.png

Six subjects with two or three views each, loose pictures, captions, masks, a part that is held out. Only the motorcycle was
photographed twice (a stereo camera); the other views are cut, turned and coloured out of one photograph. That shows how such a
folder is made and that everything runs. It is far too little, and too much alike, for useful adapters.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 256  # the cat's photograph has no more
Light = tuple[float, float, float, float]
DAY, WARM, COLD, DARK, BRIGHT = (
    (1, 1, 1, 1),
    (1.15, 1, 0.75, 1),
    (0.8, 0.95, 1.2, 1),
    (0.7, 0.75, 1, 1.3),
    (1, 1, 1, 0.7),
)
"""Factors of red, green and blue, then the exponent of brightness (above 1: darker)."""
NEAREST = 33  # pixels of disparity: what is nearer than the garage's back
OFF_FLOOR = 2.0


@dataclass(frozen=True)
class Shot:
    """A square of a photograph: its middle and side in the photograph's pixels, turned by degrees, leaning by a share of its height."""

    x: float
    y: float
    side: int
    caption: str = ""  # none: the class gives it
    light: Light = DAY
    turn: float = 0.0
    lean: float = 0.0


SUBJECTS: dict[str, tuple[str, list[Shot]]] = {  # folder -> class, views
    "variant/chelsea": (
        "tabby cat",
        [
            Shot(240, 150, 296, "a tabby cat, looking into the camera"),
            Shot(200, 150, 240, "a tabby cat, close up, in warm light", WARM, 9),
            Shot(270, 140, 220, "a tabby cat, its head tilted, at dusk", DARK, -12),
        ],
    ),
    "variant/coffee": (
        "cup of espresso",
        [
            Shot(290, 200, 396, "a cup of espresso, on a red saucer, on a wooden table"),
            Shot(300, 160, 250, "a cup of espresso, close up, in bright light", BRIGHT, 12),
            Shot(290, 200, 330, "a cup of espresso, on a red saucer, in cold light", COLD, -8, 0.05),
        ],
    ),
    "variant/astronaut": (
        "woman in an orange space suit",
        [
            Shot(256, 256, 510, "a woman in an orange space suit, before a flag, with a helmet"),
            Shot(225, 130, 250, "a woman in an orange space suit, a portrait, smiling", WARM),
            Shot(245, 232, 400, "a woman in an orange space suit, before a flag, in cold light", COLD, 9),
        ],
    ),
    "variant/rocket": (
        "white rocket",
        [
            Shot(320, 213, 424, "a white rocket, on its launch pad, at dusk"),
            Shot(350, 220, 250, "a white rocket, beside a tower, in bright light", BRIGHT, 10),
            Shot(300, 245, 280, "", WARM, -8),
        ],
    ),
    "val/variant/flower": (
        "orange dahlia",
        [
            Shot(305, 213, 420, "an orange dahlia, before dark leaves"),
            Shot(320, 205, 280, "an orange dahlia, close up, in warm light", WARM, 15),
        ],
    ),
}
MOTORCYCLE = ("variant/motorcycle", "red motorcycle")
LOOSE: dict[str, tuple[str, Shot]] = {  # file -> photograph
    "invariant/pagoda": ("china", Shot(240, 213, 424, "a pagoda, above a lake, on a clear day")),
    "invariant/cameraman": ("camera", Shot(256, 256, 510, "a man with a camera, in a park, black and white")),
    "invariant/galaxies": ("hubble_deep_field", Shot(500, 436, 870, "galaxies, in deep space")),
    "invariant/bricks": ("brick", Shot(256, 256, 510, "a brick wall, black and white")),
    "invariant/horse": ("horse", Shot(210, 210, 420, "the silhouette of a horse, on white")),
    "val/invariant/coins": ("coins", Shot(192, 151, 300, "old coins, on a dark ground, black and white")),
}
CREDITS = {
    "china": ("a pagoda", "danielbuechele", "CC BY 2.0", "https://www.flickr.com/photos/danielbuechele/6061409035/"),
    "flower": ("a dahlia", "vultilion", "CC BY 2.0", "https://www.flickr.com/photos/vultilion/6056698931/"),
    "astronaut": ("Eileen Collins", "NASA", "public domain", "https://flic.kr/p/r9qvLn"),
    "chelsea": ("Chelsea the cat", "Stefan van der Walt", "CC0 1.0", "scikit-image"),
    "coffee": ("a coffee cup of Pikolo Espresso Bar", "Rachel Michetti", "CC0 1.0", "scikit-image"),
    "rocket": (
        "launch of DSCOVR on a Falcon 9",
        "SpaceX",
        "public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/",
    ),
    "camera": ("a cameraman", "Lav Varshney", "CC0 1.0", "scikit-image"),
    "hubble_deep_field": (
        "Hubble eXtreme Deep Field",
        "NASA",
        "public domain",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    "brick": ("Bricks25", "CC0Textures", "CC0 1.0", "https://cc0textures.com/view.php?tex=Bricks25"),
    "horse": (
        "a horse",
        "Andreas Preuss (marauder)",
        "CC0 1.0",
        "http://openclipart.org/detail/158377/horse-by-marauder",
    ),
    "coins": (
        "Greek coins from Pompeii",
        "Brooklyn Museum",
        "no known copyright restrictions",
        "https://www.brooklynmuseum.org/opencollection/archives/image/51611",
    ),
    "motorcycle": (
        "a motorcycle, from the Middlebury 2014 stereo benchmark",
        "N. Nesic, P. Westling, X. Wang, Y. Kitajima, G. Krathwohl, D. Scharstein (to be cited: Scharstein et al., GCPR 2014)",
        "as scikit-image ships it",
        "https://vision.middlebury.edu/stereo/data/scenes2014/",
    ),
}
OF_SKLEARN = ("china", "flower")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to make")
    parser.add_argument("--size", type=int, default=SIZE, help=f"of the pictures' shorter side (default: {SIZE})")
    options = parser.parse_args(arguments)
    try:
        number = write(options.target, options.size)
    except ModuleNotFoundError as error:
        print(
            f"This needs scikit-image and scikit-learn ({error.name} is missing): pip install scikit-image scikit-learn",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{number} pictures are in {options.target}; where they come from is in CREDITS.txt there.")
    return 0


def write(target: Path, size: int = SIZE) -> int:
    """Makes the folder, whole or not at all, and returns the number of its pictures. The same every time."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already; choose a new folder.")
    part = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        number = sum(
            _subject(part / folder, folder.rpartition("/")[2], *what, size) for folder, what in SUBJECTS.items()
        )
        number += _motorcycle(part / MOTORCYCLE[0], size)
        for name, (source, shot) in LOOSE.items():
            picture = photo(source)
            mask = picture.convert("L").point(lambda value: 255 - value) if source == "horse" else None
            _save(part / name, taken(picture, shot, size), shot.caption, mask and square(mask, shot, size))
            number += 1
        (part / "CREDITS.txt").write_text(_credits(), encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return number


def photo(name: str) -> Image.Image:
    if name in OF_SKLEARN:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        from skimage import data

        pixels = getattr(data, name)()
    if name == "horse":  # 0 and 1, and wider than high
        pixels = np.pad(pixels * np.uint8(255), [(46, 46), (10, 10)], constant_values=255)
    return Image.fromarray(pixels).convert("RGB")


def square(image: Image.Image, shot: Shot, size: int) -> Image.Image:
    """What the shot shows, size x size. Cut at the photograph's scale, then made smaller, so that nothing jags."""
    angle = np.deg2rad(shot.turn)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shot.lean], [0, 1]]
    begin = np.array([shot.x, shot.y]) - turn @ [shot.side / 2, shot.side / 2]
    corners = begin + np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * shot.side @ turn.T
    if (corners < 0).any() or (corners > image.size).any():
        raise ValueError(f"{shot} leaves its photograph of {image.size} pixels.")
    rows = np.column_stack([turn, begin]).ravel().tolist()
    cut = image.transform((shot.side, shot.side), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)
    return cut.resize((size, size), Image.Resampling.LANCZOS)


def taken(image: Image.Image, shot: Shot, size: int) -> Image.Image:
    return lit(square(image, shot, size), shot.light)


def lit(image: Image.Image, light: Light) -> Image.Image:
    values = (np.asarray(image, np.float64) / 255 * light[:3]).clip(0, 1) ** light[3]
    return Image.fromarray((values * 255).round().astype(np.uint8))


def cup(size: tuple[int, int]) -> Image.Image:
    """Cup and saucer, two ellipses in the photograph's pixels."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for x, y, width, height in ((278, 240, 203, 146), (292, 118, 122, 102)):
        draw.ellipse((x - width, y - height, x + width, y + height), fill=255)
    return mask


def _subject(folder: Path, source: str, kind: str, shots: list[Shot], size: int) -> int:
    image = photo(source)
    for number, shot in enumerate(shots, 1):
        mask = cup(image.size) if source == "coffee" and number == 1 else None  # the others do not show all of it
        _save(folder / str(number), taken(image, shot, size), shot.caption, mask and square(mask, shot, size))
    (folder / "class.txt").write_text(kind, encoding="utf-8")
    return len(shots)


def _motorcycle(folder: Path, size: int) -> int:
    """Both eyes of the stereo camera, whole, with masks out of the measured distances, and the front wheel."""
    from skimage import data

    left, right, disparity = data.stereo_motorcycle()
    seen = nearest(np.where(np.isfinite(disparity), disparity, 0))
    moved = np.zeros_like(seen)
    y, x = np.nonzero(seen)
    columns = (x - disparity[y, x]).round().astype(int)
    inside = columns >= 0
    moved[y[inside], columns[inside]] = True
    eyes = ((left, seen, "in a garage"), (right, moved, "in a garage, from a little further right"))
    for number, (pixels, mask, words) in enumerate(eyes, 1):
        image, white = Image.fromarray(pixels), Image.fromarray(closed(mask) * np.uint8(255))
        smaller = tuple(round(side * size / min(image.size)) for side in image.size)
        pictures = [picture.resize(smaller, Image.Resampling.LANCZOS) for picture in (image, white)]
        _save(folder / str(number), pictures[0], f"a red motorcycle, {words}", pictures[1])
    wheel = Shot(550, 300, 330, "a red motorcycle, its front wheel, in warm light", WARM, -8)
    _save(folder / "3", taken(Image.fromarray(left), wheel, size), wheel.caption, None)
    (folder / "class.txt").write_text(MOTORCYCLE[1], encoding="utf-8")
    return 3


def nearest(disparity: np.ndarray) -> np.ndarray:
    """(h, w) of bool: what is nearer than the room and stands on the floor, a plane whose disparity rises by rows."""
    rows = np.arange(len(disparity))
    beside = np.median(disparity[:, :60], axis=1)  # nothing stands there
    low = slice(400, None)
    floor = np.polyval(np.polyfit(rows[low], beside[low], 1), rows)
    return disparity > np.maximum(NEAREST, floor + OFF_FLOOR)[:, None]


def closed(mask: np.ndarray) -> np.ndarray:
    """Without the small holes where no distance was measured, and without specks."""
    from scipy import ndimage

    return ndimage.binary_opening(ndimage.binary_closing(mask, iterations=4), iterations=1)


def _save(path: Path, picture: Image.Image, caption: str, mask: Image.Image | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(f"{path}.jpg", quality=95)
    if caption:
        Path(f"{path}.txt").write_text(caption, encoding="utf-8")
    if mask is not None:
        mask.save(f"{path}.mask.png")


def _credits() -> str:
    lines = [f"{name}: {what}, by {who}, {licence}, {source}" for name, (what, who, licence, source) in CREDITS.items()]
    return "\n".join(
        [
            "The photographs come with scikit-image (https://scikit-image.org) and scikit-learn (https://scikit-learn.org).",
            "They were cut, turned, resized and coloured by scripts/example_data.py; the masks were made by it.",
            "",
            *lines,
            "",
            "CC BY 2.0: https://creativecommons.org/licenses/by/2.0/",
            "CC0 1.0: https://creativecommons.org/publicdomain/zero/1.0/",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
