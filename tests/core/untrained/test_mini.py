"""The mini models: small, the same every time, whole or not there, in the shapes that their configs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from flexip_core.files import weights
from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.untrained import mini, mini_checkpoints


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    mini.make_mini_models(folder)
    return folder


def files(models: Path) -> dict[str, Path]:
    return {path.name: path for path in models.rglob("*") if path.is_file()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)["state_dict"]
    return safetensors.torch.load_file(path)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_files_and_nothing_else_in_a_few_megabytes(models: Path) -> None:
    assert set(files(models)) == {mini.MINI_BASE, mini.MINI_FLEXIP, mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE}
    sizes = {name: path.stat().st_size for name, path in files(models).items()}
    vocabulary = 49408 * 64 * 2  # of CLIP's text tower, in half precision
    assert sum(sizes.values()) - vocabulary < 16e6 and sizes[mini.MINI_CLIP_FILE] - vocabulary < 1e6


def test_made_again_they_are_the_same_and_another_seed_gives_others(models: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    mini.make_mini_models(tmp_path / "again")
    mini.make_mini_models(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not ours"
    for name, path in files(models).items():
        assert equal(tensors(path), tensors(files(tmp_path / "again")[name])), name
        assert not equal(tensors(path), tensors(files(tmp_path / "other")[name])), name


def test_the_adapters_load_with_the_mini_config(models: Path) -> None:
    assert load_checkpoint(models / "flexip" / mini.MINI_FLEXIP).cfg == mini.MINI_CONFIG


def test_the_clip_has_open_clips_keys_and_the_configs_width(models: Path) -> None:
    projection = tensors(models / "clip_vision" / mini.MINI_CLIP_FILE)["visual.proj"]
    assert projection.shape == (mini.MINI_CLIP.vision_cfg["width"], mini.MINI_CLIP.width)


def test_the_dino_is_what_timm_makes_from_the_config(models: Path) -> None:
    import timm

    cfg = mini.MINI_DINO
    tower = timm.create_model(cfg.model, img_size=cfg.image_size, num_classes=0, **cfg.args)
    tower.load_state_dict(tensors(models / "clip_vision" / mini.MINI_DINO_FILE))
    assert tower.forward_features(torch.zeros(1, 3, cfg.image_size, cfg.image_size)).shape == (1, 257, cfg.width)


@pytest.mark.parametrize(
    "layout, blocks", [("sd15_min", 4), ("sd15_narrow", 16), ("sd15_full", 16), ("sdxl_min", 26), ("sdxl_narrow", 70)]
)
def test_block_addresses_name_the_cross_attentions_in_the_file(tmp_path: Path, layout: str, blocks: int) -> None:
    mini_checkpoints.make_base(tmp_path / "base.ckpt", layout)
    assert (tmp_path / "base.ckpt").stat().st_size < 5e6
    found = {}
    for name, value in tensors(tmp_path / "base.ckpt").items():
        if name.endswith("attn2.to_k.weight"):
            parts = name.removeprefix("model.diffusion_model.").split(".")
            index = parts[parts.index("transformer_blocks") + 1]
            kind = parts[0].split("_")[0]
            found[f"{kind}.{0 if kind == 'middle' else parts[1]}.{index}"] = value.shape[0]
    assert mini_checkpoints.block_widths(layout) == found and len(found) == blocks


def test_rows_of_a_weight_differ_though_they_share_memory(tmp_path: Path) -> None:
    mini_checkpoints.make_base(tmp_path / "base.ckpt")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    embedding = tensors(tmp_path / "base.ckpt")[name]
    assert embedding.shape == (49408, 768) and len(torch.unique(embedding[:2000], dim=0)) == 2000
    assert abs(float(embedding[::97].float().std()) / 0.02 - 1) < 0.15


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout is one of sd15_min"):
        mini_checkpoints.make_base(tmp_path / "base.ckpt", "sd3")
    with pytest.raises(ValueError, match="is a .ckpt file"):
        mini_checkpoints.make_base(tmp_path / "base.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_atomically(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(weights.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
