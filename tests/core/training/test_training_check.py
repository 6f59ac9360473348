"""The check finds what would spoil a training, says it in sentences, and is content with good data."""

import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import training_folders as made
from PIL import Image, ImageEnhance

from flexip_core.evaluation.metrics import read_picture
from flexip_core.training import check as check_module
from flexip_core.training import pictures
from flexip_core.training.check import HASH, _alike, _Seen, check, perceptual_hash
from flexip_core.training.data import INVARIANT
from flexip_core.training.dataset import View
from flexip_core.training.pictures import CutOptions
from flexip_core.training.shards import pack
from flexip_core.training.sheet import choose_pairs, contact_sheet_of_pairs
from flexip_core.training.sources import make_source

SIZE = 32
ROOT = Path(__file__).parents[3]


def checked(tmp_path, files, **arguments):
    return check(made.put(made.small_set(tmp_path), files), SIZE, **arguments)


def problems(report, kind):
    return [problem for problem in report.problems if problem.kind == kind]


def only(report, kind, level):
    (problem,) = problems(report, kind)
    assert problem.level == level and "\n" not in problem.sentence and problem.sentence.endswith(".")
    assert report.ok is (level != "error")
    return problem


def test_good_data_pass_and_are_counted(tmp_path):
    report = check(made.small_set(tmp_path), SIZE)
    assert report.ok and report.problems == []
    assert report.counts == {
        "subjects": 2,
        "variant views": 5,
        "clips": 0,
        "loose pictures": 3,
        "masks": 3,
        "captions": 5,
        "class captions": 3,
        "empty captions": 0,
        "val subjects": 1,
        "val loose pictures": 1,
        "smallest side": 48,
    }
    assert "2 subjects with 5 views" in report.text() and "Nothing is wrong." in report.text()
    json.dumps(report.to_dict())


def test_unreadable_files_are_errors_and_the_others_are_still_looked_at(tmp_path):
    report = checked(
        tmp_path,
        {
            "variant/mug/a.png": b"no picture",
            "variant/mug/b.mask.png": b"no mask",
            "val/variant/cup/film.mp4": b"no clip",
        },
    )
    found = problems(report, "unreadable")
    assert {p.names[0] for p in found} == {"variant/mug/a.png", "variant/mug/b.png", "val/variant/cup/film.mp4"}
    assert all("cannot be read" in p.sentence and p.sentence.endswith(".") for p in found) and not report.ok
    assert any("variant/mug/b.mask.png cannot be read" in p.sentence for p in found)


def test_masks_must_fit_and_show_something(tmp_path):
    report = checked(
        tmp_path,
        {
            "variant/mug/a.mask.png": made.box_mask((0, 0, 9, 9), (20, 20)),
            "variant/mug/b.mask.png": made.flat(0, mode="L"),
        },
    )
    assert "has 20 x 20 pixels, its picture 64 x 48" in problems(report, "unreadable")[0].sentence
    assert only(report, "empty mask", "error").names == ("variant/mug/b.mask.png",)


def test_a_subject_needs_two_views(tmp_path):
    report = checked(tmp_path, {"variant/lonely/1.png": made.noise(77), "variant/lonely/class.txt": "fox"})
    assert only(report, "one view", "error").names == ("variant/lonely",)


def test_the_same_picture_twice_is_no_variation(tmp_path):
    image = made.noise(50)
    report = checked(tmp_path, {"variant/fox/1.png": image, "variant/fox/2.bmp": image, "variant/fox/class.txt": "fox"})
    problem = only(report, "same view", "error")  # other file, same pixels
    assert problem.names == ("variant/fox/1.png", "variant/fox/2.bmp")
    assert "copying under the gate of variation" in problem.sentence


def test_near_duplicates_are_found_by_the_hash_and_other_photographs_are_not(tmp_path):
    cat = made.photo("chelsea")
    report = checked(
        tmp_path,
        {
            "variant/cat/1.png": cat,
            "variant/cat/2.jpg": ImageEnhance.Brightness(cat).enhance(1.1),
            "variant/cat/3.png": made.photo("astronaut"),
            "variant/cat/4.png": made.photo("coffee"),
            "variant/cat/class.txt": "cat",
        },
    )
    assert only(report, "near duplicate", "warning").names == ("variant/cat/1.png", "variant/cat/2.jpg")


def test_the_hash_ignores_size_and_compression(tmp_path):
    cat, other = made.photo("chelsea", 200), made.photo("rocket", 200)
    cat.resize((90, 90)).save(tmp_path / "x.jpg", quality=60)
    small = perceptual_hash(Image.open(tmp_path / "x.jpg"))
    assert (perceptual_hash(cat) != small).sum() <= 10
    assert (perceptual_hash(cat) != perceptual_hash(other)).sum() > 60


def test_an_encoder_judges_likeness_instead_where_there_is_one(tmp_path):
    seen = []

    def embed(pictures):
        seen.append(tuple(pictures.shape))
        return torch.ones(1, 4)

    report = check(made.small_set(tmp_path), SIZE, embed=embed)
    assert len(problems(report, "near duplicate")) == 2, "to it, all views of both subjects look alike"
    assert set(seen) == {(1, 3, SIZE, SIZE)}


