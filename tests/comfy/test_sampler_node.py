"""FlexIPSampler: equal to KSampler with one gate, and a fair sweep with many."""

from pathlib import Path

import folder_paths
import numpy as np
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
from flexip_pack.flexip_core.network.attention import Branch
from flexip_pack.nodes import runtime
from flexip_pack.nodes.conditioning import FlexIPConditioning
from flexip_pack.nodes.sampler import FlexIPSampler, noise_sampler
from PIL import Image

import nodes

P, N = tiny.cond(1), tiny.cond(2)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def gated(model):
    return runtime.attach(model, tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), 0.6))


class FakeVae:
    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2).sigmoid()


def latent(batch=1, **extra):
    return {"samples": torch.zeros(batch, 4, 8, 8), **extra}


def run(model, gates="", sampler="euler", latent_image=None, steps=3, denoise=1.0, vae=None, seed=11, positive=P):
    return FlexIPSampler.execute(
        model, seed, steps, 5.0, sampler, "normal", positive, N, latent_image or latent(), denoise, gates, vae
    ).args


def ksampler(model, sampler="euler", latent_image=None, steps=3, denoise=1.0, seed=11):
    return nodes.common_ksampler(
        model, seed, steps, 5.0, sampler, "normal", P, N, latent_image or latent(), denoise=denoise
    )[0]["samples"]


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde", "lcm", "ddim", "uni_pc"])
def test_without_gates_it_is_ksampler(gated, sampler):
    assert torch.equal(
        run(gated, sampler=sampler, latent_image=latent(2))[0]["samples"], ksampler(gated, sampler, latent(2))
    )


@pytest.mark.parametrize(
    "sampler",
    ["euler", "euler_ancestral", "dpmpp_2m_sde", "lcm", "ddim", "dpmpp_sde", "ddpm", "er_sde", "seeds_2", "sa_solver"],
)
def test_equal_gates_give_equal_images_and_the_image_of_a_single_run(gated, sampler):
    images = run(gated, "0.6, 0.6, 0.6", sampler)[0]["samples"]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert tiny.relative_error(images[:1], ksampler(gated, sampler)) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
@pytest.mark.parametrize(
    "size", [(8, 8), (5, 7)], ids=str
)  # torch draws a batch at once otherwise than one by one at odd sizes
def test_sweep_is_gate_major_over_the_latent_batch(model, gated, sampler, size):
    two = {"samples": torch.zeros(2, 4, *size)}
    swept = run(gated, "0, 1", sampler, two)[0]["samples"]
    assert len(swept) == 4
    link = runtime.links_of(gated)[0]
    for first, gate in ((0, 0.0), (2, 1.0)):
        alone = runtime.attach(model, tiny.link_for(link.network, link.reference, gate))
        assert tiny.relative_error(swept[first : first + 2], ksampler(alone, sampler, two)) < 1e-5
    assert tiny.relative_error(swept[:2], swept[2:]) > 1e-3


def test_sweep_keeps_noise_mask_batch_index_and_denoise(gated):
    g = tiny.generator(4)
    image = {
        "samples": torch.randn(2, 4, 8, 8, generator=g),
        "noise_mask": (torch.rand(2, 1, 64, 64, generator=g) > 0.5).float(),
        "batch_index": [3, 5],
    }
    swept = run(gated, "0.6 0.6", latent_image=image, denoise=0.7)[0]
    assert swept["batch_index"] == [3, 5, 3, 5] and swept["noise_mask"].shape[0] == 4
    assert tiny.relative_error(swept["samples"][:2], ksampler(gated, latent_image=image, denoise=0.7)) < 1e-5
    assert torch.equal(swept["samples"][:2], swept["samples"][2:])
    assert image["batch_index"] == [3, 5] and image["samples"].shape[0] == 2


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (1, 1, 64, 64)])
def test_sweep_takes_a_noise_mask_of_any_shape(gated, shape):
    image = {
        "samples": torch.randn(1, 4, 8, 8, generator=tiny.generator(4)),
        "noise_mask": torch.ones(64, 64).tril().reshape(shape),
    }
    swept = run(gated, "0.6 0.6", latent_image=image)[0]["samples"]
    assert tiny.relative_error(swept[:1], ksampler(gated, latent_image=image)) < 1e-5


