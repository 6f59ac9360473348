"""FlexIPStart: which files a preset means, the graph that it stands for, and what is missing in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import flexip_pack
import pytest
import test_load_and_encode as nodes_test
import tiny
import torch
from flexip_pack.flexip_core.files.checkpoint import save_checkpoint
from flexip_pack.flexip_core.files.ip_adapter import BASES
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.nodes import found, start
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.found import Found
from flexip_pack.nodes.load import LoadedAdapters, LoadFlexIPAdapters
from flexip_pack.nodes.start import FlexIPStart

models = nodes_test.models  # the fixture: empty model folders of our own
FILES = {"face-plus": "plus", "any name": "plus", "composition": "plus", "for bigG": "plain", "other": "plain"}
CLIPS = {"for bigG": "bigG"}  # the encoder that a file reads; that of the first file is preferred for the second


def stub(base, monkeypatch):
    """A model of which only the blocks are looked at."""
    text, blocks = BASES[base]
    monkeypatch.setattr(found, "block_widths", lambda _: (blocks, text))
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=None))


@pytest.fixture
def folder(monkeypatch):
    """Files as fitting() finds them; those of two bases are never found together."""
    names = lambda model: [Found(f"{name}.safetensors", family, CLIPS.get(name, "H")) for name, family in FILES.items()]
    monkeypatch.setattr(found, "fitting", lambda model, node: names(model))


def graph_of(model, preset, **values):
    out = FlexIPStart.execute(model, ["4", 0], preset, 0.3, 1.0, **values)
    return {node["class_type"]: node["inputs"] for node in out.expand.values()}


@pytest.mark.parametrize(
    "preset, base, first, second, blocks",
    [
        ("subject", "SDXL", "any name", "other", ("all", "style only")),
        ("subject", "SD1.5", "any name", None, None),
        ("portrait", "SDXL", "face-plus", None, None),
        ("portrait", "SD1.5", "face-plus", None, None),
        ("whole look", "SD1.5", "any name", "other", None),
        ("style only", "SDXL", "for bigG", None, ("style only", "all")),
        ("layout", "SD1.5", "for bigG", None, ("composition only", "all")),
    ],
)
def test_a_preset_stands_for_the_graph_on_its_help_page(folder, monkeypatch, preset, base, first, second, blocks):
    graph = graph_of(stub(base, monkeypatch), preset, crop="pad")
    loader, encoder, apply = (graph[kind] for kind in ("LoadFlexIPAdapters", "EncodeReference", "ApplyFlexIPGate"))
    assert loader["preservation"] == f"{first}.safetensors"
    assert loader["personalization"] == (f"{second}.safetensors" if second else "auto")
    assert encoder["image"] == ["4", 0] and encoder["crop"] == "pad" and apply["gate"] == 0.3
    used = graph.get("FlexIPBlocks")
    assert (used and (used["preservation"], used["personalization"])) == blocks and ("blocks" in apply) == bool(blocks)


def test_pinned_files_are_taken_as_they_are(folder, monkeypatch):
    pinned = {"preservation": "composition.safetensors", "personalization": "face-plus.safetensors"}
    loader = graph_of(stub("SDXL", monkeypatch), "subject", **pinned)["LoadFlexIPAdapters"]
    assert {name: loader[name] for name in pinned} == pinned


@pytest.mark.parametrize(
    "preset, base, name, below",
    [
        ("subject", "SD1.5", "ip-adapter-plus_sd15.safetensors", "models"),
        ("portrait", "SDXL", "ip-adapter-plus-face_sdxl_vit-h.safetensors", "sdxl_models"),
        ("style only", "SDXL", "ip-adapter_sdxl_vit-h.safetensors", "sdxl_models"),
    ],
)
def test_a_missing_file_is_named_with_its_source_and_folder(models, monkeypatch, preset, base, name, below):
    with pytest.raises(ValueError) as error:
        graph_of(stub(base, monkeypatch), preset)
    assert f"{name} is missing" in str(error.value) and f"h94/IP-Adapter ({below})" in str(error.value)
    assert str(models / "ipadapter") in str(error.value)


def test_a_model_that_no_public_file_is_for_is_told_so(models):
    with pytest.raises(ValueError, match="SD1.5 and SDXL.*neither.*FlexIP file"):
        graph_of(tiny.tiny_model(), "subject")
    with pytest.raises(ValueError, match="no FlexIP file in .* is made for this model"):
        graph_of(tiny.tiny_model(), "FlexIP file")


def test_the_first_file_that_fits_the_model_is_found_by_its_header(models):
    model = tiny.tiny_model()
    network = tiny.tiny_network(model)
    other = FlexIPNetwork(dataclasses.replace(network.cfg, text_width=network.cfg.text_width * 2))
    for name, one in (("a.safetensors", other), ("b.safetensors", network), ("c.safetensors", network)):
        save_checkpoint(one, models / "flexip" / name)
    (models / "ipadapter" / "0.safetensors").write_bytes(b"<html>")
    assert [file.name for file in found.fitting(model, "node")] == ["b.safetensors", "c.safetensors"]
    assert LoadFlexIPAdapters.execute("auto", "auto", "auto", "auto", model).args[0].files == ("b.safetensors",)
    assert graph_of(model, "FlexIP file")["LoadFlexIPAdapters"]["preservation"] == "b.safetensors"
    with pytest.raises(ValueError, match="LoadFlexIPAdapters: preservation is auto.*Wire the model in"):
        LoadFlexIPAdapters.execute("auto", "auto", "auto", "auto")
    state = FlexIPStart.fingerprint_inputs()
    save_checkpoint(network, models / "flexip" / "d.safetensors")
    assert FlexIPStart.fingerprint_inputs() != state


def test_a_reference_brings_its_adapters_to_apply():
    model = tiny.tiny_model()
    network = tiny.tiny_network(model)
    reference = tiny.tiny_reference()
    link = tiny.link_for(network, reference)
    adapters = LoadedAdapters("tiny", network, link.patcher, {})
    bare = dataclasses.replace(reference, needs=network.needs())
    carrying = dataclasses.replace(bare, adapters=adapters)
    P, N = tiny.cond(1), tiny.cond(2)
    wired = ApplyFlexIPGate.execute(model, adapters, bare, 0.3, 1.0, 0.0, 1.0).args[0]
    carried = ApplyFlexIPGate.execute(model, None, carrying, 0.3, 1.0, 0.0, 1.0).args[0]
    assert torch.equal(tiny.ksample(wired, P, N), tiny.ksample(carried, P, N))
    with pytest.raises(ValueError, match="was loaded from a file, without its adapters. Wire Load FlexIP Adapters"):
        ApplyFlexIPGate.execute(model, None, bare, 0.3, 1.0, 0.0, 1.0)


def test_every_preset_is_on_the_help_page():
    page = (Path(flexip_pack.__file__).parent / "web" / "docs" / "FlexIPStart.md").read_text(encoding="utf-8")
    for preset in (*start.PRESETS, start.FLEXIP_FILE):
        assert f"| {preset}" in page
