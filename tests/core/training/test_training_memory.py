"""Recomputing changes no gradient and keeps less; the counted memory is what autograd keeps."""

import dataclasses

import pytest
import torch
import torch.nn as nn
import training_fakes as fakes
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexip_core.integrations.diffusers import branches
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.training import memory
from flexip_core.training.__main__ import main
from flexip_core.training.config import GateConfig, TrainConfig
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.loop import Trainer
from flexip_core.training.memory import (
    MB,
    UNETS,
    Kept,
    Stage,
    count,
    counting,
    encoders,
    fill,
    full_size,
    report,
)
from flexip_core.training.recompute import BLOCKS, set_recompute

CFG = TrainConfig(steps=1, batch=8, seed=0, folder="nowhere")


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase(widths=(32, 64))


@pytest.fixture
def trainer_for(base, tmp_path):
    def make(mode="outputs", folder=tmp_path, **changes):
        return Trainer(fakes.with_network(fakes.config(folder, **changes), gate_mode=mode), base, fakes.pairs())

    return make


# --- recompute


def gradients(trainer):
    batch = trainer.source.batch(torch.tensor([INVARIANT, VARIANT] * 2), fakes.generator(0))
    losses, _ = trainer.losses(batch, (0.2, 0.9, 0.5, 0.6))
    losses.mean().backward()
    return {key: p.grad.clone() for key, p in trainer.parameters.items()}


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_gives_the_same_gradients_bit_for_bit(trainer_for, mode, precision):
    expected = gradients(trainer_for(mode, precision=precision))
    got = gradients(trainer_for(mode, precision=precision, recompute=True))
    assert any(value.any() for value in expected.values())
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


def test_the_frozen_unet_computes_twice_in_eval_mode_and_once_without_gradient(trainer_for, base):
    calls = []
    block = base.unet.mid_block.attentions[0].transformer_blocks[0].ff
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        for recompute, expected in ((True, 2), (False, 1)):
            trainer = trainer_for(recompute=recompute)
            assert not base.unet.training
            calls.clear()
            trainer.step()
            assert len(calls) == expected
        trainer = trainer_for(recompute=True)
        calls.clear()
        with torch.no_grad():
            batch = trainer.source.batch(torch.tensor([INVARIANT] * 2), fakes.generator(0))
            trainer.losses(batch, (0.5, 0.5))
        assert len(calls) == 1
    finally:
        hook.remove()


def test_a_later_trainer_without_recompute_finds_the_unet_as_it_was(trainer_for, base):
    trainer_for(recompute=True)
    held = [block for block in base.unet.modules() if type(block).__name__ in BLOCKS]
    assert held and all("forward" in vars(block) for block in held)
    trainer_for()
    assert not any("forward" in vars(block) for block in held)


def kept_by_a_step(trainer):
    kept = Kept([*trainer.base.unet.parameters(), *trainer.network.parameters()])
    batch = trainer.source.batch(torch.tensor([INVARIANT, VARIANT] * 4), fakes.generator(0))
    with counting(kept):
        trainer.losses(batch, (0.5,) * 8)
    return kept.bytes


def test_a_recomputing_step_keeps_a_fraction(trainer_for):
    full = kept_by_a_step(trainer_for())
    assert kept_by_a_step(trainer_for(recompute=True)) < 0.3 * full


def test_a_resumed_run_may_recompute_and_takes_the_same_steps(trainer_for, tmp_path):
    whole = trainer_for(folder=str(tmp_path / "whole"))
    whole.run()
    first = trainer_for(folder=str(tmp_path / "parts"))
    first.run(should_stop=lambda: first.progress.step == 3)
    onward = trainer_for(folder=str(tmp_path / "parts"), recompute=True)
    onward.run(resume=True)
    torch.testing.assert_close(onward.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)


def test_recompute_is_true_or_false():
    with pytest.raises(ValueError, match="recompute must be true or false, got 'yes'"):
        TrainConfig.from_dict({**CFG.to_dict(), "recompute": "yes"})


# --- counting


def test_what_is_kept_is_counted_once_and_whole_and_without_the_weights():
    frozen, x = nn.Linear(10, 10).requires_grad_(False), torch.ones(5, 10, requires_grad=True)
    for kept, expected in ((Kept(frozen.parameters()), 0), (Kept(), 400)):
        with counting(kept):
            frozen(x)  # keeps its weight alone
        assert kept.bytes == expected
    kept = Kept()
    with counting(kept):
        out = x.exp()  # keeps its result (200 bytes)
        (out[:2] * out[2:4]).sum()  # keeps two views of the same
    assert kept.bytes == 200
    with counting(kept):
        for _ in range(3):
            x.exp()  # each lets go of its memory at once, were it not held
    assert kept.bytes == 800


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_are_counted_like_real_ones(base, tmp_path, recompute, precision):
    cfg = fakes.config(tmp_path, recompute=recompute, precision=precision)
    network = Trainer(cfg, base, fakes.pairs()).network
    with torch.device("meta"):
        fakes_of = UNet2DConditionModel(**base.unet.config).eval().requires_grad_(False), FlexIPNetwork(network.cfg)
    mode = FakeTensorMode()
    for module in fakes_of:
        fill(module, torch.float32, mode)
    set_recompute(fakes_of[0], recompute)
    real, fake = Stage(cfg, base.unet, network, 128, 16), Stage(cfg, *fakes_of, 128, 16)
    with mode:
        counted = fake.kept(1), fake.kept(2), fake.largest_block()
    assert counted == (real.kept(1), real.kept(2), real.largest_block())
    assert counted[1] > counted[0] > 0


