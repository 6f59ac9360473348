"""The mini checkpoints in ComfyUI's stock loader: family, block addresses, no missing weights, a real picture."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.supported_models
import pytest
import torch
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.flexip_core.untrained import mini_checkpoints

FAMILIES = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}


def load(path: Path, layout: str) -> tuple:
    mini_checkpoints.make_base(path, layout)
    return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


LAYOUTS = [
    pytest.param(name, marks=pytest.mark.long) if name == "sdxl_full" else name for name in mini_checkpoints.LAYOUTS
]  # 10 GB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_addresses_are_those_of_the_loaded_unet(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model, _, _ = load(tmp_path / "base.ckpt", layout)
    assert not [record.getMessage() for record in caplog.records if "missing" in record.getMessage()]
    assert isinstance(model.model.model_config, FAMILIES[layout.split("_")[0]])
    widths, text_width = block_widths(model.model.diffusion_model)
    assert widths == mini_checkpoints.block_widths(layout)
    assert text_width == mini_checkpoints.LAYOUTS[layout].family.text_width


def test_prompt_and_seed_change_the_picture(tmp_path: Path) -> None:
    model, clip, vae = load(tmp_path / "base.ckpt", "sd15_min")
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a bird", "a house by the sea", "")]

    def picture(positive: int, seed: int) -> torch.Tensor:
        latent = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        samples = comfy.sample.sample(
            model, noise, 4, 5.0, "euler", "normal", texts[positive], texts[2], latent, seed=seed
        )
        return vae.decode(samples)

    first = picture(0, 1)
    assert first.shape == (1, 64, 64, 3) and first.isfinite().all() and first.std() > 0.05
    assert torch.equal(first, picture(0, 1))
    assert (first - picture(1, 1)).abs().mean() > 0.005
    assert (first - picture(0, 2)).abs().mean() > 0.02
