"""Plain folders: what is found, how pictures are decoded and cut, and that a batch is a function of its generator."""

import os

import numpy as np
import pytest
import torch
import training_fakes as fakes
import training_folders as made
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flexip_core.training import pictures
from flexip_core.training.choice import Choice, Loader
from flexip_core.training.data import INVARIANT, VARIANT, check_source
from flexip_core.training.dataset import clip_frames, phrases_of, scan
from flexip_core.training.folders import FolderPairs
from flexip_core.training.importers import import_data
from flexip_core.training.pictures import Cut, CutOptions, Picture, draw_cut, fixed_cuts
from flexip_core.training.sources import make_source
from flexip_core.training.stores import safe_name

SIZE = 32


def kinds_of(value, n=40):
    return torch.full((n,), value)


def mean_colour(picture):
    """(3, h, w) in -1..1 -> 0..255"""
    return ((picture.mean((1, 2)) + 1) * 127.5).round().int().tolist()


def decoded(tmp_path, image, name="x.png", **save):
    path = tmp_path / name
    image.save(path, **save)
    with path.open("rb") as file:
        return pictures.decode_picture(file, name)


# --- what is found


def test_subjects_loose_pictures_captions_and_masks_are_found(tmp_path):
    data = scan(made.small_set(tmp_path))
    assert [(group.name, len(group.views)) for group in data.subjects] == [
        ("variant/mug", 3),
        ("variant/orange cat.2", 2),
    ]
    assert [view.file for group in data.loose for view in group.views] == [
        "invariant/hill.jpg",
        "invariant/sea.png",
        "invariant/tree.png",
    ]
    captions = {view.file: data.caption(view) for _, view in data.views()}
    assert captions["variant/mug/a.png"] == "a mug, on a table"
    assert captions["variant/mug/c.jpg"] == "a photo of a mug"
    assert captions["variant/orange cat.2/1.png"] == "a photo of an orange cat"
    masks = {view.file for _, view in data.views() if view.mask}
    assert masks == {"variant/mug/a.png", "variant/mug/b.png", "invariant/tree.png"}
    assert data.unused == ()


def test_what_is_held_out_is_never_trained_on(tmp_path):
    root = made.small_set(tmp_path)
    train, val = scan(root), scan(root, "val")
    assert {group.name for group, _ in val.views()} == {"val/variant/cup", "val/invariant"}
    assert not any(view.file.startswith("val/") for _, view in train.views())
    assert make_source(root, SIZE, part="val").views() == {"cup": 2}


def test_files_in_the_wrong_place_are_told(tmp_path):
    root = made.put(
        made.small_set(tmp_path),
        {"variant/stray.png": made.noise(1), "variant/mug/deep/x.png": made.noise(1), "variant/mug/notes.md": "x"},
    )
    assert scan(root).unused == ("variant/stray.png", "variant/mug/notes.md", "variant/mug/deep/x.png")


@pytest.mark.parametrize("place", ["variant/mug/link.png", "variant/linked", "invariant/link.png"])
def test_links_are_refused(tmp_path, place):
    root = made.small_set(tmp_path / "data")
    outside = made.put(tmp_path / "outside", {"1.png": made.noise(1), "2.png": made.noise(2)})
    os.symlink(outside if place == "variant/linked" else outside / "1.png", root / place)
    with pytest.raises(ValueError, match=f"{place} in .* is a link; put the file"):
        scan(root)