def test_the_fixed_costs_are_those_of_the_trained_weights():
    cfg = dataclasses.replace(CFG, train_adapters=("preservation",), gates=GateConfig((1, 1), (1, 1)))
    found = count(cfg, UNETS["SD1.5"], 64, ranks=2)
    assert 0 < found.gradients < found.adapters == found.average and found.moments == 2 * found.gradients
    assert found.rows == 4 and found.block == found.copies == 0
    fixed = found.unet + found.adapters + found.gradients + found.moments + found.average
    assert found.total == fixed + 4 * found.row


def test_the_rows_of_bf16_take_between_half_and_all_of_fp32(base, tmp_path):
    """Norms compute in fp32 under CUDA's autocast, so it is not half."""
    full, half = (count(dataclasses.replace(CFG, precision=p), UNETS["SD1.5"], 128) for p in ("fp32", "bf16"))
    assert 0.5 * full.row < half.row < 0.75 * full.row and half.unet * 2 == full.unet
    assert full.copies == 0 < half.copies < 0.6 * half.adapters  # one bf16 copy of what autocast needs


def test_sd15_at_512_px_against_the_table_of_the_study():
    """The study counted 3856 MB per row and 169 MB with recompute, on the meta device, without resamplers.

    There attention keeps its matrix of n x n numbers per head, which no kernel that GPUs and CPUs use for it does: that is 2.3 GB.
    """
    stage, mode = full_size(CFG, UNETS["SD1.5"], 512)
    assert sum(p.numel() for p in stage.unet.parameters()) == 859_520_964
    projections = sum(p.numel() for key, p in stage.network.named_parameters() if key.startswith("blocks."))
    assert projections == pytest.approx(38.34e6, rel=0.001)
    with mode:
        adapters = Kept(stage.network.parameters())
        with counting(adapters):
            cls, patches, text = torch.randn(1, 1024), torch.randn(1, 256, 1024), torch.randn(1, 77, 768)
            branches(stage.network, {"cls": cls, "patches": patches}, text, (0.5,))
        with sdpa_kernel(SDPBackend.MATH):
            with_matrices = stage.kept(1)
        fused = stage.kept(1)
        set_recompute(stage.unet, True)
        again = stage.kept(1)
        set_recompute(stage.unet, False)
        stage.unet.enable_gradient_checkpointing()
        diffusers_own = stage.kept(1)
    assert (with_matrices - adapters.bytes) / MB == pytest.approx(3856, rel=0.02)
    assert (again - adapters.bytes) / MB == pytest.approx(169, rel=0.01)
    assert (with_matrices - fused) / MB == pytest.approx(2337, rel=0.01)
    assert again < 0.7 * diffusers_own


def test_sdxl_at_1024_px_is_counted_from_its_config():
    stage, mode = full_size(CFG, UNETS["SDXL"], 1024)
    assert sum(p.numel() for p in stage.unet.parameters()) == 2_567_463_684
    with mode:
        full = stage.kept(1)
        set_recompute(stage.unet, True)
        again = stage.kept(1)
    assert full / MB == pytest.approx(11_214, rel=0.02) and again / MB == pytest.approx(585, rel=0.02)


def test_the_tables_are_what_a_checkpoint_of_that_name_holds():
    """Parameters as published: CLIP-L's text encoder 123M, bigG's 695M, the VAE 84M, ViT-H 632M, DINOv2-L 304M."""
    for kind, texts in (("SD1.5", 123e6), ("SDXL", 123e6 + 694e6)):
        sizes = {name: size / 4 for name, size in encoders(kind).items()}
        assert sizes["text encoder"] == pytest.approx(texts, rel=0.01)
        assert sizes["VAE"] == pytest.approx(83.65e6, rel=0.01)
        assert sizes["CLIP image tower"] == pytest.approx(632e6, rel=0.01)
        assert sizes["DINO"] == pytest.approx(304e6, rel=0.01)


# --- the report


def test_the_report_adds_up_and_names_the_other_choice():
    cfg = dataclasses.replace(CFG, recompute=True)
    text = report(cfg, "SD1.5", 128, ranks=2)
    assert text.startswith("SD1.5 at 128 px, 4 rows per GPU, fp32, recompute true\n")
    rows = dict(line.rsplit("  ", 1) for line in text.splitlines() if line.endswith(" MB"))
    numbers = {name.strip(): float(value.strip(" MB").replace(",", "")) for name, value in rows.items()}
    assert numbers["UNet, frozen"] == 3438
    assert numbers.pop("sum") == pytest.approx(sum(numbers.values()), abs=5)
    assert "With recompute false the sum is " in text and "Without a cache the encoders come on top: " in text


def test_the_command_needs_no_config_where_only_sizes_matter(monkeypatch, caplog):
    """What it counts then is what the node Train FlexIP begins with."""
    told = []
    monkeypatch.setattr(memory, "report", lambda *arguments: told.append(arguments) or "a table")
    with caplog.at_level("INFO"):
        assert main(["memory", "--base", "SDXL", "--size", "1024"]) == 0
    ((cfg, *others),) = told
    assert (cfg.batch, cfg.precision, cfg.recompute) == (4, "bf16", True) and others == ["SDXL", 1024, 1]
    assert "a table" in caplog.text


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="The base must be one of SD1.5, SDXL, got 'Flux'"):
        report(CFG, "Flux", 512)
    with pytest.raises(ValueError, match="a multiple of 64 pixels, got 500"):
        report(CFG, "SD1.5", 500)
    with pytest.raises(ValueError, match="batch = 8 rows cannot be shared evenly by 3 ranks"):
        report(CFG, "SD1.5", 512, ranks=3)
