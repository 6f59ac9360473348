"""Masks: strength and gate per place, against a reference that lays them over the tokens cell by cell."""

import inspect

import comfy.context_windows
import naive
import pytest
import tiny
import torch
from comfy_extras import nodes_context_windows
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_perpneg import PerpNeg
from flexip_pack.nodes import runtime
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import pairs

import nodes

TOLERANCE = 1e-5
P, N, M = (tiny.cond(seed) for seed in (1, 2, 3))
WHITE, BLACK = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


def spec(network, **kwargs):
    return naive.Spec(network, [tiny.tiny_reference()], **kwargs)


def random_masks(seed, *shape):
    """Black and white places, and grey ones."""
    g = tiny.generator(seed)
    return torch.rand(*shape, generator=g) * torch.randint(0, 3, shape, generator=g).clamp(max=1)


def prompts(*pairs):
    return [naive.Prompt(conditioning[0][0][0], null) for conditioning, null in pairs]


PLAIN = [*prompts((P, False)), *prompts((N, True))]


def check(model, one, run, picture, declared=PLAIN, gates=None, tolerance=TOLERANCE):
    got = run(runtime.attach(model, one.link(gates)))
    expected = run(naive.attach(model, [one], declared, picture))
    assert tiny.relative_error(got, expected) < tolerance
    return got


def sampled(noise, positive=P, negative=N, **kwargs):
    return lambda m: tiny.ksample(m, positive, negative, **{"steps": 1, "noise": noise, **kwargs})


def test_masks_of_any_size_and_number_act_per_token_on_latents_of_any_size(model, network):
    @settings(max_examples=6)  # each runs the UNet and the naive reference
    @given(
        st.tuples(st.integers(3, 13), st.integers(3, 13)),  # the latent
        st.tuples(st.integers(1, 40), st.integers(1, 40)),  # the mask
        st.tuples(st.integers(1, 5), st.integers(1, 6)),  # latents, masks
        st.sampled_from(["mask", "gate_mask", "both"]),
        st.integers(0, 99),
    )
    @example((9, 13), (1, 1), (1, 1), "both", 0)
    @example((9, 13), (3, 500), (2, 1), "both", 1)
    @example((5, 7), (72, 104), (5, 3), "both", 2)
    @example((5, 7), (2, 3), (3, 2), "mask", 3)
    @example((8, 8), (8, 8), (1, 3), "gate_mask", 4)
    def compare(latent, size, counts, which, seed):
        batch, masks = counts
        one = spec(
            network,
            mask=None if which == "gate_mask" else random_masks(seed, masks, *size),
            gate_mask=None if which == "mask" else random_masks(seed + 1, masks, *size),
            strength=1.3,
            gates=[0.8],
        )
        check(model, one, sampled(tiny.noise_for(batch, *latent)), naive.Picture(batch, *latent))

    compare()


@pytest.mark.parametrize("shape", [(16, 20), (2, 16, 20), (2, 1, 16, 20), (2, 16, 20, 1)], ids=str)
def test_masks_have_two_to_four_dimensions(model, network, shape):
    masks = random_masks(5, *shape)
    flat = masks.reshape(-1, 16, 20)
    noise = tiny.noise_for(3, 8, 10)
    expected = tiny.ksample(
        naive.attach(model, [spec(network, mask=flat)], PLAIN, naive.Picture(3, 8, 10)), P, N, noise=noise
    )
    got = tiny.ksample(runtime.attach(model, spec(network, mask=masks).link()), P, N, noise=noise)
    assert tiny.relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["mask", "gate_mask"])
def test_white_is_like_no_mask(model, network, name):
    noise = tiny.noise_for(2, 9, 13)
    without = tiny.ksample(runtime.attach(model, spec(network).link()), P, N, noise=noise)
    white = tiny.ksample(runtime.attach(model, spec(network, **{name: WHITE}).link()), P, N, noise=noise)
    assert tiny.relative_error(white, without) < TOLERANCE


def test_black_is_the_bare_model_and_a_black_gate_mask_gate_zero(model, network):
    noise = tiny.noise_for(2, 9, 13)
    black = tiny.ksample(runtime.attach(model, spec(network, mask=BLACK).link()), P, N, noise=noise)
    assert torch.equal(black, tiny.ksample(model, P, N, noise=noise))
    prompted = tiny.ksample(runtime.attach(model, spec(network, gate_mask=BLACK).link()), P, N, noise=noise)
    zero = tiny.ksample(runtime.attach(model, spec(network, gates=[0.0]).link()), P, N, noise=noise)
    assert tiny.relative_error(prompted, zero) < TOLERANCE