def test_a_folder_without_data_is_refused_with_what_to_do(tmp_path):
    made.put(tmp_path, {"dog/1.png": made.noise(1)})
    with pytest.raises(ValueError, match="holds no pictures in a folder variant or invariant; put each subject's"):
        scan(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        scan(tmp_path / "dog/1.png")


def test_repeats_in_folder_names_and_weights_multiply(tmp_path):
    root = made.put(
        tmp_path,
        {
            **{f"variant/{name}/{i}.png": made.noise(i) for name in ("10_dog", "007_bond", "cat") for i in range(2)},
            "dataset.toml": '[weights]\n"variant/10_dog" = 0.5\n"variant/cat" = 0',
        },
    )
    data = scan(root)
    assert {group.name: group.weight for group in data.subjects} == {
        "variant/007_bond": 1,
        "variant/10_dog": 5,
        "variant/cat": 0,
    }
    assert set(Choice(data).views()) == {"007_bond", "10_dog"}, "weight 0 leaves a folder out"
    made.put(root, {"dataset.toml": "repeats = false"})
    assert {group.weight for group in scan(root).subjects} == {1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("wieghts = 1", "unknown setting wieghts; it has weights, min_frame_gap"),
        ("min_frame_gap = 0", "min_frame_gap must be a whole number of at least 1, got 0"),
        ("repeats = 1", "repeats must be true or false, got 1"),
        ("weights = 2", "weights must be a table"),
        ('[weights]\n"variant/mug" = -1', "weight of variant/mug must be a number of at least 0, got -1"),
        ('[weights]\n"variant/mgu" = 1', "names 'variant/mgu', which is not a folder"),
        ("= 3", "is not a TOML file"),
    ],
)
def test_settings_are_read_strictly(tmp_path, text, message):
    root = made.put(made.small_set(tmp_path), {"dataset.toml": text})
    with pytest.raises(ValueError, match=message) as error:
        scan(root)
    assert "\n" not in str(error.value)


def test_captions_become_phrases():
    assert phrases_of(" a dog,in  snow ,, at night") == ("a dog", "in  snow", "at night")
    assert phrases_of("") == ()


def test_captions_must_be_utf8_and_lines_are_joined(tmp_path):
    root = made.put(made.small_set(tmp_path), {"invariant/hill.txt": "\ufeffa hill,\r\n  green\n"})
    data = scan(root)
    captions = {view.file: data.caption(view) for _, view in data.views()}
    assert captions["invariant/hill.jpg"] == "a hill, green"
    made.put(root, {"invariant/hill.txt": b"caf\xe9"})
    with pytest.raises(ValueError, match="invariant/hill.txt is not text in UTF-8"):
        [data.caption(view) for _, view in data.views()]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\b", "c:x", "", "./a", "a\0b"])
def test_names_that_leave_their_folder_are_unsafe(name):
    assert not safe_name(name)
    assert safe_name("variant/my dog/1.2.jpg")


# --- decoding


@pytest.mark.parametrize(
    "mode, colour", [("L", 100), ("P", 5), ("CMYK", (0, 255, 255, 0)), ("1", 1), ("YCbCr", (90, 90, 200))]
)
def test_pictures_of_any_mode_become_rgb(tmp_path, mode, colour):
    image = Image.new(mode, (9, 7), colour)
    name = "x.jpg" if mode in ("CMYK", "YCbCr") else "x.png"
    rgb = decoded(tmp_path, image, name).rgb
    assert rgb.mode == "RGB" and rgb.size == (9, 7)
    close = np.abs(np.asarray(rgb).astype(int) - np.asarray(image.convert("RGB")).astype(int)).max()
    assert close <= 3


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    rgb = np.asarray(decoded(tmp_path, Image.fromarray(values)).rgb)
    assert np.abs(rgb[..., 0] - values / 257).max() <= 0.5 and (rgb[..., 0] == rgb[..., 2]).all()


def test_transparent_pixels_become_white_and_the_alpha_channel_is_the_mask(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (2, 2, 6, 6))
    found = decoded(tmp_path, image)
    assert found.rgb.getpixel((0, 0)) == (255, 255, 255) and found.rgb.getpixel((3, 3)) == (0, 0, 255)
    assert pictures.subject_box(found.alpha) == (2, 2, 6, 6)
    assert decoded(tmp_path, Image.new("RGBA", (8, 8), (9, 9, 9, 255))).alpha is None, "opaque: nothing is cut out"
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 200, 0, 9, 9, 9])
    palette.putpixel((0, 0), 1)
    found = decoded(tmp_path, palette, transparency=1)
    assert found.rgb.getpixel((0, 0)) == (255, 255, 255) and found.rgb.getpixel((1, 1)) == (0, 200, 0)


