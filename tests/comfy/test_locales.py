"""The page's texts in English are the schemas', and in Chinese none is missing."""

import copy
import importlib.util

import flexip_pack
import pytest
from conftest import REPO
from flexip_pack.nodes import compat

# not on the path: scripts/server.py would hide ComfyUI's server
spec = importlib.util.spec_from_file_location("flexip_locales", REPO / "scripts" / "locales.py")
locales = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locales)

LANGUAGES = ("en", "zh")
ADVICE = "run scripts/locales.py"


@pytest.fixture(scope="module")
def english():
    if compat.CurveInput is None:
        pytest.skip("the files are written with a ComfyUI that has curves")
    return locales.english(locales.node_classes(flexip_pack))


@pytest.fixture
def chinese():
    return locales.read(locales.LOCALES / "zh" / locales.NODES)


def test_english_is_what_the_schemas_say(english):
    assert locales.read(locales.LOCALES / "en" / locales.NODES) == english, ADVICE


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there_and_nothing_else(language, english):
    texts = locales.read(locales.LOCALES / language / locales.NODES)
    assert not locales.faults(language, texts, english), ADVICE


@pytest.mark.parametrize("language", LANGUAGES)
def test_files_are_as_the_script_writes_them(language, english):
    path = locales.LOCALES / language / locales.NODES
    texts = locales.with_repeated_sockets(locales.read(path), english)
    assert path.read_text(encoding="utf-8") == locales.as_text(texts), ADVICE
    parts = {part for node in locales.node_classes(flexip_pack) for part in node.define_schema().category.split("/")}
    assert locales.read(path.with_name("main.json"))["nodeCategories"].keys() == parts


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda zh: zh.pop("EncodeReference"), "EncodeReference.display_name is missing: Encode Reference"),
        (lambda zh: zh["FlexIPSampler"]["inputs"].pop("gates"), "FlexIPSampler.inputs.gates.tooltip is missing"),
        (lambda zh: zh["FlexIPSampler"]["outputs"]["2"].pop("name"), "FlexIPSampler.outputs.2.name is missing"),
        (lambda zh: zh["FlexIPSampler"]["inputs"].update(old={"name": "旧"}), "inputs.old.name belongs to nothing"),
        (lambda zh: zh.update(FlexIPGone={"display_name": "无"}), "FlexIPGone.display_name belongs to nothing"),
        (lambda zh: zh["FlexIPSampler"].update(description=" "), "FlexIPSampler.description is empty"),
        (lambda zh: zh["FlexIPSampler"].update(description="A sampler"), "is not Chinese: A sampler"),
        (lambda zh: zh["FlexIPSampler"].update(description="采样器 {x}"), "the page does not show"),
    ],
)
def test_a_fault_is_named(change, fault, chinese, english):
    change(chinese)
    assert any(fault in line for line in locales.faults("zh", chinese, english))


def test_repeated_sockets_get_the_text_of_the_first(chinese, english):
    sockets = [key for key in english["FlexIPCombineReferences"]["inputs"] if key.startswith("references_reference_")]
    assert len(sockets) == 50
    short = copy.deepcopy(chinese)
    short["FlexIPCombineReferences"]["inputs"]["references_reference_0"]["tooltip"] = "新"
    for key in sockets[1:]:
        del short["FlexIPCombineReferences"]["inputs"][key]
    inputs = locales.with_repeated_sockets(short, english)["FlexIPCombineReferences"]["inputs"]
    assert {inputs[key]["tooltip"] for key in sockets} == {"新"}
    assert list(inputs) == list(english["FlexIPCombineReferences"]["inputs"])


def test_changed_english_texts_are_named(english):
    new = copy.deepcopy(english)
    new["FlexIPSampler"]["inputs"]["gates"]["tooltip"] = "New."
    new["FlexIPNew"] = {"display_name": "New"}
    old = english["FlexIPSampler"]["inputs"]["gates"]["tooltip"]
    assert locales.changes(english, new) == [("FlexIPSampler.inputs.gates.tooltip", old, "New.")]


def test_a_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match="b comes twice"):
        locales.read(tmp_path / "x.json")
