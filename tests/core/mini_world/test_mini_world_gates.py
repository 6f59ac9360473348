"""The pass lines, the named runs, and a whole evaluation of untrained models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexip_core.files.checkpoint import save_checkpoint
from flexip_core.mini_world import (
    causes,
    cures,
    encoders,
    files,
    gates,
    judge,
    measure,
    runs,
    table,
    task,
    world,
)
from flexip_core.mini_world.base import BaseRun
from flexip_core.mini_world.sampling import ddim, draw, noise_for
from flexip_core.training.start import make_network

REPO = Path(__file__).resolve().parents[3]

BASE = {"shape": 1.0, "ground": 1.0, "corner": 0.96, "identity": 0.05}
LINE = [i / 10 for i in range(11)]


def passing() -> dict:
    """What a run must at least be like."""
    curve = {name: [0.9 * x for x in LINE] for name in measure.SCORES}
    even = {name: {"spearman": 0.96, "jump_share": 0.3} for name in measure.SCORES}
    conflict = {**curve, "ground_text": [1.0] * 8 + [0.5] * 3, "corner_text": [0.96] * 11}
    return {
        "conflict": {"gates": LINE, "curves": conflict, "smoothness": even},
        "omit": {"gates": LINE, "curves": curve, "smoothness": even},
        "base": BASE,
        "controls": {"wrong_reference": 0.9, "wrong_reference_to_own": 0.1, "zero_reference": -0.1},
    }


def flat(value: float = 0.1) -> dict:
    run = passing()
    for mode in measure.MODES:
        run[mode]["curves"] = {name: [value] * 11 for name in measure.SCORES}
    return run


def test_a_run_that_is_as_claimed_passes_every_line():
    run = passing()
    assert gates.base_obeys(BASE).passed
    assert gates.identity_arrives(run).passed
    assert gates.text_kept(run).passed
    assert gates.decoupled(run, flat()).passed
    assert gates.continuous(run).passed
    assert gates.causal(run, flat(), flat()).passed


def changed(change) -> dict:
    run = copy.deepcopy(passing())
    change(run)
    return run


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (gates.identity_arrives, lambda r: r["conflict"]["curves"].update(identity=[0.84] * 11)),
        (
            gates.identity_arrives,
            lambda r: r.update(base={**BASE, "identity": 0.4}),
        ),
        (gates.text_kept, lambda r: r["conflict"]["curves"].update(corner_text=[1.0] * 7 + [0.9] + [1.0] * 3)),
        (lambda run: gates.decoupled(run, passing()), lambda r: None),
        (lambda run: gates.decoupled(run, flat()), lambda r: r["omit"]["curves"].update(corner_copied=[0.5] * 11)),
        (lambda run: gates.decoupled(run, flat()), lambda r: r["omit"]["curves"].update(dino_i=[0.5] * 11)),
        (gates.continuous, lambda r: r["omit"]["smoothness"].update(clip_i={"spearman": 0.94, "jump_share": 0.1})),
        (gates.continuous, lambda r: r["conflict"]["smoothness"].update(identity={"spearman": 1, "jump_share": 0.36})),
        (lambda run: gates.causal(run, flat(), flat()), lambda r: r["controls"].update(wrong_reference=0.8)),
        (lambda run: gates.causal(run, flat(), flat()), lambda r: r["controls"].update(wrong_reference_to_own=0.5)),
        (lambda run: gates.causal(run, flat(), flat()), lambda r: r["controls"].update(zero_reference=0.3)),
        (lambda run: gates.causal(run, passing(), flat()), lambda r: None),
    ],
)
def test_what_falls_short_of_a_line_is_called_missed(check, change):
    outcome = check(changed(change))
    assert not outcome.passed and "MISSED" in str(outcome)


def test_the_base_must_obey_every_kind_of_word():
    for name in ("shape", "ground", "corner"):
        assert not gates.base_obeys({**BASE, name: 0.94}).passed


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder as scripts/mini_world.py fills it, of untrained models."""
    folder = tmp_path_factory.mktemp("mini_world")
    files.save(judge.Judge().state_dict(), folder / files.JUDGE)
    task.save_clip(encoders.untrained(0), folder)
    files.save(encoders.make_dino().model.state_dict(), folder / files.DINO_FILE)
    files.save(BaseRun(0, 1).average, folder / files.BASE)
    return folder


@pytest.fixture(scope="module")
def loaded(untrained):
    return task.load_world(untrained), task.load_instruments(untrained)


def script(*arguments):
    return subprocess.run(
        [sys.executable, REPO / "scripts" / "mini_world.py", *arguments], capture_output=True, text=True
    )


def test_the_table_is_made_of_the_repositorys_own_results():
    done = script("--folder", REPO / "benchmarks" / "mini_world", "table", "--seeds", "2", "3", "4")
    assert done.returncode == 0, done.stderr
    for row in (
        "outputs-jitter (3) | identity |",
        "ip (3) | corner_text |",
        "outputs-jitter-swapped (3) | corner_copied |",
    ):
        assert row in done.stdout


def test_a_stage_that_lacks_what_it_needs_says_so_and_makes_no_folder(tmp_path):
    for stage, says in ((("evaluate", "ip"), "Make it first"), (("table",), "holds no results")):
        done = script("--folder", tmp_path / "none", *stage)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["outputs", "tokens", "outputs-jitter", "tokens-jitter-swapped", "outputs-swapped"])
def test_a_runs_name_says_how_it_is_trained(name, untrained):
    cfg = runs.config(name, 3, untrained)
    assert cfg.network.gate_mode == name.split("-")[0] and cfg.seed == 3
    kept, free = (
        (cfg.gates.variant, cfg.gates.invariant) if "swapped" in name else (cfg.gates.invariant, cfg.gates.variant)
    )
    assert (kept, free) == (((0.5, 1.0), (0.0, 0.5)) if "jitter" in name else ((0.8, 0.8), (0.2, 0.2)))
    assert cfg.train_adapters == ("preservation", "personalization")