@pytest.mark.parametrize("at_least", [None, 32])
def test_photographs_that_lie_on_their_side_are_turned(tmp_path, at_least):
    image = Image.new("RGB", (200, 400), "blue")
    image.paste("red", (0, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the red end goes to the right
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    with (tmp_path / "x.jpg").open("rb") as file:
        found = pictures.decode_picture(file, "x.jpg", at_least)
    width, height = found.rgb.size
    assert found.size == (400, 200) and width == 2 * height
    assert found.rgb.getpixel((width - 3, height // 2))[0] > 200 and found.rgb.getpixel((2, 2))[2] > 200
    assert height == 200 if at_least is None else 32 <= height < 200


def test_masks_fit_jpegs_that_were_read_at_a_smaller_size(tmp_path):
    picture = Image.new("RGB", (400, 300), "green")
    picture.paste("red", (200, 100, 300, 200))
    root = made.put(
        tmp_path,
        {"invariant/a.jpg": picture, "invariant/a.mask.png": made.box_mask((200, 100, 300, 200), (400, 300))},
    )
    view = scan(root).loose[0].views[0]
    loaded = Loader(scan(root).store, 40)(view)
    assert min(loaded.rgb.size) == 80 and loaded.mask.size == loaded.rgb.size
    left, top, right, bottom = pictures.subject_box(loaded.mask)
    x, y = (left + right) // 2, (top + bottom) // 2
    assert loaded.rgb.getpixel((x, y))[0] > 200 and abs(x - 250 / 300 * 80) <= 1


def load_all(root):
    source = make_source(root, SIZE)
    for _, view in source.data.views():
        source.load(view)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"no picture at all", "it is none of JPEG, PNG, WEBP, BMP, TIFF"),
        (b"", "it is none of"),
        ("cut", "truncated"),
    ],
)
def test_unreadable_pictures_are_named_when_training_meets_them(tmp_path, content, reason):
    root = made.small_set(tmp_path)
    path = root / "invariant/tree.png"
    path.write_bytes(path.read_bytes()[:-700] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"invariant/tree.png cannot be read \(.*{reason}.*\); replace it") as error:
        load_all(root)
    assert "\n" not in str(error.value)


def test_a_mask_of_another_size_is_refused(tmp_path):
    root = made.put(made.small_set(tmp_path), {"invariant/tree.mask.png": made.box_mask((0, 0, 5, 5), (20, 20))})
    with pytest.raises(ValueError, match="the mask invariant/tree.mask.png has 20 x 20 pixels, its picture 64 x 48"):
        load_all(root)


def test_a_damaged_picture_is_drawn_again_counted_and_changes_no_other_row(tmp_path, caplog):
    kinds = kinds_of(INVARIANT, 40)
    whole = make_source(made.small_set(tmp_path), SIZE).batch(kinds, fakes.generator(0))
    sources = [make_source(tmp_path, SIZE) for _ in range(3)]
    (tmp_path / "invariant/tree.png").write_bytes(b"damaged since it was checked")
    first, again = (source.batch(kinds, fakes.generator(0)) for source in sources[:2])
    hit = torch.tensor([caption == ("a tree",) for caption in whole.captions])
    assert 0 < hit.sum() < 40 and ("a tree",) not in first.captions
    for name in ("targets", "references"):
        ours, before = getattr(first, name), getattr(whole, name)
        assert torch.equal(ours[~hit], before[~hit]) and torch.equal(ours, getattr(again, name))
    told = [line for line in caplog.messages if "Another one is drawn" in line]
    assert len(told) == 2 and "invariant/tree.png" in told[0] and "1 of at most 3" in told[0]  # once per source
    part = sources[2].batch(kinds, fakes.generator(0), slice(10, 20))  # as one rank of four
    assert torch.equal(part.targets, first.targets[10:20])


def test_too_many_damaged_pictures_end_a_run(tmp_path):
    source = make_source(made.small_set(tmp_path), SIZE)
    for name in ("tree.png", "hill.jpg", "sea.png"):
        (tmp_path / "invariant" / name).unlink()
    with pytest.raises(ValueError, match="invariant/.* in .* cannot be opened"):
        source.batch(kinds_of(INVARIANT), fakes.generator(0))
    for name in ("mug/a.png", "mug/b.png", "mug/c.jpg"):
        (tmp_path / "variant" / name).unlink()
    with pytest.raises(
        ValueError, match="4 files of the training data could not be read, more than 3; the last: .*`check`"
    ):
        source.batch(kinds_of(VARIANT, 40), fakes.generator(0))


def test_a_phones_jpeg_with_two_pictures_is_its_first(tmp_path):
    made.flat("red").save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[made.flat("blue")])
    with (tmp_path / "x.jpg").open("rb") as file:
        assert pictures.decode_picture(file, "x.jpg").rgb.getpixel((5, 5))[0] > 240


