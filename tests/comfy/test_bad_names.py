"""File names in prompts (rows 1 and 19 of the users' table): none leads out of its folder, every refusal is one sentence, and
folders that artists link into models/ keep working.
"""

from __future__ import annotations

import inspect
import os
import sys

import folder_paths
import pytest
from flexip_pack.flexip_core.files.reference_file import SUFFIX, load_reference, save_reference
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes import files
from flexip_pack.nodes.auto_gate import FlexIPAutoGate
from flexip_pack.nodes.load import LoadFlexIPAdapters
from flexip_pack.nodes.reference_files import FlexIPLoadReference, FlexIPSaveReference
from flexip_pack.nodes.score import FlexIPScore
from flexip_pack.nodes.train import FlexIPTrain
from test_load_and_encode import adapters_file, load, picture
from test_reference_nodes import reference

EXTENSIONS = {".safetensors", ".pt", ".bin"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """ComfyUI's folders, empty, and a private one beside them with the files that a bad name could reach."""
    table = dict(folder_paths.folder_names_and_paths)
    for name in (*files.ADAPTER_FOLDERS, files.ENCODER_FOLDER, "checkpoints", "private", "input", "output"):
        (tmp_path / name).mkdir()
        table[name] = ([str(tmp_path / name)], EXTENSIONS)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "output"))
    adapters_file(tmp_path, "good.safetensors")
    adapters_file(tmp_path, "../private/secret.safetensors")
    save_reference(reference(), tmp_path / "private" / f"secret{SUFFIX}")
    mini.make_mini_encoders(tmp_path / "private")
    return tmp_path


def names(world, target: str) -> list[str]:
    """Ways to say `target`, a path in the private folder, and names that no folder can hold."""
    private = world / "private"
    return [
        f"../private/{target}",
        f"x/../../private/{target}",
        f"./../private/{target}",
        f"..\\private\\{target}",
        f"/../private/{target}",
        str(private / target),
        f"/{private / target}",
        f"file://{private / target}",
        f"C:\\private\\{target}",
        f"\\\\server\\private\\{target}",
        f"~/{target}",
        f"good.safetensors/../../private/{target}",
        f"{target}\0.png",
        f"\0{target}",
        "",
        ".",
        "..",
        "/",
        "../../etc/passwd",
        "/etc/passwd",
        "CON",
        "nul.safetensors",
        "x" * 5000,
        "a/" * 3000 + target,
        "two\nlines.safetensors",
        "half a letter \ud800",
        "\x1b[31mred.safetensors",
    ]


def sentence(error: BaseException | str, node: str) -> str:
    text = str(error)
    assert text.count(node) == 1, text
    assert text.startswith(f"{node}: ") and text.rstrip().endswith(".") and text.isprintable() and len(text) < 1500, (
        text
    )
    assert "Traceback" not in text and "embedded null" not in text, text
    return text


