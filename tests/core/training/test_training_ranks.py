"""Several ranks train as one would: same rows, same steps, same files; and they stop together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_driver as driver
import torch
import training_fakes as fakes
import training_folders as made
from picture_pairs import PicturePairs

from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.files.weights import read_tensors
from flexip_core.mini_world.pairs import WorldPairs
from flexip_core.training.checkpointing import states
from flexip_core.training.config import DropoutConfig, TrainConfig
from flexip_core.training.data import INVARIANT, VARIANT, drop_phrases
from flexip_core.training.loop import BEST, FINAL, LOG, Trainer
from flexip_core.training.optim import average_gradients
from flexip_core.training.ranks import Ranks, TrainingError, joined
from flexip_core.training.shards import pack

REPO = Path(__file__).resolve().parents[3]
FIXTURES = REPO / "tests" / "fixtures"
DRIVER = FIXTURES / "ranks_driver.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
HALVES = [Ranks(rank, 2) for rank in range(2)]


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase()


def variables(**more):
    path = os.pathsep.join((str(REPO), str(FIXTURES)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def alone(base, folder, stop_at=None, resume=False, probe=driver.score, **changes):
    trainer = Trainer(fakes.config(folder, **changes), base, fakes.pairs(), probe)
    trainer.run(resume, should_stop=lambda: trainer.progress.step == stop_at)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Everything that two ranks do after one start, and the same alone."""
    folder = tmp_path_factory.mktemp("ranks")
    alone(base, folder / "one_then_two", stop_at=3, **driver.EVERYTHING)
    process = subprocess.Popen(
        [*TORCHRUN, free_port(), str(DRIVER), str(folder)], env=variables(), stderr=subprocess.PIPE, text=True
    )
    alone(base, folder / "one", **driver.EVERYTHING)
    alone(base, folder / "kinds_one", probe=None, **driver.ONE_KIND)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    return folder


def reports(runs):
    return [json.loads((runs / f"rank_{rank}.json").read_text()) for rank in range(2)]


def state(runs, name, step=6):
    return read_tensors(runs / name / f"state_{step:08d}.safetensors")


def flat(tensors, part):
    return torch.cat([value.flatten() for key, value in tensors.items() if key.startswith(part)])


def assert_same_trajectory(runs, one, other, limit=1e-6):
    """AdamW's moments to 10 times the limit: the rows are summed in another order, which changes the gradients' last digits."""
    for step in (1, 6):
        left, right = state(runs, one, step), state(runs, other, step)
        assert left.keys() == right.keys()
        for part, most in (("weights.", 1), ("average.", 1), ("moment1.", 10), ("moment2.", 10)):
            expected, got = flat(left, part), flat(right, part)
            assert (got - expected).norm() <= most * limit * expected.norm(), (part, step)
        assert all(torch.equal(left[key], right[key]) for key in left if key.startswith("count."))
        torch.testing.assert_close(left["meter"], right["meter"], rtol=1e-6, atol=0)


# --- one step, without a second process


def test_two_ranks_draw_the_rows_of_one_with_the_double_batch(base, tmp_path):
    whole = Trainer(fakes.config(tmp_path, **driver.EVERYTHING), base, fakes.pairs())
    kinds = torch.tensor([INVARIANT, VARIANT] * 4)
    gates = (0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6)
    expected = whole.source.batch(kinds, fakes.generator(5))
    losses, timesteps = whole.losses(expected, gates)
    text, features = whole.conditions(expected)
    for ranks in HALVES:
        rows = ranks.rows(8)
        part = Trainer(fakes.config(tmp_path, **driver.EVERYTHING), base, fakes.pairs(), ranks=ranks)
        batch = part.source.batch(kinds, fakes.generator(5), rows)
        for name in ("targets", "references", "captions", "kinds"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)[rows])
        own_text, own_features = part.conditions(batch)
        assert torch.equal(own_text.tokens, text.tokens[rows])
        assert all(torch.equal(own_features[name], features[name][rows]) for name in features)
        own_losses, own_timesteps = part.losses(batch, gates[rows])
        assert torch.equal(own_timesteps, timesteps[rows])
        torch.testing.assert_close(own_losses, losses[rows], rtol=1e-5, atol=0)