def test_a_gif_is_no_picture_of_the_data(tmp_path):
    made.put(made.small_set(tmp_path), {"invariant/x.gif": made.noise(1)})
    assert scan(tmp_path).unused == ("invariant/x.gif",)


# --- clips


@given(st.integers(0, 5000), st.integers(1, 60), st.integers(1, 20))
def test_frames_of_a_clip_keep_their_distance_and_reach_its_ends(frames, gap, most):
    chosen = clip_frames(frames, gap, most)
    assert len(chosen) <= most and all(0 <= k < frames for k in chosen)
    assert all(b - a >= gap for a, b in zip(chosen, chosen[1:]))
    if frames > gap and most > 1:
        assert chosen[0] == 0 and chosen[-1] == frames - 1 and len(chosen) >= 2


def test_frames_of_a_clip_are_the_ones_asked_for(tmp_path):
    path = made.clip(tmp_path / "x.mp4", 40)
    with path.open("rb") as file:
        frames = pictures.clip_length(file, "x.mp4")
    assert frames == 40
    for number in (0, 1, 11, 12, 13, 25, 39):
        with path.open("rb") as file:
            image = pictures.decode_frame(file, "x.mp4", number, frames)
        value = np.asarray(image).mean()
        assert abs(value - (4 * number + 20)) < 2, number


def test_a_clip_is_a_subject_by_itself(tmp_path):
    made.clip(tmp_path / "variant/lamp/film.mp4", 40)
    made.put(tmp_path, {"variant/lamp/film.txt": "a lamp", "dataset.toml": "min_frame_gap = 10\nclip_frames = 8"})
    source = make_source(tmp_path, SIZE)
    assert source.views() == {"lamp": 4}
    batch = source.batch(kinds_of(VARIANT, 30), fakes.generator(0))
    gap = (batch.targets.mean((1, 2, 3)) - batch.references.mean((1, 2, 3))).abs() * 127.5 / 4
    assert gap.min() > 9, "the two views are at least ten frames apart"
    assert set(batch.captions) == {("a lamp",)}


def test_a_broken_clip_is_named(tmp_path):
    made.put(tmp_path, {"variant/lamp/film.mp4": b"nothing"})
    with pytest.raises(ValueError, match="the clip variant/lamp/film.mp4 cannot be read"):
        scan(tmp_path)


# --- cuts


def two_colours(mask=True):
    """Red, with a green square that is the subject."""
    image = made.flat("red", (80, 60))
    image.paste((0, 255, 0), (50, 20, 70, 40))
    return Picture(image, made.box_mask((50, 20, 70, 40), (80, 60)) if mask else None)


def test_a_target_is_the_middle_square_or_the_one_around_the_subject():
    ramp = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[None, :, None] * 3, (60, 1, 3)))
    assert pictures.target_box(Picture(ramp, None)) == (10, 0, 70, 60)
    assert pictures.target_box(two_colours()) == (20, 0, 80, 60)
    middle = pictures.target(Picture(ramp, None), 30)
    assert abs(mean_colour(middle)[0] - 3 * 39.5) < 2 and middle.shape == (3, 30, 30)


