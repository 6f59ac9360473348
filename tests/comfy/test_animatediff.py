"""Sliding windows over the frames as AnimateDiff-Evolved makes them: a wrapper that cuts x and every conditioning of that length.

Its own code (d8d163c) was run beside this by hand, with the same result; it needs no motion model for its windows.
"""

import tiny
import torch
from comfy.patcher_extension import WrappersMP
from flexip_pack.nodes import runtime

FRAMES, LENGTH, OVERLAP = 7, 4, 2
P, N = tiny.cond(1), tiny.cond(2)


def windows():
    starts = range(0, FRAMES - OVERLAP, LENGTH - OVERLAP)
    return [list(range(min(start, FRAMES - LENGTH), min(start, FRAMES - LENGTH) + LENGTH)) for start in starts]


def sliding(executor, model, conds, x_in, timestep, model_options):
    """What sliding_calc_conds_batch does: windows of frames, `ad_params` with their indices, results averaged."""
    totals = [torch.zeros_like(x_in) for _ in conds]
    counts = torch.zeros(FRAMES).view(-1, 1, 1, 1)
    options = model_options["transformer_options"]
    for indices in windows():
        options["ad_params"] = {"sub_idxs": indices, "full_length": FRAMES, "context_length": LENGTH}
        cut = [[shorter(entry, indices) for entry in entries] for entries in conds]
        results = executor(model, cut, x_in[indices], timestep[indices], model_options)
        for total, result in zip(totals, results):
            total[indices] += result
        counts[indices] += 1
    return [total / counts for total in totals]


def shorter(entry, indices):
    model_conds = {
        key: cond._copy_with(cond.cond[indices])
        if isinstance(cond.cond, torch.Tensor) and cond.cond.size(0) == FRAMES
        else cond
        for key, cond in entry["model_conds"].items()
    }
    return {**entry, "model_conds": model_conds}


def test_every_frame_of_a_sliding_window_keeps_its_own_gate_and_mask():
    model = tiny.tiny_model()
    network, reference = tiny.tiny_network(model), tiny.tiny_reference()
    gates = tuple(frame / (FRAMES - 1) for frame in range(FRAMES))
    masks = torch.rand(FRAMES, 8, 8, generator=tiny.generator(3))
    noise = tiny.noise_for(FRAMES)
    gated = runtime.attach(model, tiny.link_for(network, reference, gates, mask=masks))
    gated.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "evolved", sliding)
    together = tiny.ksample(gated, P, N, noise=noise)
    for frame in range(FRAMES):
        one = tiny.link_for(network, reference, gates[frame], mask=masks[frame : frame + 1])
        alone = tiny.ksample(runtime.attach(model, one), P, N, noise=noise[frame : frame + 1])
        assert tiny.relative_error(together[frame : frame + 1], alone) < 1e-5