def test_the_mini_world_shares_its_rows_too():
    kinds = torch.tensor([INVARIANT, VARIANT] * 3)
    whole = WorldPairs().batch(kinds, fakes.generator(1))
    for ranks in HALVES:
        part = WorldPairs().batch(kinds, fakes.generator(1), ranks.rows(6))
        for name in ("targets", "references", "captions", "kinds"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[ranks.rows(6)])


def test_phrases_of_texts_are_dropped_alike_however_long_the_other_ranks_captions_are():
    words = [tuple(f"{row}.{i}" for i in range(count)) for row, count in enumerate((1, 9, 2, 3, 0, 2))]
    pictures = torch.zeros(6, 3, 4, 4)
    source = PicturePairs(pictures, words, torch.tensor([0, 0, 1, 1, -1, -1]))
    kinds, cfg = torch.tensor([INVARIANT] * 6), DropoutConfig(phrase=0.5)
    whole = drop_phrases(source.batch(kinds, fakes.generator(2)).captions, (), cfg, fakes.generator(3))
    parts = []
    for ranks in HALVES:
        captions = source.batch(kinds, fakes.generator(2), ranks.rows(6)).captions
        parts += drop_phrases(captions, (), cfg, fakes.generator(3), 6, ranks.rows(6))
    assert parts == whole


def test_one_step_sends_the_gradients_and_two_numbers_per_row_once(base, tmp_path):
    sent = []

    class Recorded(Ranks):
        def sum(self, values):
            sent.append(values.numel() * values.element_size())

    trainer = Trainer(fakes.config(tmp_path), base, fakes.pairs())
    for p in trainer.parameters.values():
        p.grad = torch.ones_like(p)
    losses, timesteps = average_gradients(
        trainer.parameters, torch.tensor([0.5, 0.25]), torch.tensor([999, 7]), Recorded(1, 3)
    )
    assert sent == [4 * (sum(p.numel() for p in trainer.parameters.values()) + 2 * 6)]
    assert losses.tolist() == [0, 0, 0.5, 0.25, 0, 0] and timesteps.tolist() == [0, 0, 999, 7, 0, 0]
    assert all(torch.equal(p.grad, torch.full_like(p, 1 / 3)) for p in trainer.parameters.values())


def test_a_batch_that_the_ranks_cannot_share_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="batch = 4 rows cannot be shared evenly by 3 ranks; choose a multiple of 3"):
        Trainer(fakes.config(tmp_path), base, fakes.pairs(), ranks=Ranks(0, 3))


# --- two ranks


def test_two_ranks_equal_one_with_the_double_batch(runs):
    assert_same_trajectory(runs, "one", "two")


def test_rows_and_steps_of_one_adapter_alone_change_nothing_about_that(runs):
    # of a single row some gradients are 0 but for rounding (1e-10), and of that AdamW makes steps
    assert_same_trajectory(runs, "kinds_one", "kinds_two", limit=1e-5)


def test_the_ranks_write_one_log_with_the_losses_of_all_rows(runs):
    one, two = ([json.loads(line) for line in (runs / name / LOG).read_text().splitlines()] for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two):
        if "probe" in left:
            assert right["probe"] == pytest.approx(left["probe"], rel=1e-5) and right["best"] == left["best"]
            continue
        assert right["rows_by_kind"] == left["rows_by_kind"] and right["lr"] == left["lr"]
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-6)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-5)
    assert {path.name for path in (runs / "two").iterdir()} == {
        LOG,
        BEST,
        FINAL,
        *(f"state_{step:08d}.safetensors" for step in range(1, 7)),
    }
    assert load_checkpoint(runs / "two" / FINAL).cfg == load_checkpoint(runs / "one" / FINAL).cfg


def test_a_wish_to_stop_at_one_rank_stops_all_after_the_same_step_with_a_state(runs):
    for report in reports(runs):
        assert report["stopped"] == 3 and report["saved"][-1] == "state_00000003.safetensors"


