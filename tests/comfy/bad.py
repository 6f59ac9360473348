"""Nodes of the pack on a tiny model and mini files in folders of their own, for tests of what should not go into them."""

from __future__ import annotations

import math

import folder_paths
import pytest
import tiny
import torch
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes import files, runtime
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.auto_gate import FlexIPAutoGate
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.load import LoadFlexIPAdapters
from flexip_pack.nodes.maps import FlexIPAttentionMaps
from flexip_pack.nodes.sampler import FlexIPSampler
from test_reference_nodes import adapters as tiny_adapters
from test_reference_nodes import reference as reference_for_tiny

NAN, INF = math.nan, math.inf
P, N = tiny.cond(1), tiny.cond(2)


class Vae:
    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).sigmoid()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    mini.make_mini_encoders(root / files.ENCODER_FOLDER)
    mini.make_mini_flexip(root / "flexip" / mini.MINI_FLEXIP)
    (root / "ipadapter").mkdir()
    return root


@pytest.fixture(autouse=True)
def own_folders(folders, monkeypatch):
    table = dict(folder_paths.folder_names_and_paths)
    for name in (*files.ADAPTER_FOLDERS, files.ENCODER_FOLDER):
        table[name] = ([str(folders / name)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(folders / "temp"))


@pytest.fixture
def adapters(own_folders):
    return LoadFlexIPAdapters.execute(mini.MINI_FLEXIP, "auto", "auto", "auto").args[0]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def gated(model):
    return runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), 0.6))


def refused(node: str, function, *args, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    text = str(error.value)
    assert type(error.value) is ValueError and text.startswith(f"{node}: ") and text.count(node) == 1, text
    assert text.endswith(".") and text.isprintable() and len(text) < 600 and "torch" not in text, text
    return text


def picture(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape or (1, 40, 60, 3), generator=tiny.generator(0)).to(dtype)


def spoiled(value: float, *shape: int) -> torch.Tensor:
    found = picture(*shape)
    found.view(-1)[-1] = value
    return found


def encode(adapters, image, crop="center", mask=None):
    return EncodeReference.execute(
        [adapters], image if isinstance(image, list) else [image], [crop], mask and [mask[0]]
    ).args[0]


def finite(reference) -> bool:
    return all(value.isfinite().all() for value in (*reference.features.values(), *reference.null.values()))


def apply(model, **changes):
    values = {"gate": 0.6, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **changes}
    return ApplyFlexIPGate.execute(model, tiny_adapters(model), reference_for_tiny(), **values)


def sample(model, **changes):
    values = dict(
        seed=0,
        steps=1,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        positive=P,
        negative=N,
        denoise=1.0,
        gates="",
    )
    values["latent_image"] = {"samples": torch.zeros(1, 4, 8, 8)}
    return FlexIPSampler.execute(model, **{**values, **changes})


def look(model, **changes):
    values = {"positive": P, "latent": {"samples": tiny.noise_for()}, "show": "adapters", "vae": Vae(), "steps": 1}
    return FlexIPAttentionMaps.execute(model, **{**values, **changes})


def find_gate(model, **changes):
    values = dict(positive=P, negative=N, latent_image={"samples": torch.zeros(1, 4, 8, 8)}, vae=Vae(), reference_image=picture(),
                  target=0.5, target_is="score", seed=0, steps=1, noises=1, cfg=5.0, sampler_name="euler", scheduler="normal",
                  clip_vision="auto", dino="auto")  # fmt: skip
    return FlexIPAutoGate.execute(model, **{**values, **changes})