def test_a_subject_alone_stands_on_white_or_on_the_blurred_picture():
    white = pictures.reference(two_colours(), Cut("subject", margin=0.2), 28)
    assert mean_colour(white[:, 10:18, 10:18]) == [0, 255, 0]
    assert mean_colour(white[:, :3, :3]) == [255, 255, 255], "what is around it is gone"
    share = (white[0] < 0).float().mean()
    assert abs(share - (1 / 1.4) ** 2) < 0.05, "a margin of 20 % on each side"
    blurred = pictures.reference(two_colours(), Cut("subject", margin=0.2, blurred=True), 28)
    red, green, blue = mean_colour(blurred[:, :2, :2])
    assert red > 180 and green < 80 and blue < 20
    outside = pictures.reference(two_colours(), Cut("subject", margin=1.5), 28)
    assert mean_colour(outside[:, :, -4:]) == [255, 255, 255], "beyond the edge there is ground"


def test_parts_lie_inside_the_target_and_have_the_area():
    ramp = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (60, 1, 3)))
    for place, first in (((0.0, 0.5), 0), ((1.0, 0.5), 30)):
        part = pictures.reference(Picture(ramp, None), Cut("part", area=0.25, place=place), 30)
        assert abs((part[0, 0, 0] + 1) * 127.5 - 4 * first) < 5
    whole = pictures.reference(Picture(ramp, None), Cut("whole"), 30)
    assert torch.equal(whole, pictures.target(Picture(ramp, None), 30))


def shares(kind, masked, n=4000):
    draws = torch.rand(n, pictures.CUT_DRAWS, generator=fakes.generator(3), dtype=torch.float64).tolist()
    cuts = [draw_cut(CutOptions(), kind, masked, row) for row in draws]
    return {mode: sum(cut.mode == mode for cut in cuts) / n for mode in ("subject", "whole", "part")}, cuts


@pytest.mark.parametrize(
    "kind, masked, expected",
    [
        (VARIANT, True, (0.5, 0.5, 0)),
        (VARIANT, False, (0, 1, 0)),
        (INVARIANT, True, (0.5, 0.3, 0.2)),
        (INVARIANT, False, (0, 0.6, 0.4)),
    ],
)
def test_references_are_cut_in_the_shares_of_the_recipe(kind, masked, expected):
    got, cuts = shares(kind, masked)
    assert all(abs(value - wanted) < 0.03 for value, wanted in zip(got.values(), expected)), got
    assert all(0.1 <= cut.margin <= 0.2 for cut in cuts if cut.mode == "subject")
    assert all(0.6 <= cut.area <= 1 for cut in cuts if cut.mode == "part")
    subjects = [cut.blurred for cut in cuts if cut.mode == "subject"]
    assert not subjects or 0.45 < sum(subjects) / len(subjects) < 0.55


def test_fixed_cuts_stand_for_the_recipe_and_never_change():
    modes = [cut.mode for cut in fixed_cuts(CutOptions(), INVARIANT, True, 10)]
    assert modes == ["subject"] * 5 + ["whole"] * 3 + ["part"] * 2
    assert {cut.blurred for cut in fixed_cuts(CutOptions(), VARIANT, True, 4) if cut.mode == "subject"} == {True, False}
    assert set(fixed_cuts(CutOptions(), VARIANT, False, 4)) == {Cut("whole")}
    assert fixed_cuts(CutOptions(), INVARIANT, True, 4) == fixed_cuts(CutOptions(), INVARIANT, True, 4)


# --- batches


def coloured_set(root, subjects):
    """Red is the subject, green the picture, so that a batch tells what it shows."""
    files = {}
    for s, views in enumerate(subjects):
        for v in range(views):
            files[f"variant/s{s}/{v}.png"] = made.flat((40 * s + 20, 20 * v + 10, 0))
            files[f"variant/s{s}/{v}.txt"] = f"subject {s}, view {v}"
    return made.put(root, files)