def test_interrupted_and_resumed_with_as_many_ranks_is_bit_exact(runs):
    for step in (4, 6):
        left, right = state(runs, "two", step), state(runs, "parts", step)
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_a_run_begun_by_one_rank_goes_on_with_two(runs):
    assert_same_trajectory(runs, "one", "one_then_two")
    exact, onward = state(runs, "one", 3), state(runs, "one_then_two", 3)
    assert [key for key in exact if not torch.equal(exact[key], onward[key])] == []


def test_a_run_begun_by_two_ranks_goes_on_alone(runs, base, tmp_path):
    folder = tmp_path / "two_then_one"
    folder.mkdir()
    for name in (LOG, "state_00000003.safetensors"):
        (folder / name).write_bytes((runs / "two" / name).read_bytes())
    alone(base, folder, resume=True, **driver.EVERYTHING)
    expected, got = state(runs, "two"), read_tensors(states(folder)[-1])
    for part in ("weights.", "average."):
        assert (flat(got, part) - flat(expected, part)).norm() <= 1e-6 * flat(expected, part).norm()


def test_recomputing_ranks_take_the_same_steps(runs):
    assert_same_trajectory(runs, "one", "recompute_two")


def test_what_stops_one_rank_stops_all_with_its_sentence(runs):
    first, second = (report["errors"] for report in reports(runs))
    sentence = "cat_07.png cannot be read; take it out."
    assert (
        second["error"] == f"ValueError: {sentence}" and first["error"] == f"TrainingError: Rank 1 stopped: {sentence}"
    )
    for errors in (first, second):
        assert errors["nan"].startswith("TrainingError: Step 3: the loss is nan; nothing of this step was kept.")
        assert "batch = 3 rows cannot be shared evenly by 2 ranks" in errors["uneven"]
        assert "Rank 1 has another training than rank 0; give every machine the same config" in errors["settings"]
        assert "\n" not in "".join(errors.values())
    for what, words in (("exists", "already holds a run"), ("probe", "a probe must return one finite number")):
        assert (
            words in first[what]
            and second[what].startswith("TrainingError: Rank 0 stopped: ")
            and words in second[what]
        )
    for name in ("error", "nan"):  # what was whole before
        assert [path.name for path in states(runs / name)] == ["state_00000002.safetensors"]


# --- ends that nobody announced


LEAVING = """
import os, sys, time
from datetime import timedelta
from flexip_core.training.ranks import joined

with joined("cpu", timedelta(seconds=8)) as ranks:
    assert not ranks.any(False)
    if ranks.rank == 1:
        os.kill(os.getpid(), 9) if sys.argv[1] == "killed" else time.sleep(200)
    with ranks.together():
        pass
"""


def start_by_hand(how):
    """With the launchers' variables, but no launcher that ends the other rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING, how],
            env=variables(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_rank_that_dies_or_falls_silent_ends_the_others_with_a_sentence(how):
    first, second = start_by_hand(how)
    try:
        message = first.communicate(timeout=120)[1].strip().splitlines()[-1]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert (
        "TrainingError: Rank 0 lost the others: one was killed" in message and "resume from the last state" in message
    )


def test_sigterm_at_one_rank_under_torchrun_saves_and_ends_all_with_0(base, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        steps = 1000000
        batch = 4
        seed = 3
        folder = "{(tmp_path / "run").as_posix()}"
        log_every = 1
        checkpoint_every = 1000000
        optimizer = {{ lr = 1e-3, warmup = 2, cosine_from = 1.0 }}
        [network]
        detail_tokens = 3
        semantic_tokens = 2
        cls_tokens = 2
        resampler = {{ width = 16, depth = 1, heads = 2, dim_head = 8, ff_mult = 2 }}
        [task]
        make = "ranks_driver:task"
        folder = "{tmp_path.as_posix()}"
        """
    )
    command = [*TORCHRUN, free_port(), "-m", "flexip_core.training", "run", str(config), "--allow-code"]
    process = subprocess.Popen(command, env=variables(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "run" / LOG
    try:
        end = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.02)
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    (saved,) = states(tmp_path / "run")
    done = int(re.findall(r"\d+", saved.name)[0])
    assert errors.count(f"Stopped after step {done}; the state is saved.") == 1  # rank 0 speaks for all
    assert errors.count("2 ranks, 2 rows each; ") == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, done + 1))