def test_ddim_inpainting_shares_its_noise_between_gates(gated):
    image = {
        "samples": torch.randn(1, 4, 8, 8, generator=tiny.generator(4)),
        "noise_mask": torch.ones(1, 1, 8, 8).tril(),
    }
    swept = run(gated, "0.6 0.6", "ddim", image)[0]["samples"]
    assert torch.equal(swept[0], swept[1])


def test_gates_replace_only_the_last_link(model, gated):
    chained = runtime.attach(gated, tiny.link_for(tiny.tiny_network(model, seed=5), tiny.tiny_reference(11), 0.9))
    run(chained, "0, 1")
    first, last = runtime.links_of(chained)
    assert first.gates == (0.6,) and last.gates == (0.9,), "the node's own model is never changed"
    swept = run(chained, "0.9 0.9")[0]["samples"]
    assert tiny.relative_error(swept[:1], ksampler(chained)) < 1e-5


def test_of_ours_the_unet_sees_the_tensors_alone(gated):
    """Runs, links, listeners and copies would be part of what torch.compile and packs that copy options look at."""
    seen = []

    def look(executor, x, timesteps, context, y, control, options, **kwargs):
        seen.append({key: value for key, value in options.items() if "flexip" in key})
        return executor(x, timesteps, context, y, control, options, **kwargs)

    watched = gated.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    run(watched, "0, 1", steps=1)
    (ours,) = seen
    assert list(ours) == [runtime.KEY]
    assert all(isinstance(branch, Branch) for part in ours[runtime.KEY].values() for branch in part)


def test_contact_sheet_has_a_column_per_gate_and_needs_the_vae(gated):
    sheet = run(gated, "0, 0.5, 1", latent_image=latent(2), vae=FakeVae())[1]
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3
    assert sheet.shape[2] >= 3 * 64 and sheet.shape[1] >= 2 * 64
    assert isinstance(run(gated, "0, 1")[1], ExecutionBlocker)


def test_a_wide_contact_sheet_goes_on_in_a_next_band():
    from flexip_pack.flexip_core.pictures.contact_sheet import WIDEST, contact_sheet

    narrow, wide = (
        contact_sheet(torch.rand(3, 16, 1024, 3), list("abc")),
        contact_sheet(torch.rand(10, 16, 1024, 3), list("abcdefghij")),
    )
    assert wide.shape[2] <= WIDEST and wide.shape[1] == 2 * narrow.shape[1]
    last = contact_sheet(
        torch.cat([torch.zeros(9, 16, 1024, 3), torch.ones(1, 16, 1024, 3) * torch.tensor([1.0, 0, 0])]),
        list("abcdefghij"),
    )
    assert last[0, -10, 1024 * 2 + 30].tolist() == [1.0, 0, 0]


def test_report_says_what_ran(gated):
    report = run(gated, "0, 0.5, 1")[2]
    blocks = len(tiny.config_for(gated).blocks)
    for words in (
        f"{blocks} of {blocks} blocks patched, 3 of 3 steps",
        "active from 0 to 1: 3 of 3 steps, 3 of 3 model calls",
        "gate 0, 0.5, 1, strength 1: ",
        "tokens 7 + 77",
        "tiny encoders",
    ):
        assert words in report
    assert "WARNING" not in report


def test_report_warns_when_nothing_was_active(model, gated):
    link = runtime.links_of(gated)[0]
    asleep = runtime.attach(model, tiny.link_for(link.network, link.reference, start_percent=0.998, end_percent=0.999))
    assert "WARNING: this gate changed nothing in this run" in run(asleep)[2]
    off = runtime.attach(model, tiny.link_for(link.network, link.reference, strength=0.0))
    assert run(off)[2].startswith("reference not used: strength is 0")
    with pytest.raises(ValueError, match="FlexIPSampler: .*strength 0"):
        run(off, "0, 1")