def test_variant_pairs_are_two_views_of_one_subject_and_the_caption_is_the_targets(tmp_path):
    source = make_source(coloured_set(tmp_path, [3, 2]), SIZE)
    check_source(source, fakes.config("run"))
    batch = source.batch(kinds_of(VARIANT, 200), fakes.generator(0))
    seen = set()
    for target, reference, caption in zip(batch.targets, batch.references, batch.captions):
        a, b = mean_colour(target), mean_colour(reference)
        assert a[0] == b[0] and a[1] != b[1]
        assert caption == (f"subject {(a[0] - 20) // 40}", f"view {(a[1] - 10) // 20}")
        seen.add((a[0], a[1], b[1]))
    assert len(seen) == 3 * 2 + 2, "all pairs come"


def test_subjects_come_by_the_root_of_their_views(tmp_path):
    source = make_source(coloured_set(tmp_path, [9, 4]), SIZE)
    batch = source.batch(kinds_of(VARIANT, 900), fakes.generator(0))
    share = sum(caption[0] == "subject 0" for caption in batch.captions) / 900
    assert abs(share - 3 / 5) < 0.05


def test_invariant_pairs_show_the_target_itself(tmp_path):
    source = make_source(made.small_set(tmp_path), SIZE)
    source.options = CutOptions(invariant_subject=0, invariant_whole=1)
    batch = source.batch(kinds_of(INVARIANT, 60), fakes.generator(0))
    assert torch.equal(batch.targets, batch.references)
    assert set(batch.captions) == {("the sea", "at night"), ("a hill",), ("a tree",)}
    assert source.pictures() == 3


def test_without_loose_pictures_those_of_the_subjects_serve(tmp_path):
    source = make_source(coloured_set(tmp_path, [3, 2]), SIZE)
    assert source.pictures() == 5
    batch = source.batch(kinds_of(INVARIANT, 100), fakes.generator(0))
    assert {mean_colour(t)[1] for t in batch.targets} == {10, 30, 50}


def test_a_batch_is_a_function_of_its_generator_whatever_is_in_memory(tmp_path):
    root, kinds = made.small_set(tmp_path), torch.tensor([VARIANT, INVARIANT] * 8)
    one, other = make_source(root, SIZE, workers=1), make_source(root, SIZE, workers=4, memory=1)
    one.batch(kinds, fakes.generator(9))  # fills the memory
    a, b, c = (s.batch(kinds, fakes.generator(4)) for s in (one, other, one))
    assert torch.equal(a.references, b.references) and torch.equal(a.targets, b.targets) and a.captions == b.captions
    assert torch.equal(a.references, c.references)
    assert not torch.equal(a.targets, one.batch(kinds, fakes.generator(5)).targets)
    assert a.targets.shape == (16, 3, SIZE, SIZE) and -1 <= a.targets.min() < a.targets.max() <= 1


def test_ranks_make_the_rows_of_one_batch(tmp_path):
    source, kinds = make_source(made.small_set(tmp_path), SIZE), torch.tensor([VARIANT, INVARIANT] * 4)
    whole = source.batch(kinds, fakes.generator(1))
    parts = [source.batch(kinds, fakes.generator(1), slice(i, None, 2)) for i in range(2)]
    for i, part in enumerate(parts):
        assert torch.equal(part.targets, whole.targets[i::2]) and torch.equal(part.references, whole.references[i::2])
        assert part.captions == whole.captions[i::2] and torch.equal(part.kinds, kinds[i::2])


def test_target_and_reference_are_mirrored_together(tmp_path):
    root, kinds = made.small_set(tmp_path), torch.tensor([VARIANT, INVARIANT] * 6)
    plain, mirrored = (make_source(root, SIZE, flip=chance).batch(kinds, fakes.generator(2)) for chance in (0.0, 1.0))
    assert torch.equal(mirrored.targets, plain.targets.flip(-1))
    assert torch.equal(mirrored.references, plain.references.flip(-1))
    some = make_source(root, SIZE, flip=0.5).batch(kinds, fakes.generator(2))
    for i in range(12):
        flipped = torch.equal(some.targets[i], mirrored.targets[i])
        assert torch.equal(some.references[i], (mirrored if flipped else plain).references[i])