def black_tokens(mask, height, width, grid):
    """Which tokens of a block of this grid see nothing but black cells."""
    cells = torch.tensor(naive.on_latent(mask.tolist(), height, width))
    level = 0 if grid == (height, width) else 1
    return (torch.tensor(naive.on_tokens((cells > 0).float().tolist(), level)) == 0).flatten()


@pytest.mark.parametrize(
    "mode, dtype, gate_mask",
    pairs(["outputs", "tokens"], [torch.float32, torch.float16, torch.bfloat16], [None, random_masks(8, 1, 18, 26)]),
)
def test_a_masked_out_place_keeps_the_text_attention_bit_for_bit(mode, dtype, gate_mask):
    model = tiny.tiny_model(dtype)
    mask = torch.ones(1, 18, 26)
    mask[:, :, :12] = 0
    one = spec(tiny.tiny_network(model, mode), mask=mask, gate_mask=gate_mask)
    seen = []

    def look(address, out, bare, grid):
        black = black_tokens(mask[0], 9, 13, grid)
        assert 0 < black.sum() < len(black)
        assert torch.equal(out[:, black], bare[:, black])
        assert ((out - bare)[:, ~black].abs().amax(dim=2) > 0).float().mean() > 0.9
        seen.append(address)

    watched = naive.watch_blocks(runtime.attach(model, one.link()), look)
    tiny.ksample(watched, P, N, noise=tiny.noise_for(1, 9, 13), steps=1)
    assert set(seen) == set(one.network.block_widths)


def test_each_latent_of_a_batch_has_its_own_mask(model, network):
    """Fewer masks than latents repeat, as elsewhere in ComfyUI."""
    masks, noise = random_masks(3, 2, 16, 16), tiny.noise_for(5)
    together = tiny.ksample(runtime.attach(model, spec(network, mask=masks).link()), P, N, noise=noise)
    for row in range(5):
        own = spec(network, mask=masks[row % 2 : row % 2 + 1])
        alone = tiny.ksample(runtime.attach(model, own.link()), P, N, noise=noise[row : row + 1])
        assert tiny.relative_error(together[row : row + 1], alone) < TOLERANCE


def test_masks_go_with_a_gate_per_row_and_prompts_of_different_length(model, network):
    positive = tiny.cond(1, 154)
    one = spec(network, gates=[0.0, 0.3, 1.0], mask=random_masks(1, 3, 20, 20), gate_mask=random_masks(2, 2, 20, 20))
    declared = prompts((positive, False), (N, True))
    check(model, one, sampled(tiny.noise_for(3), positive), naive.Picture(3, 8, 8), declared)


def test_two_subjects_by_chaining_with_masks(model):
    left = torch.zeros(1, 16, 16)
    left[:, :, :8] = 1
    first = spec(tiny.tiny_network(model, "outputs"), mask=left, gates=[0.9])
    second = naive.Spec(
        tiny.tiny_network(model, "tokens", seed=5), [tiny.tiny_reference(11)], mask=1 - left, gates=[0.2]
    )
    noise = tiny.noise_for(2, 9, 13)
    got = tiny.ksample(runtime.attach(runtime.attach(model, first.link()), second.link()), P, N, noise=noise)
    expected = tiny.ksample(naive.attach(model, [first, second], PLAIN, naive.Picture(2, 9, 13)), P, N, noise=noise)
    assert tiny.relative_error(got, expected) < TOLERANCE


def test_inpainting(model, network):
    g = tiny.generator(6)
    latent = torch.randn(2, 4, 8, 8, generator=g)
    one = spec(network, mask=random_masks(1, 2, 64, 64), gate_mask=random_masks(2, 1, 64, 64))
    run = sampled(
        tiny.noise_for(2), mask=(torch.rand(1, 1, 64, 64, generator=g) > 0.5).float(), latent=latent, denoise=0.6
    )
    check(model, one, run, naive.Picture(2, 8, 8))


def test_an_area_prompt_sees_its_part_of_the_mask(model, network):
    """On both sides: core runs the negative once in the same area and once everywhere."""
    mask = torch.zeros(1, 9, 13)
    mask[:, 2:7, 4:9] = 1  # reaches out of the area
    one = spec(network, mask=mask, gate_mask=random_masks(4, 1, 9, 13))
    box = (3, 2, 5, 7)
    positive = nodes.ConditioningSetArea().append(P, 7 * 8, 5 * 8, 2 * 8, 3 * 8, 1.0)[0] + M
    declared = [
        naive.Prompt(P[0][0][0], False, box),
        naive.Prompt(M[0][0][0], False),
        naive.Prompt(N[0][0][0], True, box),
    ]
    check(model, one, sampled(tiny.noise_for(2, 9, 13), positive), naive.Picture(2, 9, 13), declared)