def test_two_ranks_in_parts_train_what_one_trains_whole(runs):
    assert_same_trajectory(runs, "two", "parts_two", 1e-5)


def test_two_machines_that_share_only_the_store_of_shards_train_what_one_trains(base, tmp_path):
    """Each has its own checkout of the pack, its own config and its own folder; only the pictures are the same files."""
    made.small_set(tmp_path / "pictures")
    pack(tmp_path / "pictures", tmp_path / "store" / "shards", 40_000)
    shutil.rmtree(tmp_path / "pictures")
    settings = dict(fakes.config("run").to_dict(), steps=3, checkpoint_every=1, keep=5)
    task = {"make": "training_fakes:task_of_pictures", "data": str(tmp_path / "store" / "shards"), "size": 16}
    port, processes = free_port(), []
    for node in ("0", "1"):
        place = tmp_path / f"machine {node}"
        shutil.copytree(REPO / "flexip_core", place / "flexip_core", ignore=shutil.ignore_patterns("weights", "*.pyc"))
        shutil.copytree(FIXTURES, place / "fixtures", ignore=shutil.ignore_patterns("*.pyc"))
        (place / "config.json").write_text(json.dumps({**settings, "folder": str(place / "run"), "task": task}))
        path = os.pathsep.join((str(place), str(place / "fixtures")))
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--node-rank",
            node,
            "--nproc-per-node",
            "1",
        ]
        command = [
            *launch,
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
            "-m",
            "flexip_core.training",
            "run",
            "config.json",
        ]
        processes.append(
            subprocess.Popen(
                [*command, "--allow-code"], cwd=place, env=variables(PYTHONPATH=path), stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    first, second = (tmp_path / f"machine {node}" / "run" for node in "01")
    assert len(states(first)) == 3 and (first / FINAL).exists()
    assert not second.exists(), "rank 0 alone writes"
    one = Trainer(
        TrainConfig.from_dict({**settings, "folder": str(tmp_path / "one")}),
        *fakes.task_of_pictures("cpu", task["data"], 16),
    )
    one.run()
    expected, got = (flat(read_tensors(states(folder)[-1]), "weights.") for folder in (tmp_path / "one", first))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    resumed = TrainConfig.from_dict({**settings, "folder": str(first), "steps": 4})
    assert Trainer(resumed, *fakes.task_of_pictures("cpu", task["data"], 16)).run(resume=True), "and goes on on one"


# --- the launcher's variables


def test_without_a_launcher_or_with_one_rank_a_process_is_alone(monkeypatch):
    for value in (None, "1"):
        monkeypatch.setenv("WORLD_SIZE", value) if value else monkeypatch.delenv("WORLD_SIZE", raising=False)
        with joined("cpu") as ranks:
            assert ranks == Ranks() and ranks.first and ranks.rows(8) == slice(0, 8)
    assert not torch.distributed.is_initialized()


def test_half_a_launcher_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        ValueError, match="WORLD_SIZE is 2, but LOCAL_RANK is not set; start several ranks with torchrun"
    ):
        with joined("cpu"):
            pass


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks().device("cuda:1") == "cuda:1" and Ranks(0, 2).device("cpu") == "cpu"
    assert [Ranks(5, 8, local).device("cuda") for local in (0, 1)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match='is one GPU, but there are 2 ranks; write device = "cuda"'):
        Ranks(1, 2, 1).device("cuda:0")
    with pytest.raises(ValueError, match="has 2 GPUs and more ranks than that"):
        Ranks(2, 3, 2).device("cuda")


def test_alone_an_error_passes_unchanged():
    error = TrainingError("a sentence")
    with pytest.raises(TrainingError) as caught, Ranks().together():
        raise error
    assert caught.value is error