@pytest.mark.parametrize("gates", ["", "0, 0.5, 1"])
def test_a_model_without_gate_is_sampled_as_it_is_and_says_so(model, gates):
    """As where Apply FlexIP Gate is bypassed."""
    result = run(model, gates, vae=FakeVae())
    assert torch.equal(result[0]["samples"], ksampler(model))
    assert result[2].startswith("sampled without a reference") and result[1].shape[0] == 1


@pytest.mark.parametrize("text", ["a", "0, 1.5", "-0.1", "nan", "inf", "0.5x", "0,,b", ", ".join(["0.5"] * 65)])
def test_gates_that_are_no_numbers_from_0_to_1_are_a_sentence(gated, text):
    with pytest.raises(ValueError, match="FlexIPSampler: g"):
        run(gated, gates=text)


def test_our_noise_equals_what_the_sampler_makes_itself():
    import comfy.k_diffusion.sampling as k

    x, sigmas = torch.randn(1, 4, 8, 8), torch.tensor([10.0, 5.0, 1.0, 0.0])
    own = k.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=3, cpu=True)
    assert torch.equal(noise_sampler("dpmpp_2m_sde", x, sigmas, 3)(sigmas[0], sigmas[1]), own(sigmas[0], sigmas[1]))
    assert torch.equal(noise_sampler("lcm", x, sigmas, 3)(None, None), k.default_noise_sampler(x, seed=3)(None, None))


def test_progress_and_live_preview_come_as_from_ksampler(gated, monkeypatch):
    import comfy.utils
    import latent_preview

    shown = []
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: shown.append((value, total, preview is not None)),
    )
    run(gated, "0, 1")
    ours = list(shown)
    shown.clear()
    ksampler(gated)
    assert ours == shown == [(1, 3, True), (2, 3, True), (3, 3, True)]


def test_a_sweep_shows_its_gates_in_prompts_that_bring_their_own(gated):
    own = FlexIPConditioning.execute(P, 0.3, 1.0).args[0]
    swept = run(gated, "0, 0.5, 1", positive=own)
    assert torch.equal(swept[0]["samples"], run(gated, "0, 0.5, 1")[0]["samples"])
    assert "brought their own reference or gate (gate 0, 0.5, 1)" in swept[2]
    alone = run(gated, positive=own)[0]["samples"]  # without a sweep the prompt's own gate counts
    assert tiny.relative_error(alone, run(gated)[0]["samples"]) > 1e-3


def sheet_of(model, gates="", strengths="", batch=1):
    out = FlexIPSampler.execute(
        model, 11, 2, 5.0, "euler_ancestral", "normal", P, N, latent(batch), 1.0, gates, FakeVae(), strengths
    )
    [sheet] = out.ui["flexip_sheet"]
    return sheet, out


def test_the_page_gets_every_picture_of_a_sweep_with_its_place_in_it(model, gated):
    sheet, out = sheet_of(gated, "0, 1", "0.5, 2", batch=2)
    cells = [(cell["strength"], cell["gate"], cell["latent"]) for cell in sheet["cells"]]
    assert cells == [(s, g, n) for s in (0.5, 2.0) for g in (0.0, 1.0) for n in (0, 1)]
    assert sheet["columns"] == 4 and len(sheet["bare"]) == 2
    pixels = FakeVae().decode(out.args[0]["samples"])
    for picture, cell in zip(pixels, sheet["cells"]):
        assert torch.equal(read(cell), (picture * 255).to(torch.uint8))
    bare = FlexIPSampler.execute(model, 11, 2, 5.0, "euler_ancestral", "normal", P, N, latent(2), 1.0, "", None).args[0]
    for picture, file in zip(FakeVae().decode(bare["samples"]), sheet["bare"]):
        assert torch.equal(read(file), (picture * 255).to(torch.uint8))


def test_one_picture_is_compared_with_nothing_and_costs_nothing_more(gated):
    sheet, _ = sheet_of(gated)
    assert len(sheet["cells"]) == 1 and sheet["bare"] == [] and sheet["cells"][0]["gate"] is None


def read(file):
    with Image.open(Path(folder_paths.get_temp_directory(), file["filename"])) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))