def test_memory_is_bounded(tmp_path):
    source = make_source(coloured_set(tmp_path, [6]), SIZE, memory=64 * 48 * 3 * 2)
    source.batch(kinds_of(VARIANT, 60), fakes.generator(0))
    assert len(source.load._kept) == 2 and source.load._bytes == 64 * 48 * 3 * 2


def test_size_must_suit_a_vae(tmp_path):
    with pytest.raises(ValueError, match="size must be a multiple of 8 pixels, got 100"):
        FolderPairs(scan(made.small_set(tmp_path)), 100)


def test_trainer_takes_a_step_on_a_folder(tmp_path):
    from flexip_core.training.loop import Trainer

    source = make_source(made.small_set(tmp_path / "data"), 16)
    trainer = Trainer(fakes.config(tmp_path / "run", steps=2), fakes.PhraseBase(), source)
    assert trainer.run()


# --- importers


def names_in(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_mvimgnet_becomes_subjects_with_masks_and_classes(tmp_path):
    source = made.put(
        tmp_path / "mv",
        {
            "mvimgnet_category.txt": "0,stove\n7,sofa\n",
            **{f"7/1a00/images/{i:03d}.jpg": made.noise(i) for i in range(5)},
            **{f"7/1a00/masks/{i:03d}.jpg.png": made.box_mask((1, 1, 9, 9)) for i in range(5)},
            "7/1a00/sparse/0/cameras.bin": b"x",
            "9/2b/images/001.jpg": made.noise(9),
        },
    )
    assert import_data("mvimgnet", source, tmp_path / "out", views=3) == 4
    data = scan(tmp_path / "out")
    assert [g.name for g in data.subjects] == ["variant/7__1a00", "variant/9__2b"]
    views = data.subjects[0].views
    assert [v.file.rpartition("/")[2] for v in views] == ["000.jpg", "002.jpg", "004.jpg"], "evenly over the sequence"
    assert all(v.mask for v in views) and data.caption(views[0]) == "a photo of a sofa"
    assert data.caption(data.subjects[1].views[0]) == "", "a number is no word"
    original = source / "7/1a00/images/000.jpg"
    assert (tmp_path / "out" / views[0].file).read_bytes() == original.read_bytes()


def test_co3d_and_templates(tmp_path):
    source = made.put(
        tmp_path / "co",
        {
            **{f"teddybear/34_1479/images/frame{i:06d}.jpg": made.noise(i) for i in (1, 2)},
            **{f"teddybear/34_1479/masks/frame{i:06d}.png": made.box_mask((1, 1, 9, 9)) for i in (1, 2)},
            "teddybear/frame_annotations.jgz": b"x",
        },
    )
    import_data("co3d", source, tmp_path / "out")
    data = scan(tmp_path / "out")
    assert data.subjects[0].name == "variant/teddybear__34_1479" and all(v.mask for v in data.subjects[0].views)
    assert data.caption(data.subjects[0].views[0]) == "a photo of a teddybear"
    other = made.put(tmp_path / "mine", {f"shoot/{s}/raw_{i}/p.jpg": made.noise(i) for s in "ab" for i in range(2)})
    with pytest.raises(ValueError, match="two files would become variant/a/p.jpg"):
        import_data("template", other, tmp_path / "out2", template="shoot/{subject}/raw_*/{picture}")
    import_data("template", other, tmp_path / "out3", template="shoot/{class}/{subject}/{picture}")
    assert len(scan(tmp_path / "out3").subjects) == 4
    with pytest.raises(ValueError, match="must name each folder once"):
        import_data("template", other, tmp_path / "out4", template="{klass}/{picture}")


def test_dreambench_brings_its_classes(tmp_path):
    source = made.put(
        tmp_path / "db",
        {
            "dataset/prompts_and_classes.txt": "Classes\n\nsubject_name,class\ncat2,cat\n\nPrompts\n'a {0} {1} in snow',x\n",
            "dataset/cat2/00.jpg": made.noise(1),
            "dataset/cat2/01.jpg": made.noise(2),
        },
    )
    import_data("dreambench", source, tmp_path / "out")
    data = scan(tmp_path / "out")
    assert data.caption(data.subjects[0].views[1]) == "a photo of a cat"


def test_ip_adapter_lists(tmp_path):
    source = made.put(
        tmp_path / "ip",
        {"data.json": '[{"image_file": "x/1.png", "text": "A dog"}, {"image_file": "2.png", "text": ""}]'},
    )
    made.put(tmp_path / "pictures", {"x/1.png": made.noise(1), "2.png": made.noise(2)})
    assert import_data("ip_adapter", source / "data.json", tmp_path / "out", pictures=tmp_path / "pictures") == 2
    data = scan(tmp_path / "out")
    assert [data.caption(v) for v in data.loose[0].views] == ["A dog", ""]
    with pytest.raises(ValueError, match="entry 0 names x/1.png, which is not in"):
        import_data("ip_adapter", source / "data.json", tmp_path / "out2")
    made.put(tmp_path, {"secret.png": made.noise(3)})
    made.put(source, {"bad.json": '[{"image_file": "../secret.png", "text": ""}]', "worse.json": "{}"})
    with pytest.raises(ValueError, match=r"'\.\./secret.png', which lies outside"):
        import_data("ip_adapter", source / "bad.json", tmp_path / "out2")
    with pytest.raises(ValueError, match="worse.json is not a list"):
        import_data("ip_adapter", source / "worse.json", tmp_path / "out2")


def test_kohya_and_comfyui_folders(tmp_path):
    source = made.put(
        tmp_path / "k",
        {
            "10_dog/1.png": made.noise(1),
            "10_dog/1.caption": "a dog, in snow",
            "10_dog/2.JPG": made.noise(2),
            "10_dog/2.txt": "a dog",
            "loose.png": made.noise(3),
            "loose.txt": "loose",
        },
    )
    import_data("kohya", source, tmp_path / "kohya")
    data = scan(tmp_path / "kohya")
    assert data.subjects[0].repeats == 10 and data.caption(data.subjects[0].views[0]) == "a dog, in snow"
    import_data("comfyui", source, tmp_path / "comfyui")
    data = scan(tmp_path / "comfyui")
    assert {g.name: (len(g.views), g.weight) for g in data.loose} == {"invariant": (1, 1), "invariant/10_dog": (2, 10)}


def test_imports_leave_the_source_alone_and_go_on_where_they_stopped(tmp_path):
    source = made.put(tmp_path / "k", {f"1_dog/{i}.png": made.noise(i) for i in range(3)})
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.rglob("*.png")}
    import_data("kohya", source, tmp_path / "out", way="link")
    first = tmp_path / "out/variant/1_dog/0.png"
    assert first.stat().st_ino == (source / "1_dog/0.png").stat().st_ino
    first.unlink()
    (tmp_path / "out/variant/1_dog/1.png").unlink()
    made.put(tmp_path / "out", {"variant/1_dog/1.png": b"cut off"})
    import_data("kohya", source, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["import.json", *(f"variant/1_dog/{i}.png" for i in range(3))]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.rglob("*.png")} == before
    assert first.read_bytes() == (source / "1_dog/0.png").read_bytes()


def test_imports_refuse_foreign_folders_and_wrong_layouts(tmp_path):
    source = made.put(tmp_path / "k", {"1_dog/0.png": made.noise(0)})
    made.put(tmp_path / "mine", {"thesis.doc": "x"})
    with pytest.raises(ValueError, match="already holds something else"):
        import_data("kohya", source, tmp_path / "mine")
    assert names_in(tmp_path / "mine") == ["thesis.doc"]
    with pytest.raises(ValueError, match="holds no pictures in the layout of mvimgnet"):
        import_data("mvimgnet", source, tmp_path / "out")
    with pytest.raises(ValueError, match="lie inside each other"):
        import_data("kohya", source, source / "out")
    with pytest.raises(ValueError, match="kind 'flickr' is unknown; choose mvimgnet, co3d"):
        import_data("flickr", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