def test_an_area_in_percent_and_two_areas_of_one_size(model, network):
    one = spec(network, mask=random_masks(1, 2, 16, 16))
    left, right = (0, 0, 8, 4), (0, 4, 8, 4)
    percent = nodes.ConditioningSetAreaPercentage()
    positive = percent.append(P, 0.5, 1.0, 0.0, 0.0, 1.0)[0] + percent.append(M, 0.5, 1.0, 0.5, 0.0, 1.0)[0]
    other = tiny.cond(4)
    negative = percent.append(N, 0.5, 1.0, 0.0, 0.0, 1.0)[0] + percent.append(other, 0.5, 1.0, 0.5, 0.0, 1.0)[0]
    declared = [
        naive.Prompt(conditioning[0][0][0], null, box)
        for conditioning, null, box in ((P, False, left), (M, False, right), (N, True, left), (other, True, right))
    ]
    check(model, one, sampled(tiny.noise_for(2), positive, negative), naive.Picture(2, 8, 8), declared)


def test_a_mask_prompt_cropped_to_its_bounds(model, network):
    shown = torch.zeros(1, 16, 16)
    shown[:, 4:12, 2:10] = 1
    one = spec(network, mask=random_masks(1, 1, 16, 16))
    positive = nodes.ConditioningSetMask().append(P, shown, "mask bounds", 1.0)[0] + M
    sizes = []
    noise = tiny.noise_for(1, 16, 16)
    bare = model.clone()
    bare.add_wrapper_with_key(
        "apply_model", "spy", lambda e, *a, **k: (sizes.append(tuple(a[0].shape[-2:])), e(*a, **k))[1]
    )
    tiny.ksample(bare, positive, N, noise=noise, steps=1)
    box = (4, 2, *next(size for size in sizes if size != (16, 16)))
    declared = [
        naive.Prompt(P[0][0][0], False, box),
        naive.Prompt(M[0][0][0], False),
        naive.Prompt(N[0][0][0], True, box),
    ]
    check(model, one, sampled(noise, positive), naive.Picture(1, 16, 16), declared)


def test_a_call_that_a_node_makes_itself_sees_every_rows_gate_and_the_mask(model, network):
    """The old PerpNeg node's empty prompt comes without any tag of ours."""
    one = spec(network, gates=[0.9, 0.2], mask=random_masks(1, 1, 9, 13), gate_mask=random_masks(2, 1, 5, 5))
    run = lambda m: tiny.ksample(PerpNeg.execute(m, M, 1.0).args[0], P, N, noise=tiny.noise_for(2, 9, 13), steps=1)
    check(model, one, run, naive.Picture(2, 9, 13), prompts((P, False), (N, True), (M, True)))


def windows(model, dim, causal, length=4):
    execute = nodes_context_windows.ContextWindowsManualNode.execute
    anchor = {"causal_window_fix": causal} if "causal_window_fix" in inspect.signature(execute).parameters else {}
    if causal and not anchor:
        pytest.skip("this ComfyUI has no anchor frame")
    return execute(
        model,
        length,
        2,
        comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        1,
        False,
        comfy.context_windows.ContextFuseMethods.PYRAMID,
        dim,
        False,
        **anchor,
    ).args[0]


@pytest.mark.parametrize("causal", [False, True], ids=["", "with an anchor frame"])
def test_context_windows_over_the_batch_keep_every_frames_mask_and_gate(model, network, causal):
    gates = [0.0, 0.9, 0.3, 1.0, 0.6, 0.2, 0.8]
    one = spec(network, gates=gates, mask=random_masks(1, 7, 16, 16), gate_mask=random_masks(2, 3, 16, 16))
    run = lambda m: tiny.ksample(windows(m, 0, causal), P, N, noise=tiny.noise_for(7), steps=1)
    check(model, one, run, naive.Picture(7, 8, 8))


@pytest.mark.parametrize("causal", [False, True], ids=["", "with an anchor row"])
@pytest.mark.parametrize("dim", [2, 3], ids=["height", "width"])
def test_context_windows_over_height_or_width_show_their_part_of_the_mask(model, network, dim, causal):
    one = spec(network, mask=random_masks(1, 1, 18, 26), gate_mask=random_masks(2, 1, 18, 26))
    run = lambda m: tiny.ksample(windows(m, dim, causal), P, N, noise=tiny.noise_for(1, 9, 13), steps=1)
    check(model, one, run, naive.Picture(1, 9, 13))