def test_duplicates_between_folders_and_held_out_pictures_that_are_trained_on(tmp_path):
    image = made.noise(60)
    report = checked(tmp_path, {"invariant/x.png": image, "val/invariant/y.png": image, "variant/mug/z.png": image})
    assert (
        "val/invariant/y.png is held out for validation and trained on as"
        in only(report, "val overlap", "error").sentence
    )
    assert only_warning(report, "duplicate").names == ("variant/mug/z.png", "invariant/x.png")


def only_warning(report, kind):
    (problem,) = problems(report, kind)
    assert problem.level == "warning"
    return problem


def test_captions_may_not_be_empty_or_too_long(tmp_path):
    report = checked(
        tmp_path,
        {
            "invariant/hill.txt": "",
            "invariant/bare.png": made.noise(70),
            "invariant/sea.txt": ", ".join(["a very long caption"] * 20),
            "variant/mug/class.txt": b"\xff",
        },
    )
    assert problems(report, "empty caption")[0].names == ("invariant/bare.png", "invariant/hill.jpg")
    assert problems(report, "long caption")[0].names == ("invariant/sea.png",)
    assert "variant/mug/class.txt is not text in UTF-8" in problems(report, "caption")[0].sentence
    assert report.counts["empty captions"] == 2
    assert problems(check(tmp_path, SIZE, tokens=400), "long caption") == []


def test_small_pictures_unused_files_and_repeats_are_told(tmp_path):
    report = checked(
        tmp_path,
        {
            "invariant/tiny.png": made.noise(80, (40, 20)),
            "invariant/tiny.txt": "tiny",
            "variant/10_fox/1.png": made.noise(81),
            "variant/10_fox/2.png": made.noise(82),
            "variant/10_fox/class.txt": "fox",
            "variant/stray.png": made.noise(83),
        },
    )
    assert only_warning(report, "small").names == ("invariant/tiny.png",)
    assert report.counts["smallest side"] == 20
    assert only_warning(report, "unused").names == ("variant/stray.png",)
    assert "variant/10_fox 10 times" in problems(report, "repeats")[0].sentence
    assert report.ok
    assert report.text().index("Warning:") < report.text().index("Note:")


def test_clips_and_shards_are_checked_like_folders(tmp_path):
    root = made.small_set(tmp_path / "data")
    made.clip(root / "variant/lamp/film.mp4", 40)
    made.put(root, {"variant/lamp/film.txt": "a lamp"})
    report = check(root, SIZE)
    assert report.counts["clips"] == 1 and report.counts["variant views"] == 9
    assert problems(report, "near duplicate"), "a film of one grey after the other varies nothing"
    pack(root, tmp_path / "shards")
    assert check(tmp_path / "shards", SIZE).to_dict() == report.to_dict()


def test_progress_is_told(tmp_path):
    steps = []
    check(made.small_set(tmp_path), SIZE, on_progress=lambda done, total: steps.append((done, total)))
    assert list(dict.fromkeys(steps)) == [(i + 1, 11) for i in range(11)]


def test_whoever_raises_at_progress_ends_the_check_wherever_it_is(tmp_path):
    made.clip(made.small_set(tmp_path) / "variant/lamp/film.mp4", 40)
    ended_in, ended = [], True
    while ended:

        def show(done, total, calls=itertools.count()):
            if next(calls) == len(ended_in):
                raise KeyboardInterrupt

        try:
            check(tmp_path, SIZE, on_progress=show)
            ended = False
        except KeyboardInterrupt as stop:
            ended_in.append({frame.name for frame in traceback.extract_tb(stop.__traceback__)})
    for where in ("scan", "_digests", "_captions", "_alike"):
        assert any(where in names for names in ended_in), where


def views_seen(n):
    """n views that all look alike, two thirds of which are one picture."""
    same, look = np.zeros(HASH * HASH, bool), np.ones(HASH * HASH, bool)
    look[:10] = False
    return [
        _Seen(
            None,
            View(f"variant/mug/{i}.png"),
            pixels=str(i * (i % 3 == 0)).encode(),
            look=look if i % 2 else same | ~look,
        )
        for i in range(n)
    ]


def test_pairs_that_look_alike_are_counted_and_not_listed():
    """What it counts is what looking at all pairs one by one counts, and the work does not grow with the pairs."""

    def lines(n):
        """Lines of the check that run."""
        run = 0

        def trace(frame, event, arg):
            nonlocal run
            run += event == "line"
            return trace if frame.f_code.co_filename == check_module.__file__ else None

        sys.settrace(trace)
        try:
            found = _alike("mug", entries := views_seen(n), lambda: None)
        finally:
            sys.settrace(None)
        return run, found, entries

    few, found, entries = lines(400)
    many, _, _ = lines(800)
    assert many <= 5 * few and few <= 40 * 400
    pairs = list(itertools.combinations(entries, 2))
    same = [(a, b) for a, b in pairs if a.pixels == b.pixels]
    near = [(a, b) for a, b in pairs if a.pixels != b.pixels and (a.look != b.look).sum() <= 10]
    for problem, expected in zip(found, (same, near), strict=True):
        assert f"{len(expected)} " in problem.sentence
        assert set(problem.names) == {entry.view.name for pair in expected for entry in pair}
        assert len(problem.names) == len(set(problem.names)), "each view once"
        first, second = (entry.view.name.rpartition("/")[2] for entry in expected[0])
        assert f"{first} and {second}" in problem.sentence


