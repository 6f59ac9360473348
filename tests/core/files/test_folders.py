"""What other tools leave in folders: hidden and system files, and masks beside pictures under many names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import training_folders as folders

from flexip_core.evaluation import benchmark
from flexip_core.evaluation.instruments import _weight_files
from flexip_core.files.folders import any_system, is_system, masks
from flexip_core.training import __main__ as command
from flexip_core.training.check import check
from flexip_core.training.dataset import scan
from flexip_core.training.importers import import_data

PICTURES = (".png", ".jpg", ".webp")
SYSTEM = [
    *(".DS_Store", "._a.png", ".ipynb_checkpoints", ".Trash-1000", "Thumbs.db", "THUMBS.DB", "desktop.ini", "__MACOSX"),
    *("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Icon\r"),
]


@pytest.mark.parametrize("name", SYSTEM)
def test_hidden_and_system_names_are_known_in_any_case_and_place(name):
    assert is_system(name) and is_system(name.upper()) and any_system(f"a/{name}/b.png") and any_system(f"a\\{name}")


@pytest.mark.parametrize("name", ["a.png", "mac", "recycle", "10_dog", "my @eaDir", "thumbs"])
def test_other_names_are_meant(name):
    assert not any_system(f"a/{name}")


@pytest.mark.parametrize("ending", [".mask", "-masklabel", ".MASK", "-MaskLabel"])
@pytest.mark.parametrize("picture", ["a.png", "dot.ted name.v2.JPG", "a-b_c.webp"])
@pytest.mark.parametrize("kind", [".png", ".PNG", ".jpg"])
def test_masks_of_sure_meaning_belong_to_their_picture(picture, ending, kind):
    mask = os.path.splitext(picture)[0] + ending + kind
    found = masks(["other.png", mask, picture], PICTURES)
    assert found.of == {picture: mask} and found.left_out == () and mask in found and picture not in found


@pytest.mark.parametrize("ending", ["_mask", "-mask", " mask", "_MASK", "_masklabel", "-Mask"])
def test_masks_of_unsure_meaning_are_left_out(ending):
    found = masks(["a.png", f"a{ending}.webp"], PICTURES)
    assert found.of == {} and found.left_out == (f"a{ending}.webp",)


@pytest.mark.parametrize(
    "name", ["dog_mask.png", "carnival-mask.jpg", "unmask.png", "a-masklabel.png", "masked.png", "mask.png"]
)
def test_a_picture_of_a_mask_is_a_picture(name):
    found = masks([name, "b.png"], PICTURES)
    assert found.of == {} and name not in found


def test_the_own_ending_wins_and_an_orphan_with_it_is_no_picture():
    found = masks(["a.png", "a-masklabel.png", "a.mask.png", "b.mask.png", "a.txt", "a_mask.txt"], PICTURES)
    assert found.of == {"a.png": "a.mask.png"} and found.left_out == ("a-masklabel.png", "b.mask.png")


def test_a_clips_mask_is_no_view():
    assert masks(["a.mp4", "a_mask.png"], PICTURES, (".mp4",)).left_out == ("a_mask.png",)


BOXES = [(8, 8, 60, 40), (30, 4, 60, 40), (20, 10, 50, 44)]


def beside(ending: str) -> dict:
    files: dict[str, object] = {"variant/mug/class.txt": "mug"}
    for i, box in enumerate(BOXES):
        files |= {f"variant/mug/{i}.png": folders.noise(i), f"variant/mug/{i}{ending}": folders.box_mask(box)}
    return files


@pytest.mark.parametrize("ending, used", [("-masklabel.png", 3), (".Mask.PNG", 3), ("_mask.png", 0), ("-mask.jpg", 0)])
def test_masks_of_other_tools_are_no_views(tmp_path, ending, used):
    root = folders.put(tmp_path, beside(ending))
    views = [view for _, view in scan(root).views()]
    assert [view.file for view in views] == [f"variant/mug/{i}.png" for i in range(3)]
    assert [view.mask for view in views] == [f"variant/mug/{i}{ending}" if used else None for i in range(3)]
    report = check(root, 32)
    assert report.ok and report.counts["masks"] == used
    said = [problem for problem in report.problems if problem.kind == "unsure mask"]
    assert len(said) == (0 if used else 1)
    if not used:
        assert len(said[0].names) == 3 and "rename them to NAME.mask.png where white is the subject" in said[0].sentence


def test_an_import_takes_them_along_or_says_so(tmp_path, caplog):
    source = {name.replace("variant/mug", "10_mug"): content for name, content in beside("-masklabel.png").items()}
    source |= {"10_mug/3.png": folders.noise(3), "10_mug/3_mask.png": folders.box_mask(BOXES[0]), "@eaDir/0.png": b"x"}
    source |= {"10_mug/0.CAPTION": "a mug", "10_mug/1.TXT": "a cup"}
    assert import_data("kohya", folders.put(tmp_path / "in", source), tmp_path / "out") == 4
    views = {view.file: view for _, view in scan(tmp_path / "out").views()}
    assert sorted(views) == [f"variant/10_mug/{i}.png" for i in range(4)]
    assert views["variant/10_mug/0.png"].mask == "variant/10_mug/0.mask.png"
    assert views["variant/10_mug/3.png"].mask is None and "1 masks in" in caplog.text and "3_mask.png" in caplog.text
    assert [scan(tmp_path / "out").caption(view) for view in views.values()][:2] == ["a mug", "a cup"]


def test_every_import_of_pictures_knows_masks(tmp_path):
    shown = {"0.png": folders.noise(0), "1.png": folders.noise(1)}
    masked = {"0-masklabel.jpg": folders.box_mask(BOXES[0]), "1_mask.png": folders.box_mask(BOXES[1]), "._0.png": b"x"}
    bench = {f"dataset/dog/{name}": content for name, content in (shown | masked).items()}
    bench["dataset/prompts_and_classes.txt"] = "subject_name,class\ndog,dog\n\nObject Prompts"
    by_class = {f"cup/one/images/{name}": content for name, content in (shown | masked).items()}
    by_class["cup/one/Masks/1.png"] = folders.box_mask(BOXES[2])
    for kind, files, subject, second in (("dreambench", bench, "dog", False), ("co3d", by_class, "cup__one", True)):
        assert import_data(kind, folders.put(tmp_path / kind, files), tmp_path / f"{kind} out") == 2
        views = [view for _, view in scan(tmp_path / f"{kind} out").views()]
        place = f"variant/{subject}/"
        assert [view.file for view in views] == [f"{place}0.png", f"{place}1.png"]
        assert [view.mask for view in views] == [f"{place}0.mask.jpg", f"{place}1.mask.png" if second else None]


def test_a_hidden_shard_does_not_make_a_folder_shards(tmp_path):
    root = folders.small_set(tmp_path / "data")
    (root / "._x.tar").write_bytes(b"x")
    assert command.main(["pack", str(root), str(tmp_path / "shards")]) == 0
    (tmp_path / "shards/._invariant-000000.tar").write_bytes(b"x")
    names = [
        sorted(view.caption is not None for _, view in scan(folder).views()) for folder in (root, tmp_path / "shards")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["a.caption", "a.TXT", "a.Caption"])
def test_captions_of_other_tools_are_read(tmp_path, name):
    files = {"variant/m/a.png": folders.noise(1), f"variant/m/{name}": "a mug", "variant/m/b.png": folders.noise(2)}
    data = scan(folders.put(tmp_path, files | {"variant/m/CLASS.txt": "mug"}))
    assert [data.caption(view) for _, view in data.views()] == ["a mug", "a photo of a mug"] and not data.unused


def test_txt_wins_over_caption(tmp_path):
    files = {"invariant/a.png": folders.noise(1), "invariant/a.txt": "one", "invariant/a.caption": "two"}
    data = scan(folders.put(tmp_path, files))
    assert [data.caption(view) for _, view in data.views()] == ["one"] and data.unused == ("invariant/a.caption",)


NOTHING = {
    "too deep": (
        ["variant/dogs/rex/a.png", "variant/dogs/rex/b.png"],
        "pictures lie one folder too deep: variant/dogs/rex/a.png",
    ),
    "unread format": (
        ["variant/m/a.HEIC", "variant/m/b.avif"],
        r"formats that are not read (.avif, .heic): variant/m/a.HEIC",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_set_without_one_usable_picture_is_an_error_that_says_why(tmp_path, case):
    names, words = NOTHING[case]
    report = check(folders.put(tmp_path, {name: folders.noise(1) if "png" in name else b"x" for name in names}), 32)
    assert not report.ok and "Error: there is no picture to train on" in report.text()
    (said,) = [problem for problem in report.problems if problem.kind == case]
    assert words in said.sentence and said.names == tuple(names)


def test_system_folders_are_passed_over_everywhere(tmp_path):
    junk = [name for name in SYSTEM if "\r" not in name and "." not in name[1:] and "checkpoints" not in name]
    junk += [".ipynb_checkpoints"]
    training = folders.small_set(tmp_path / "training")
    expected = [view.file for _, view in scan(training).views()]
    outputs = folders.put(
        tmp_path / "outputs",
        {
            "src_image/dog-00-0.png": folders.noise(1),
            "tgt_image/dog-00-0.png": folders.noise(2),
            "text/dog-00-0.txt": "a dog",
        },
    )
    plus = folders.put(
        tmp_path / "plus",
        {"images/object/00.jpg": folders.noise(1), "captions/object/00.txt": "cup\na cup on a table\n"},
    )
    plain = folders.put(
        tmp_path / "plain", {"prompts.txt": "a {class}\n", "mug/class.txt": "mug", "mug/0.png": folders.noise(1)}
    )
    weights = folders.put(tmp_path / "weights", {"a.safetensors": b"x"})
    for name in junk:
        for place in ("variant", "variant/mug", "invariant", ""):
            folders.put(training / place / name, {"a.png": folders.noise(3), "._a.png": b"x"})
        for place in ("src_image", "tgt_image", "text"):
            folders.put(outputs / place / name, {"dog-00-0-checkpoint.png": folders.noise(2), "x.txt": "x"})
        folders.put(plus / "images/object" / name, {"00-checkpoint.jpg": folders.noise(1)})
        folders.put(plain / name, {"mug/._0.png": b"x", "a.png": folders.noise(4)})
        folders.put(plain / "mug" / name, {"a.png": folders.noise(4)})
        folders.put(weights / name, {"a.safetensors": b"x", "._a.safetensors": b"x"})
    assert [view.file for _, view in scan(training).views()] == expected
    assert len(benchmark.read_outputs(outputs)[1]) == 1
    assert len(benchmark.read_benchmark(plus).cases) == 1
    assert [subject.name for subject in benchmark.read_benchmark(plain).subjects] == ["mug"]
    assert _weight_files([weights]) == [weights / "a.safetensors"]


@pytest.mark.parametrize("ending", [".mask.png", "_mask.png", "-MaskLabel.JPG"])
def test_masks_are_no_references_and_no_results(tmp_path, ending):
    mask = folders.box_mask((1, 1, 9, 9))
    plain = {
        "prompts.txt": "a {class}\n",
        "mug/class.txt": "mug",
        "mug/0.png": folders.noise(1),
        f"mug/0{ending}": mask,
    }
    (subject,) = benchmark.read_benchmark(folders.put(tmp_path / "plain", plain)).subjects
    assert [path.name for path in subject.references] == ["0.png"]
    made = {f"{folder}/dog-00-0{end}": mask for folder in ("src_image", "tgt_image") for end in (".png", ending)}
    _, pictures = benchmark.read_outputs(folders.put(tmp_path / "outputs", made | {"text/dog-00-0.txt": "a dog"}))
    assert [picture.path.name for picture in pictures] == ["dog-00-0.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_commands_follow_links_when_they_are_told_to(tmp_path, caplog):
    elsewhere = folders.put(tmp_path / "elsewhere", {"1.png": folders.noise(21), "2.png": folders.noise(22)})
    root = folders.small_set(tmp_path / "data")
    os.symlink(elsewhere, root / "variant/linked")
    os.symlink(elsewhere / "1.png", root / "invariant/one.png")
    assert command.main(["pack", str(root), str(tmp_path / "refused")]) == 1
    assert "variant/linked in" in caplog.text and "start the command with --follow-links" in caplog.text
    assert command.main(["pack", str(root), str(tmp_path / "shards"), "--follow-links"]) == 0
    packed = {view.file for _, view in scan(tmp_path / "shards").views()}
    assert {"invariant/one.png", "variant/linked/1.png", "variant/linked/2.png"} <= packed
    assert command.main(["pack", str(root), str(tmp_path / "again")]) == 1, "only for the one call"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
@pytest.mark.parametrize("target", [".", "..", "../../../data", "../mug"])
def test_a_followed_link_that_leads_back_is_refused(tmp_path, target, caplog):
    root = folders.small_set(tmp_path / "data")
    os.symlink(Path(target), root / "variant/mug/again")
    assert command.main(["pack", str(root), str(tmp_path / "shards"), "--follow-links"]) == 1
    assert "variant/mug/again in" in caplog.text and "leads back to where it lies" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_a_link_that_leads_nowhere_says_so(tmp_path):
    root = folders.small_set(tmp_path)
    os.symlink(tmp_path / "gone.png", root / "invariant/one.png")
    with pytest.raises(ValueError, match="invariant/one.png in .* is a link that leads nowhere"):
        scan(root)
