"""FlexIPSaveReference and FlexIPLoadReference: what is saved samples like what was encoded, and no name leads out of ComfyUI's folders."""

import dataclasses
import errno
import os
from types import SimpleNamespace

import folder_paths
import pytest
import tiny
import torch
from flexip_pack.flexip_core.files.reference_file import SUFFIX, save_reference
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.run.reference import Reference, ReferenceSet
from flexip_pack.nodes import notices
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.load import LoadedAdapters
from flexip_pack.nodes.reference_files import FlexIPLoadReference, FlexIPSaveReference, reference_names
from test_load_and_encode import CLIP, DINO

P, N = tiny.cond(1), tiny.cond(2)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Empty input and output folders of our own, and one beside them that no node may reach."""
    for name in ("input", "output", "private"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


def adapters(model, seed: int = 3, **changes) -> LoadedAdapters:
    network = FlexIPNetwork(dataclasses.replace(tiny.config_for(model), **{"clip": CLIP, "dino": DINO, **changes}))
    g = tiny.generator(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.7 / p.shape[-1] ** 0.5)
    network.eval().requires_grad_(False)
    return LoadedAdapters(
        "anna.safetensors", network, tiny.comfy.model_patcher.ModelPatcher(network, tiny.CPU, tiny.CPU), {}
    )


def reference(seed: int = 9, clip=CLIP, dino=DINO) -> Reference:
    g = tiny.generator(seed)
    needs = FlexIPNetwork.needs(SimpleNamespace(cfg=SimpleNamespace(clip=clip, dino=dino)))
    features = {"cls": torch.randn(2, clip.width, generator=g), "patches": torch.randn(2, 16, dino.width, generator=g)}
    return Reference(
        features, {name: torch.zeros_like(value) for name, value in features.items()}, "tiny encoders", needs
    )


def save(reference, prefix: str = "flexip/reference") -> str:
    """The name by which the loader lists the saved file."""
    saved = FlexIPSaveReference.execute(reference, prefix).ui["files"][0]
    assert saved["type"] == "output"
    return f"{saved['subfolder']}/{saved['filename']} [output]".lstrip("/")


def load(name: str) -> Reference:
    assert FlexIPLoadReference.validate_inputs(name) is True
    return FlexIPLoadReference.execute(name).args[0]


def one_sentence(error, node: str) -> str:
    text = str(error.value)
    assert text.startswith(f"{node}: ") and text.count(node) == 1 and text.endswith(".") and "\n" not in text, text
    return text


def test_a_loaded_reference_samples_like_the_one_that_was_saved(world):
    """Nodes run in inference mode, and the loaded tensors must be as good as fresh ones in a run."""
    model, original = tiny.tiny_model(), reference()
    loaded_adapters = adapters(model)
    with torch.inference_mode():
        loaded = load(save(original))
        results = [
            tiny.ksample(ApplyFlexIPGate.execute(model, loaded_adapters, which, 0.4, 1.0, 0.0, 1.0).args[0], P, N)
            for which in (original, loaded, reference(seed=10))
        ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]), "the reference has no effect, so the test shows nothing"


def test_a_loaded_reference_of_other_encoders_is_refused_by_the_gate(world):
    model = tiny.tiny_model()
    other = dataclasses.replace(CLIP, model="clip of another kind")
    loaded = load(save(reference(clip=other)))
    with pytest.raises(ValueError) as error:
        ApplyFlexIPGate.execute(model, adapters(model), loaded, 0.4, 1.0, 0.0, 1.0)
    text = one_sentence(error, "ApplyFlexIPGate")
    assert "anna.safetensors" in text and "tiny clip" in text and "clip of another kind" in text


def test_the_same_adapters_loaded_again_take_a_loaded_reference(world):
    """Needs are compared by value: another run, another machine."""
    model = tiny.tiny_model()
    loaded = load(save(reference()))
    ApplyFlexIPGate.execute(model, adapters(model, seed=1), loaded, 0.4, 1.0, 0.0, 1.0)


def test_saving_again_counts_up_and_overwrites_nothing(world):
    names = [save(reference(seed)) for seed in (1, 2, 3)]
    assert names == [f"flexip/reference_0000{number}_{SUFFIX} [output]" for number in (1, 2, 3)]
    assert reference_names() == names
    for seed, name in zip((1, 2, 3), names):
        assert torch.equal(load(name).features["cls"], reference(seed).features["cls"])


def test_the_node_shows_where_the_file_went(world):
    result = FlexIPSaveReference.execute(reference(), "heroes/anna")
    text = result.ui["text"][0]
    assert f"heroes/anna_00001_{SUFFIX}" in text and "2 picture(s)" in text and "tiny encoders" in text
    assert [report["line"] for report in result.ui[notices.REPORT]] == [text]


@pytest.mark.parametrize("prefix", ["../private/a", "a/../../private/a", "/private/a", "{root}/private/a"])
def test_no_prefix_saves_outside_the_output_folder(world, prefix):
    with pytest.raises(ValueError) as error:
        save(reference(), prefix.format(root=world))
    assert "filename_prefix" in one_sentence(error, "FlexIPSaveReference")
    assert not list((world / "private").iterdir()) and not list((world / "output").rglob("*"))


@pytest.mark.parametrize(
    "prefix, says",
    [("", "ends without a name"), ("heroes/", "ends without a name"), ("heroes/.", "ends without a name")]
    + [("a" * 300, "too long"), ("a" * 300 + "/b", "too long")]
    + [(prefix, "keeps for a device") for prefix in ("nul", "CON.x", "com1/heroes", "heroes/aux.1")],
)
def test_a_prefix_that_makes_no_name_is_refused(world, prefix, says):
    with pytest.raises(ValueError, match=f"filename_prefix .*{says}"):
        save(reference(), prefix)
    assert not [path for path in (world / "output").rglob("*") if path.is_file()]


def test_a_link_in_the_output_folder_does_not_lead_out(world):
    (world / "output" / "door").symlink_to(world / "private")
    with pytest.raises(ValueError, match="filename_prefix"):
        save(reference(), "door/a")
    save_reference(reference(), world / "private" / f"secret{SUFFIX}")
    (world / "output" / f"window{SUFFIX}").symlink_to(world / "private" / f"secret{SUFFIX}")
    assert reference_names() == []
    for name in (f"door/secret{SUFFIX} [output]", f"window{SUFFIX} [output]"):
        assert_refused(name, "outside")


def test_a_combination_of_references_is_refused(world):
    with pytest.raises(ValueError) as error:
        save(ReferenceSet((reference(1), reference(2)), (1.0, 0.5)))
    assert "combin" in one_sentence(error, "FlexIPSaveReference")
    assert not list((world / "output").rglob("*"))


def test_a_reference_that_could_not_be_loaded_is_not_saved(world):
    with pytest.raises(ValueError) as error:
        save(dataclasses.replace(reference(), needs=()))
    assert "cannot be saved" in one_sentence(error, "FlexIPSaveReference")


def test_a_full_disk_is_said_and_leaves_nothing(world, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RuntimeError) as error:
        save(reference())
    assert "No space left on device" in one_sentence(error, "FlexIPSaveReference")
    assert not [path for path in (world / "output").rglob("*") if path.is_file()]


def put(world, name: str) -> None:
    path = world / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_reference(reference(), path)


def test_the_list_holds_reference_files_of_both_folders_and_nothing_else(world):
    for name in (f"input/b{SUFFIX}", f"input/deep/er/a{SUFFIX}", f"output/a b{SUFFIX}", f"output/flexip/c{SUFFIX}"):
        put(world, name)
    for name in ("input/picture.png", "input/lora.safetensors", f"output/x{SUFFIX}.part"):
        (world / name).write_bytes(b"x")
    expected = [f"b{SUFFIX}", f"deep/er/a{SUFFIX}", f"a b{SUFFIX} [output]", f"flexip/c{SUFFIX} [output]"]
    assert reference_names() == expected
    assert FlexIPLoadReference.define_schema().inputs[0].options == expected
    assert all(load(name).count == 2 for name in expected)


def test_the_list_follows_the_folders(world):
    put(world, f"input/deep/a{SUFFIX}")
    assert reference_names() == [f"deep/a{SUFFIX}"]
    put(world, f"output/new/c{SUFFIX}")
    (world / f"input/deep/a{SUFFIX}").unlink()
    assert reference_names() == [f"new/c{SUFFIX} [output]"]


def test_folders_that_are_not_there_list_nothing(world, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(world / "later"))
    assert reference_names() == []
    put(world, f"later/a{SUFFIX}")
    assert reference_names() == [f"a{SUFFIX} [output]"]


def assert_refused(name: object, word: str) -> None:
    """Before the run (on the input, in the page) and in it."""
    assert word in FlexIPLoadReference.validate_inputs(name)
    with pytest.raises(ValueError) as error:
        FlexIPLoadReference.execute(name)
    assert word in one_sentence(error, "FlexIPLoadReference")


def test_names_that_lead_out_of_the_folders_are_refused(world):
    put(world, f"private/a{SUFFIX}")
    for name in (
        "../private/a{}",
        "x/../../private/a{}",
        "../private/a{} [output]",
        str(world / "private" / "a{}"),
        "a\0{}",
    ):
        assert_refused(name.format(SUFFIX), "outside")


def test_a_missing_file_is_refused_with_a_list_of_what_is_there(world):
    assert_refused(f"gone{SUFFIX}", "none")
    for number in range(25):
        put(world, f"input/{number:02}{SUFFIX}")
    assert_refused(f"gone{SUFFIX} [output]", f"00{SUFFIX}, 01{SUFFIX}")
    assert_refused(f"gone{SUFFIX}", "and 5 more")
    for name in ("", " [output]", 3, "."):
        assert_refused(name, "there is no file")


def test_a_damaged_file_is_named(world):
    put(world, f"input/a{SUFFIX}")
    path = world / "input" / f"a{SUFFIX}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        load(f"a{SUFFIX}")
    assert f"a{SUFFIX}" in one_sentence(error, "FlexIPLoadReference")


def test_a_replaced_file_is_read_again(world):
    put(world, f"input/a{SUFFIX}")
    path, name = world / "input" / f"a{SUFFIX}", f"a{SUFFIX}"
    before = FlexIPLoadReference.fingerprint_inputs(name)
    assert FlexIPLoadReference.fingerprint_inputs(name) == before
    os.utime(path, ns=(0, before + 1))
    assert FlexIPLoadReference.fingerprint_inputs(name) != before


def test_a_name_over_a_wire_is_checked_when_it_arrives(world):
    assert FlexIPLoadReference.validate_inputs(None) is True
    assert FlexIPLoadReference.fingerprint_inputs(None) is None