def large_png(side):
    """A white picture of side x side pixels in a few kilobytes, made without holding it."""
    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


CHILD = """
import resource, sys
from flexip_core.training.check import check
check(sys.argv[1], 32, workers=1)  # all that is read and reserved once
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 250 * 2**20,) * 2)
print(check(sys.argv[2], 32, workers=1).text())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited as Linux does")
def test_pictures_over_64_megapixels_are_refused_by_their_header(tmp_path):
    """In a process that may take 250 MB more than it has: decoding one takes four times that."""
    large = large_png(8192)
    assert len(large) < 20_000
    made.small_set(tmp_path / "good")
    made.put(
        made.small_set(tmp_path / "large"),
        {"variant/mug/a.png": large, "variant/mug/b.mask.png": large, "invariant/sea.png": large},
    )
    command = [sys.executable, "-c", CHILD, str(tmp_path / "good"), str(tmp_path / "large")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("it has 8192 x 8192 pixels, and 64 megapixels are the most that is read") == 3
    with pytest.raises(ValueError, match="8192 x 8192"):
        read_picture(tmp_path / "large/invariant/sea.png")


def test_all_workers_of_the_check_share_one_budget_of_pixels(tmp_path, monkeypatch):
    root = made.small_set(tmp_path)
    made.clip(root / "variant/lamp/film.mp4", 40)
    budget, held = pictures.Budget(10**6), []
    monkeypatch.setattr(check_module, "DECODING", budget)
    for name in ("decode_picture", "decode_frame"):

        def decode(*arguments, real=getattr(pictures, name)):
            assert budget.used, "it is decoded while its pixels are held"
            held.append(arguments[1])
            return real(*arguments)

        monkeypatch.setattr(check_module, name, decode)
    assert check(root, SIZE).counts["variant views"] == 9
    assert len(held) == 15 and budget.used == 0


def test_a_budget_lets_in_what_fits_and_a_single_picture_always():
    budget, order = pictures.Budget(10), []

    def other():
        with budget.held(6):
            order.append("second")

    with budget.held(25):
        assert budget.used == 10
    with budget.held(6), budget.held(4):
        thread = threading.Thread(target=other)
        thread.start()
        while not budget._change._waiters:
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and budget.used == 0


def test_a_sheet_shows_pairs_with_kind_and_caption(tmp_path):
    source = make_source(made.small_set(tmp_path), SIZE)
    sheet = contact_sheet_of_pairs(source, 4, seed=1)
    assert sheet.mode == "RGB"
    again, other = contact_sheet_of_pairs(source, 4, seed=1), contact_sheet_of_pairs(source, 4, seed=2)
    assert sheet.tobytes() == again.tobytes() != other.tobytes()
    _, reference, *_ = source.row(*choose_pairs(source, 4, seed=1)[0])
    first = np.asarray(sheet.crop((6, 6, 6 + 192, 6 + 192)).resize((SIZE, SIZE))).astype(float)
    shown = (reference.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(first - shown).mean() < 12, "the reference comes first"


@pytest.mark.parametrize("seed", range(5))
def test_a_sheet_shows_everything_once_before_anything_twice_and_cuts_where_cuts_are_drawn(tmp_path, seed):
    """Where training draws one subject far more often and one time in two no cut at all."""
    names = [f"variant/{subject}/{view}.png" for subject in "abcd" for view in (1, 2)]
    names += [f"invariant/{number}.png" for number in range(4)]
    weights = {"dataset.toml": '[weights]\n"variant/a" = 100.0'}
    data = made.put(tmp_path, {**{name: made.noise(i) for i, name in enumerate(names)}, **weights})
    source = make_source(data, SIZE, options=CutOptions(invariant_subject=0.0, invariant_whole=0.5))
    pairs = choose_pairs(source, 8, seed)
    targets = [source.choice(kind, draws[:3])[0].name for kind, draws in pairs]
    assert sorted(name.rpartition("/")[0] for name in targets[1::2]) == [f"variant/{subject}" for subject in "abcd"]
    assert sorted(targets[::2]) == names[-4:]
    for kind, draws in pairs[::2]:
        target, reference, *_ = source.row(kind, draws)
        assert kind == INVARIANT and not torch.equal(target, reference)


def test_a_sheet_without_loose_pictures_shows_other_subjects_in_its_invariant_pairs(tmp_path):
    data = made.put(tmp_path, {f"variant/{name}/{view}.png": made.noise(view) for name in "abcd" for view in (1, 2)})
    source = make_source(data, SIZE)
    targets = [source.choice(kind, draws[:3])[0].name for kind, draws in choose_pairs(source, 4, 0)]
    assert len({name.rpartition("/")[0] for name in targets}) == 4
