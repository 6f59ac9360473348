"""Weights that are trained already: what of a FlexIP or IP-Adapter file a run begins with, and what it says of it."""

import ip_adapter_files
import pytest
import torch
import training_fakes as fakes

from flexip_core.files.checkpoint import save_checkpoint
from flexip_core.files.ip_adapter import BASES
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.network.config import FlexIPConfig, ResamplerConfig
from flexip_core.training.config import NetworkConfig
from flexip_core.training.loop import Trainer
from flexip_core.training.start import make_network, trained_weights


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase()


@pytest.fixture(scope="module")
def sd15():
    """SD1.5's widths, without memory: only names and shapes matter."""
    text_width, blocks = BASES["SD1.5"]
    with torch.device("meta"):
        return FlexIPNetwork(FlexIPConfig("SD1.5", text_width, blocks, resampler=ResamplerConfig(768, 4, 12, 64, 4)))


def saved(path, cfg, base):
    network = make_network(cfg, base)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    save_checkpoint(network, path)
    return network.state_dict()


def test_a_flexip_file_is_gone_on_from_and_both_weights_and_average_begin_there(base, tmp_path, caplog):
    path = tmp_path / "mine.safetensors"
    wanted = saved(path, fakes.config(tmp_path, seed=5), base)
    trainer = Trainer(fakes.config(tmp_path / "run", start_from=(str(path),), steps=1), base, fakes.pairs())
    with caplog.at_level("INFO"):
        trainer.start()
    for network in (trainer.network, trainer.average):
        torch.testing.assert_close(network.state_dict(), wanted, rtol=0, atol=0)
    blocks = sum(key.startswith("blocks.") for key in wanted)
    assert f"taken are K and V {blocks} of {blocks} tensors" in caplog.text
    trainer.run()
    trainer.save()
    path.unlink()  # the state has it all
    longer = Trainer(fakes.config(tmp_path / "run", start_from=(str(path),), steps=1), base, fakes.pairs())
    longer.start(resume=True)
    torch.testing.assert_close(longer.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)


def test_of_a_file_of_other_sizes_what_fits_is_taken_and_the_rest_begins_from_the_seed(base, tmp_path, caplog):
    path = tmp_path / "wider.safetensors"
    wider = NetworkConfig(resampler=ResamplerConfig(24, 1, 2, 8, 2), detail_tokens=3, semantic_tokens=2, cls_tokens=2)
    wanted = saved(path, fakes.config(tmp_path, network=wider), base)
    network = make_network(fakes.config(tmp_path), base)
    with caplog.at_level("INFO"):
        taken = trained_weights([str(path)], network)
    own = network.state_dict()
    assert taken and all(torch.equal(taken[key], wanted[key]) for key in taken)
    assert {key for key in taken} == {key for key in wanted if own[key].shape == wanted[key].shape}
    assert all(key in taken for key in own if key.startswith("blocks.")) and "preservation.queries" not in taken
    assert "fit nothing here; the rest begins from the seed" in caplog.text
    with pytest.raises(
        ValueError, match="K and V in wider.safetensors .* do not fit these adapters, it is for another base"
    ):
        trained_weights([str(path)], make_network(fakes.config(tmp_path), fakes.FakeBase(widths=(64, 64))))


def test_ip_adapters_give_k_and_v_and_a_plus_file_the_detail_branch(sd15, tmp_path, caplog):
    plus, plain = tmp_path / "ip-adapter-plus.pt", tmp_path / "ip-adapter.pt"
    ip_adapter_files.write_ip_adapter(plus, "plus", "SD1.5")
    ip_adapter_files.write_ip_adapter(plain, "plain", "SD1.5", seed=3)
    with caplog.at_level("INFO"):
        taken = trained_weights([str(plus), str(plain)], sd15)
    file = torch.load(plus, weights_only=True)
    other = torch.load(plain, weights_only=True)
    assert torch.equal(taken["preservation.queries"], file["image_proj.latents"].float())
    assert torch.equal(
        taken["preservation.detail.layers.2.to_q.weight"], file["image_proj.layers.2.0.to_q.weight"].float()
    )
    assert not any("context_in" in key for key in taken), "that read CLIP's tokens"
    for number, address in enumerate(BASES["SD1.5"][1]):
        for part in "kv":
            key = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            assert torch.equal(taken[f"blocks.{address}.preservation.to_{part}.weight"], file[key].float())
            assert torch.equal(taken[f"blocks.{address}.personalization.to_{part}.weight"], other[key].float())
    assert {key: value.shape for key, value in taken.items()}.items() <= {
        k: v.shape for k, v in sd15.state_dict().items()
    }.items()
    assert "K and V 32 of 64 tensors, detail" in caplog.text and "personalization 0 of" in caplog.text


def test_files_that_do_not_go_together_are_a_sentence(base, tmp_path):
    path = tmp_path / "mine.safetensors"
    saved(path, fakes.config(tmp_path), base)
    network = make_network(fakes.config(tmp_path), base)
    with pytest.raises(
        ValueError, match="mine.safetensors .* is a FlexIP file, which holds both adapters; give it alone"
    ):
        trained_weights([str(path), str(path)], network)
    with pytest.raises(ValueError, match="start_from names 3 files"):
        trained_weights(["a", "b", "c"], network)