def test_deep_shrink_is_followed_on_the_grid_that_a_block_really_has(model, network):
    """PatchModelAddDownscale halves the image inside the UNet, unknown to the mask."""
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1
    shrink = lambda m: PatchModelAddDownscale.execute(m, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic").args[0]
    noise = tiny.noise_for(1, 16, 16)
    grids = set()

    def look(address, out, bare, grid):
        grids.add(grid)
        left = torch.arange(grid[0] * grid[1]) % grid[1] < grid[1] // 2
        assert torch.equal(out[:, left], bare[:, left])
        assert ((out - bare)[:, ~left].abs().amax(dim=2) > 0).all()

    gated = runtime.attach(model, spec(network, mask=mask).link())
    tiny.ksample(naive.watch_blocks(shrink(gated), look), P, N, noise=noise)
    assert grids == {(16, 16), (4, 4)}
    grey = spec(network, mask=torch.full((1, 3, 3), 0.5), gate_mask=torch.full((1, 5, 5), 0.5), gates=[0.8])
    same = spec(network, strength=0.5, gates=[0.4])
    got, expected = (tiny.ksample(shrink(runtime.attach(model, s.link())), P, N, noise=noise) for s in (grey, same))
    assert tiny.relative_error(got, expected) < TOLERANCE


# Tiling


BOXES = ((0, 0, 6, 8), (0, 5, 6, 8), (3, 0, 6, 8), (3, 5, 6, 8))  # of a latent of 9 x 13


class BBox:
    """As TiledDiffusion's: iterating it gives its four numbers."""

    def __init__(self, box):
        self.y, self.x, self.h, self.w = box

    def __getitem__(self, index):
        return [self.x, self.y, self.x + self.w, self.y + self.h][index]

    def cut(self, t):
        return t[:, :, self.y : self.y + self.h, self.x : self.x + self.w]


def tiled(crop, publish=False, shift=(0, 0), by_height=True, told=None):
    """A model_function_wrapper that works tile by tile, two tiles at once, all rows of a tile together.

    `crop` says what becomes of a kwarg, `publish` tells the boxes in transformer_options. With a shift the image is rolled before and
    after, as SpotDiffusion does it: of two shifts only one counts. `told` collects, for the naive reference, what each row shows.
    """
    down, right = shift if 0 in shift else (shift[0], 0) if by_height else (0, shift[1])

    def wrapper(apply_model, arguments):
        x, t, c = arguments["input"].roll((down, right), (2, 3)), arguments["timestep"], arguments["c"]
        out, count = torch.zeros_like(x), torch.zeros_like(x)
        for first in (0, 2):
            group = [BBox(box) for box in BOXES[first : first + 2]]
            tiles = torch.cat([box.cut(x) for box in group])
            part = {k: crop(v, group, x, tiles) if isinstance(v, torch.Tensor) else v for k, v in c.items()}
            part["transformer_options"] = dict(c["transformer_options"])
            if publish:
                part["transformer_options"] |= {
                    "tiled_diffusion_bboxes": group,
                    "tiled_diffusion_full_shape": tuple(x.shape[2:]),
                    "tiled_diffusion_shift": shift,
                    "tiled_diffusion_shift_condition": by_height,
                }
            if told is not None:
                sides = [naive.sides(box) for box in BOXES[first : first + 2]]
                rolled = lambda places, by, length: [(place - by) % length for place in places]
                shown = [(rolled(r, down, x.shape[2]), rolled(c, right, x.shape[3])) for r, c in sides]
                told[:] = [(row, part) for part in shown for row in range(len(x))]
            for box, rows in zip(group, apply_model(tiles, t.repeat(2), **part).split(len(x))):
                box.cut(out).add_(rows)
                box.cut(count).add_(1)
        return (out / count).roll((-down, -right), (2, 3))

    return wrapper


def repeated(v, rows):
    return (
        v.expand(rows, *v.shape[1:])
        if v.shape[0] == 1
        else v.repeat(-(-rows // v.shape[0]), *[1] * (v.dim() - 1))[:rows]
    )


def crop_all(v, group, x, tiles):
    """A pack that cuts whatever lies on the latent's cells."""
    if v.dim() >= 4 and v.shape[2:4] == x.shape[2:4]:
        v = torch.cat([box.cut(v) for box in group])
    return repeated(v, len(tiles))


def crop_as_tiled_diffusion(v, group, x, tiles):
    """shiimizu's loop (a155b1b), also in toyxyz' copy: on a 4-D tensor of the latent's size it takes one box for a list of boxes."""
    if v.dim() == x.dim() and v.shape[-2:] == x.shape[-2:]:
        raise AttributeError("'int' object has no attribute 'slicer'")
    return repeated(v, len(tiles))


def sample_tiled(m, noise, positive=P, negative=N, **kwargs):
    """The picture and the report."""
    m = m.clone()
    m.set_model_unet_function_wrapper(tiled(**kwargs))
    reports = []
    m.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    return tiny.ksample(m, positive, negative, noise=noise, steps=1), "\n".join(reports)


def naive_tiled(model, one, noise, whole=True, **kwargs):
    """`whole`: the mask lies over the latent; otherwise over every tile."""
    told = []

    def row(number):
        row_of_the_call, shown = told[number]
        return row_of_the_call % len(noise), shown if whole else None

    height, width = noise.shape[-2:] if whole else BOXES[0][2:]
    picture = naive.Picture(len(noise), height, width, row)
    return sample_tiled(naive.attach(model, [one], PLAIN, picture), noise, crop=crop_all, told=told, **kwargs)[0]


@pytest.mark.parametrize(
    "crop, publish",
    [(crop_all, False), (crop_all, True), (crop_as_tiled_diffusion, True)],
    ids=["kwargs cut along", "kwargs cut and boxes published", "only boxes published"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_see_their_part_of_the_mask(model, network, crop, publish, batch):
    one = spec(network, mask=random_masks(1, batch, 18, 26), gate_mask=random_masks(2, 1, 18, 26))
    noise = tiny.noise_for(batch, 9, 13)
    got, report = sample_tiled(runtime.attach(model, one.link()), noise, crop=crop, publish=publish)
    assert tiny.relative_error(got, naive_tiled(model, one, noise)) < TOLERANCE
    assert "WARNING" not in report


@pytest.mark.parametrize("shift", [(2, 0), (0, 5), (4, 7)], ids=str)
@pytest.mark.parametrize("by_height", [True, False], ids=["height", "width"])
def test_published_tiles_of_a_rolled_image_see_their_part_of_the_mask(model, shift, by_height):
    """SpotDiffusion moves the image under its tiles; where it could move it both ways, it takes turns."""
    one = spec(tiny.tiny_network(model), mask=random_masks(1, 1, 9, 13), gate_mask=random_masks(2, 1, 18, 26))
    noise, rolled = tiny.noise_for(2, 9, 13), {"shift": shift, "by_height": by_height}
    got, report = sample_tiled(
        runtime.attach(model, one.link()), noise, crop=crop_as_tiled_diffusion, publish=True, **rolled
    )
    assert tiny.relative_error(got, naive_tiled(model, one, noise, **rolled)) < TOLERANCE
    assert "WARNING" not in report


def test_a_tiling_that_tells_nothing_gets_the_mask_over_every_tile_and_a_warning(model, network):
    """TiledDiffusion by shiimizu: nothing is published, and no kwarg of the latent's size may reach it."""
    one = spec(network, mask=random_masks(1, 1, 9, 13))
    noise = tiny.noise_for(2, 9, 13)
    got, report = sample_tiled(runtime.attach(model, one.link()), noise, crop=crop_as_tiled_diffusion)
    over_tiles = spec(network, mask=torch.tensor(naive.on_latent(one.mask[0].tolist(), 6, 8))[None])
    assert tiny.relative_error(got, naive_tiled(model, over_tiles, noise, whole=False)) < TOLERANCE
    assert "WARNING" in report and "tile" in report


def test_a_tiling_without_masks_needs_no_warning(model, network):
    one = spec(network)
    noise = tiny.noise_for(2, 9, 13)
    got, report = sample_tiled(runtime.attach(model, one.link()), noise, crop=crop_as_tiled_diffusion)
    assert tiny.relative_error(got, naive_tiled(model, one, noise)) < TOLERANCE
    assert "WARNING" not in report


def test_published_boxes_inside_an_area_prompt_are_counted_from_the_areas_corner(model, network):
    """The tiler gets the area alone, so its boxes know nothing of where the area lies."""
    mask = torch.zeros(1, 12, 13)
    mask[:, 3:, :] = 1
    one = spec(network, mask=mask)
    positive, negative = (nodes.ConditioningSetArea().append(c, 13 * 8, 9 * 8, 0, 3 * 8, 1.0)[0] for c in (P, N))
    noise = tiny.noise_for(1, 12, 13)

    def run(m):
        return sample_tiled(m, noise, positive, negative, crop=crop_as_tiled_diffusion, publish=True)[0]

    # everything that any tile shows is white
    got, expected = (run(runtime.attach(model, s.link())) for s in (one, spec(network)))
    assert tiny.relative_error(got, expected) < TOLERANCE