@pytest.mark.parametrize("name", ["output", "ip-jitter", "outputs-fast", ""])
def test_other_names_are_refused(name, untrained):
    with pytest.raises(ValueError, match="There is no run"):
        runs.config(name, 1, untrained)


def test_runs_of_one_seed_share_their_tests_and_other_seeds_have_others():
    first, other = runs.setup_for(1), runs.setup_for(2)
    assert torch.equal(first.tests().reference, runs.setup_for(1).tests().reference)
    assert not torch.equal(first.tests().reference, other.tests().reference)
    assert not torch.equal(first.noise(), other.noise())
    probed = task.PROBE.test_seed
    assert all(runs.setup_for(seed).test_seed != probed for seed in range(100))


def test_the_baseline_is_one_adapter_at_weight_one_with_as_many_trained_numbers(loaded, untrained):
    sizes = {}
    for name in ("outputs", runs.BASELINE):
        cfg = runs.config(name, 1, untrained)
        sizes[name] = runs.trained_numbers(make_network(cfg, loaded[0]), runs.adapters_of(name))
    assert sizes[runs.BASELINE] == pytest.approx(sizes["outputs"], rel=0.03)
    assert cfg.gates.invariant == cfg.gates.variant == (1.0, 1.0)
    assert cfg.train_adapters == runs.adapters_of(runs.BASELINE)


def test_ddim_with_the_true_noise_gives_the_picture_back():
    schedule = torch.linspace(0.999, 0.01, 100)
    clean = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))

    def predicted(latents, time, done):
        return (latents - schedule[time].sqrt() * clean) / (1 - schedule[time]).sqrt()

    assert torch.allclose(ddim(predicted, start, schedule, 7), clean, atol=1e-4)


def test_a_gate_of_nothing_is_the_bare_base(loaded, untrained):
    base, _ = loaded
    network = make_network(runs.config("outputs", 1, untrained), base)
    network.init_no_op()
    tests = world.test_set(2, 1)
    prompts, noise = tests.prompts("omit"), noise_for(2, 0)
    bare = draw(base, prompts, noise, steps=2)
    gated = draw(base, prompts, noise, network, base.features(tests.reference), 0.7, steps=2)
    assert torch.allclose(gated, bare, atol=1e-5)


def test_a_gate_that_moves_nowhere_gives_one_picture_and_all_parts_pass_through_it(loaded, untrained):
    base, tools = loaded
    network = make_network(runs.config("outputs", 1, untrained), base)
    setup = measure.Setup(cases=2, gates=(0.0, 0.5, 1.0), steps=4)
    still = measure.gate_sweep(base, network, "omit", tools, setup, dial=lambda gate, done, block: 0.5).pictures
    assert torch.equal(still[0], still[2])
    moved = {}
    for name, (dial, its_setup) in causes.variants(network, setup).items():
        if its_setup == setup:
            moved[name] = measure.gate_sweep(base, network, "omit", tools, setup, dial=dial).pictures
            assert torch.allclose(moved[name][1], still[1], atol=1e-5), name
            assert (moved[name][0] - still[0]).abs().max() > 1e-4, name
    assert len(moved) == 4 + 2 * len(network.block_widths)


def test_cures_are_measured_on_one_set_of_pictures_and_learn_from_another(loaded, untrained, monkeypatch):
    base, tools = loaded
    network = make_network(runs.config("outputs", 1, untrained), base)
    seen = []
    sweep = measure.gate_sweep
    monkeypatch.setattr(measure, "gate_sweep", lambda *a: seen.append(a[4]) or sweep(*a))
    monkeypatch.setattr(cures, "FEW", 2)
    setup = measure.Setup(cases=2, gates=(0.0, 0.5, 1.0), steps=2)
    found = cures.measured(base, network, tools, setup, "omit")
    assert len(found["evened_gates"]) == 3 and set(found["between"]) == {"largest_part", "median", "jumps"}
    assert {s.test_seed for s in seen[1:]} == {setup.test_seed} and seen[0].test_seed != setup.test_seed
    assert len(seen[-1].gates) == 21 and len(seen) == 2 + len(found) - 2
    json.dumps(found)


def test_a_whole_evaluation_gives_numbers_for_json_and_a_table(loaded, untrained, tmp_path):
    base, tools = loaded
    setup = measure.Setup(cases=3, gates=(0.0, 0.5, 1.0), steps=2)
    runs.write_json(tmp_path / "base.json", runs.evaluate_base(base, tools, setup), "the command")
    for name in ("outputs", runs.BASELINE):
        path = tmp_path / "adapters.safetensors"
        save_checkpoint(make_network(runs.config(name, 1, untrained), base), path)
        result, sweeps = runs.evaluate(base, tools, path, name, setup)
        assert sweeps["omit"].pictures.shape == (3, 3, 3, 16, 16)
        for seed in (1, 2):
            runs.write_json(tmp_path / f"{name}_{seed}.json", {"run": name, "seed": seed, **result}, "the command")
    read_base, results = table.read_results(tmp_path)
    assert set(results) == {"outputs", runs.BASELINE} and set(results["outputs"]) == {1, 2}
    assert json.loads((tmp_path / "outputs_1.json").read_text())["command"] == "the command"
    assert set(table.read_results(tmp_path, [2])[1]["outputs"]) == {2}
    text = table.markdown(read_base, results)
    assert "G1 MISSED" in text and "outputs, seed 2: G5" in text and "± 0.000" in text
    assert "outputs, seed 1: G4" in text and "G6" not in text  # no control was run