def refused(node: str, function, *args, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    assert type(error.value) is ValueError
    return sentence(error.value, node)


def test_no_adapter_name_leads_out_of_the_folders(world):
    for name in names(world, "secret.safetensors"):
        for choice in ((name, "auto"), ("good.safetensors", name)):
            text = refused("LoadFlexIPAdapters", load, *choice)
            assert "no file" in text or (choice[1] == "" and "set personalization to auto" in text), name


def test_no_encoder_name_leads_out_of_the_folder(world):
    for name in names(world, mini.MINI_CLIP_FILE):
        for role in ("clip_vision", "dino"):
            assert "no file" in refused("LoadFlexIPAdapters", load, "good.safetensors", **{role: name}), name


def test_no_name_on_score_leads_out_of_the_folder(world):
    """Score goes on without the encoder and says why, in its report."""
    for name in names(world, mini.MINI_CLIP_FILE):
        report = FlexIPScore.execute(picture(), picture(), clip_vision=name, dino=name).args[0]
        assert (
            report.count("there is no file") >= 2
            and "CLIP-I not available" in report
            and "DINO-I not available" in report
        )


def test_fingerprints_of_bad_names_are_sentences_too(world):
    """ComfyUI asks for them before it runs a node, and logs what they raise."""
    for name in names(world, "secret.safetensors"):
        refused("LoadFlexIPAdapters", LoadFlexIPAdapters.fingerprint_inputs, name, "auto", "auto", "auto")
        refused("LoadFlexIPAdapters", LoadFlexIPAdapters.fingerprint_inputs, "good.safetensors", "auto", "auto", name)


@pytest.mark.parametrize("node", [LoadFlexIPAdapters, FlexIPScore, FlexIPAutoGate, FlexIPTrain])
def test_every_combo_of_files_refuses_what_is_not_listed(world, node):
    """ComfyUI leaves the check to validate_inputs, which takes either separator and is otherwise as strict as the list."""
    (world / "flexip" / "sub").mkdir()
    adapters_file(world, "sub/good.safetensors")
    mini.make_mini_encoders(world / files.ENCODER_FOLDER / "sub")
    (world / "checkpoints" / "sub").mkdir()
    (world / "checkpoints" / "sub" / "base.safetensors").write_bytes(b"x")
    folder_paths.filename_list_cache.clear()
    options = {one.id: getattr(one, "options", None) for one in node.define_schema().inputs}
    inputs = list(inspect.signature(node.validate_inputs).parameters)
    listed = {name: next(choice for choice in options[name] if "sub/" in choice) for name in inputs}
    assert node.validate_inputs(**listed) is True
    assert node.validate_inputs(**{name: choice.replace("/", "\\") for name, choice in listed.items()}) is True
    assert node.validate_inputs(**dict.fromkeys(inputs)) is True, "values that come over wires"
    for input_name in inputs:
        for bad in names(world, "secret.safetensors"):
            said = node.validate_inputs(**{**listed, input_name: bad})
            assert f"{input_name} is " in sentence(said, node.define_schema().node_id)


def test_no_reference_name_leads_out_of_the_folders(world):
    target = f"secret{SUFFIX}"
    for name in names(world, target):
        for mark in ("", " [input]", " [output]", " [temp]"):
            said = FlexIPLoadReference.validate_inputs(name + mark)
            sentence(said, "FlexIPLoadReference")
            refused("FlexIPLoadReference", FlexIPLoadReference.execute, name + mark)
    refused("FlexIPLoadReference", FlexIPLoadReference.execute, ["a", "list"])
    refused("FlexIPLoadReference", FlexIPLoadReference.execute, 3)


def test_no_prefix_saves_outside_the_output_folder(world):
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    prefixes = [name for name in names(world, "made") if name]
    for prefix in [*prefixes, "%year%/../../private/made", "../output/../private/made", "a/" * 40 + "made"]:
        try:
            FlexIPSaveReference.execute(reference(), prefix)
        except (ValueError, RuntimeError) as error:
            sentence(error, "FlexIPSaveReference")
    made = [path for path in world.rglob("*") if path.is_file() and path not in before]
    assert made, "nothing was saved, so the test shows nothing"
    assert all(path.resolve().is_relative_to(world / "output") and path.name.endswith(SUFFIX) for path in made), made
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in made:
        load_reference(path)


@posix
def test_a_linked_sub_folder_of_the_output_folder_takes_nothing(world):
    os.symlink(world / "private", world / "output" / "linked")
    before = sorted((world / "private").iterdir())
    assert "leads out" in refused("FlexIPSaveReference", FlexIPSaveReference.execute, reference(), "linked/made")
    assert sorted((world / "private").iterdir()) == before


@posix
def test_linked_references_outside_the_folders_are_refused(world):
    """What ComfyUI does with pictures: a link in the input folder is no way out of it."""
    os.symlink(world / "private" / f"secret{SUFFIX}", world / "input" / f"link{SUFFIX}")
    os.symlink(world / "private", world / "input" / "folder")
    for name in (f"link{SUFFIX}", f"folder/secret{SUFFIX}"):
        assert "outside" in refused("FlexIPLoadReference", FlexIPLoadReference.execute, name)


@posix
def test_model_folders_and_files_that_are_linked_in_keep_working(world):
    """Row 1: artists keep their models on another disk and link them into models/; ComfyUI follows such links."""
    os.symlink(world / "private", world / "flexip" / "other disk")
    os.symlink(world / "private" / "secret.safetensors", world / "ipadapter" / "one.safetensors")
    os.symlink(world / "private", world / files.ENCODER_FOLDER / "disk")
    os.symlink(world / "gone", world / "flexip" / "broken.safetensors")
    folder_paths.filename_list_cache.clear()
    for name in ("other disk/secret.safetensors", "one.safetensors"):
        assert load(name).title.startswith(name)
        LoadFlexIPAdapters.fingerprint_inputs(name, "auto", "auto", "auto")
    report = FlexIPScore.execute(picture(), picture(), clip_vision=f"disk/{mini.MINI_CLIP_FILE}", dino="none").args[0]
    assert "CLIP-I 1.000" in report
    said = refused("LoadFlexIPAdapters", load, "broken.safetensors")
    assert "broken.safetensors' in" in said and "is a link that leads nowhere" in said and "gone' is missing" in said


@posix
def test_a_link_to_itself_does_not_hang_the_lists(world):
    os.symlink(world / "input", world / "input" / "again")
    save_reference(reference(), world / "input" / f"a{SUFFIX}")
    assert FlexIPLoadReference.define_schema().inputs[0].options == [f"a{SUFFIX}"]
    assert FlexIPLoadReference.execute(f"a{SUFFIX}").args[0].count == 2
