"""The checkpoint format: a round trip, and a sentence for each way a file can be wrong."""

import json

import pytest
import torch
from networks import config
from safetensors.torch import load_file, save_file

from flexip_core.files.checkpoint import CONFIG_KEY, FORMAT_KEY, load_checkpoint, save_checkpoint
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.network.config import FlexIPConfig


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = FlexIPNetwork(config(gate_mode="tokens"))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))  # a round trip that silently loads nothing must fail
    return network


@pytest.fixture
def path(network, tmp_path):
    save_checkpoint(network, tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


def rewrite(path, tensors=lambda t: t, metadata=lambda m: m):
    """Change a good file's tensors or metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = dict(f.metadata())
    save_file(tensors(load_file(path)), path, metadata=metadata(meta))


def test_round_trip_brings_back_every_tensor_and_the_config(network, path):
    loaded = load_checkpoint(path)
    assert loaded.cfg == network.cfg
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_round_trip_in_half_precision(network, tmp_path):
    save_checkpoint(network, tmp_path / "half.safetensors", dtype=torch.float16)
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


def test_keys_are_grouped_by_adapter_and_comfyui_block_address(path):
    keys = load_file(path).keys()
    assert {key.split(".")[0] for key in keys} == {"preservation", "personalization", "blocks"}
    assert {"blocks.input.1.0.preservation.to_k.weight", "blocks.middle.0.0.personalization.to_v.weight"} <= keys


def test_a_failed_save_leaves_the_old_file_and_no_part_of_the_new(network, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(
        "flexip_core.files.weights.os.replace", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError):
        save_checkpoint(network, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def without(key):
    return lambda t: {k: v for k, v in t.items() if k != key}


def changed_config(**changes):
    return lambda m: {**m, CONFIG_KEY: json.dumps({**json.loads(m[CONFIG_KEY]), **changes})}


KEY = "blocks.input.1.0.preservation.to_k.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(metadata=lambda m: {}), ["not a FlexIP checkpoint"]),
        (dict(metadata=lambda m: {**m, FORMAT_KEY: "2"}), ["format '2'", "reads format '1'"]),
        (dict(metadata=lambda m: {FORMAT_KEY: "1"}), ["damaged", "must be a table"]),
        (dict(metadata=lambda m: {**m, CONFIG_KEY: "{"}), ["damaged"]),
        (dict(metadata=changed_config(surprise=1)), ["unknown setting flexip.config.surprise"]),
        (dict(metadata=changed_config(text_width="768")), ["text_width", "'768'"]),
        (dict(metadata=changed_config(gate_mode="other")), ["gate_mode", "'other'"]),
        (dict(metadata=changed_config(blocks={})), ["blocks is empty"]),
        (dict(metadata=changed_config(detail_tokens=0)), ["detail_tokens", "at least 1"]),
        (dict(metadata=changed_config(clip={"model": "c", "width": -1})), ["clip.width"]),
        (dict(tensors=without(KEY)), ["1 missing", KEY]),
        (dict(tensors=lambda t: {**t, "extra.weight": torch.zeros(1)}), ["1 unknown", "extra.weight"]),
        (dict(tensors=lambda t: {**t, KEY: torch.zeros(16, 21)}), [KEY, "[16, 21]", "[16, 20]"]),
    ],
)
def test_each_way_to_be_wrong_is_one_sentence_with_the_files_name(path, change, words):
    rewrite(path, **change)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    for word in ["adapters.safetensors", *words]:
        assert word in str(error.value)


def test_config_survives_json():
    cfg = config(gate_mode="tokens")
    assert FlexIPConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("missing", ["base", "text_width", "blocks"])
def test_a_config_without_a_required_field_names_it(missing):
    data = config().to_dict()
    del data[missing]
    with pytest.raises(ValueError, match=missing):
        FlexIPConfig.from_dict(data)
