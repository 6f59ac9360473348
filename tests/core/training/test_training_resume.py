"""Interrupted and resumed equals uninterrupted, bit for bit; states are written whole or not at all and read strictly."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_fakes as fakes
from safetensors.torch import save_file

from flexip_core.files import weights as weight_files
from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.training import __main__ as command
from flexip_core.training.checkpointing import STATE_KEY, state_tensors, states
from flexip_core.training.config import DropoutConfig, GateConfig, OptimizerConfig
from flexip_core.training.loop import BEST, FINAL, LOG, Trainer
from flexip_core.training.optim import lr_at
from flexip_core.training.ranks import TrainingError
from flexip_core.training.stopping import asked_to_stop

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def base():
    return fakes.FakeBase()


def train(base, folder, stop_at=None, resume=False, probe=None, **changes):
    """A trainer of its own each time, as a new process would make one."""
    trainer = Trainer(fakes.config(folder, **changes), base, fakes.pairs(), probe)
    trainer.run(resume, should_stop=lambda: trainer.progress.step == stop_at)
    return trainer


def everything(trainer):
    return state_tensors(trainer.network, trainer.average, trainer.parameters, trainer.optimizer, trainer.meter.sums)


def assert_identical(one, other):
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def log_without_seconds(trainer):
    lines = [json.loads(line) for line in (trainer.folder / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def saved(base, tmp_path, **changes):
    train(base, tmp_path, stop_at=3, **changes)
    return states(tmp_path)[-1]


def rewritten(path, edit_tensors=None, edit_about=None):
    """The state with something else in it."""
    about = json.loads(weight_files.read_header(path).metadata[STATE_KEY])
    tensors = weight_files.read_tensors(path)
    if edit_tensors:
        edit_tensors(tensors)
    if edit_about:
        edit_about(about)
    tensors = {key: value.clone() for key, value in tensors.items()}
    save_file(tensors, path, metadata={STATE_KEY: json.dumps(about)})


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted(base, tmp_path, stop_at):
    def probe(network, step):
        return {"score": float(network.preservation.queries.sum())}

    jitter = dict(gates=GateConfig((0.5, 1.0), (0.0, 0.5)), probe=probe)
    whole = train(base, tmp_path / "whole", **jitter)
    first = train(base, tmp_path / "parts", stop_at=stop_at, **jitter)
    assert first.progress.step == stop_at
    resumed = train(base, tmp_path / "parts", resume=True, **jitter)
    assert_identical(whole, resumed)
    assert {"moment1", "moment2", "count", "average", "weights", "meter"} == {
        k.split(".")[0] for k in everything(whole)
    }
    assert log_without_seconds(whole) == log_without_seconds(resumed)
    ours, theirs = dataclasses.asdict(whole.progress), dataclasses.asdict(resumed.progress)
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    for name in (FINAL, BEST):  # not their bytes: safetensors orders the metadata at random
        left, right = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
        torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


def test_a_process_that_died_is_resumed_from_its_last_state_and_its_log_cut_back(base, tmp_path):
    whole = train(base, tmp_path / "whole", checkpoint_every=2, log_every=1)
    died = Trainer(fakes.config(tmp_path / "died", checkpoint_every=2, log_every=1), base, fakes.pairs())
    died.start()
    for _ in range(5):  # and no farewell
        died.advance()
    with (tmp_path / "died" / LOG).open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = train(base, tmp_path / "died", resume=True, checkpoint_every=2, log_every=1)
    assert_identical(whole, resumed)
    assert log_without_seconds(whole) == log_without_seconds(resumed)


def test_a_run_may_be_made_longer(base, tmp_path):
    constant = OptimizerConfig(lr=1e-2, warmup=2, cosine_from=1.0)
    train(base, tmp_path / "parts", steps=3, optimizer=constant, keep=1)
    longer = train(base, tmp_path / "parts", steps=5, optimizer=constant, keep=3, resume=True)
    assert_identical(train(base, tmp_path / "whole", steps=5, optimizer=constant), longer)


def test_sigterm_saves_ends_with_0_and_the_run_can_go_on(base, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        steps = 1000000
        batch = 4
        seed = 3
        folder = "{(tmp_path / "run").as_posix()}"
        log_every = 1
        checkpoint_every = 1000000
        optimizer = {{ lr = 1e-2, warmup = 2, cosine_from = 1.0 }}
        [network]
        detail_tokens = 3
        semantic_tokens = 2
        cls_tokens = 2
        resampler = {{ width = 16, depth = 1, heads = 2, dim_head = 8, ff_mult = 2 }}
        [task]
        make = "training_fakes:task"
        """
    )
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPO), str(REPO / "tests/fixtures")))}
    arguments = [sys.executable, "-m", "flexip_core.training", "run", str(config), "--allow-code"]
    process = subprocess.Popen(arguments, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not ((tmp_path / "run" / LOG).exists() and (tmp_path / "run" / LOG).stat().st_size):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 0, errors
    (state,) = states(tmp_path / "run")
    done = int(re.findall(r"\d+", state.name)[0])
    assert f"Stopped after step {done}; the state is saved." in errors
    constant = OptimizerConfig(lr=1e-2, warmup=2, cosine_from=1.0)
    resumed = train(base, tmp_path / "run", resume=True, steps=done + 2, optimizer=constant)
    assert_identical(train(base, tmp_path / "whole", steps=done + 2, optimizer=constant), resumed)


# --- writing


def test_a_crash_while_writing_leaves_the_old_state(base, tmp_path, monkeypatch):
    old = saved(base, tmp_path, keep=1)
    before = old.read_bytes()
    trainer = Trainer(fakes.config(tmp_path, keep=1), base, fakes.pairs())
    trainer.resume(old)
    trainer.step()

    def full(file):
        raise OSError("disk full")

    monkeypatch.setattr("flexip_core.files.weights.os.fsync", full)
    with pytest.raises(
        TrainingError, match=r"state_00000004.safetensors could not be written \(disk full\); the states before"
    ):
        trainer.save()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG, old.name]
    assert old.read_bytes() == before
    # a process that is killed cannot clean up
    (tmp_path / "state_00000004.safetensors.123.tmp").write_bytes(b"half a state")
    (tmp_path / "notes.tmp").write_text("somebody's own")
    resumed = train(base, tmp_path, resume=True, keep=1)
    assert_identical(train(base, tmp_path / "whole"), resumed)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]


class Failing:
    """Pairs whose third batch cannot be made."""

    phrases = fakes.PHRASES

    def __init__(self, error):
        self.own, self.error, self.made = fakes.pairs(), error, 0
        self.views, self.pictures = self.own.views, self.own.pictures

    def batch(self, kinds, generator, rows):
        self.made += 1
        if self.made == 3:
            raise self.error
        return self.own.batch(kinds, generator, rows)


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("cat.png cannot be read."), "^cat.png cannot be read.$"),
        (KeyError("a bug"), "a bug"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            r"^Step 3: the device has too little memory .CUDA out of memory",
        ),
    ],
)
def test_whatever_goes_wrong_the_steps_before_it_are_saved(base, tmp_path, error, message):
    trainer = Trainer(fakes.config(tmp_path / "run"), base, Failing(error))
    with pytest.raises((type(error), TrainingError), match=message):
        trainer.run()
    assert [path.name for path in states(tmp_path / "run")] == ["state_00000002.safetensors"]
    resumed = train(base, tmp_path / "run", resume=True)
    assert_identical(train(base, tmp_path / "whole"), resumed)


def test_what_fails_before_the_first_step_or_in_the_middle_of_an_update_leaves_no_state(base, tmp_path, monkeypatch):
    source = Failing(ValueError("cat.png"))
    source.made = 2
    with pytest.raises(ValueError, match="cat.png"):
        Trainer(fakes.config(tmp_path / "first"), base, source).run()
    trainer = Trainer(fakes.config(tmp_path / "middle"), base, fakes.pairs())

    def broken(average, current, decay):
        if trainer.progress.step == 2:
            raise RuntimeError("half an update")

    monkeypatch.setattr("flexip_core.training.loop.update_average", broken)
    with pytest.raises(RuntimeError, match="half an update"):
        trainer.run()
    assert not states(tmp_path / "first") and not states(tmp_path / "middle")


@pytest.fixture
def own_interrupt():
    """Python's own handler: a shell that starts the tests in the background leaves SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_two_sigterms_as_schedulers_send_them_and_two_interrupts_only_ask(own_interrupt):
    with pytest.raises(KeyboardInterrupt), asked_to_stop() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_newest_states_are_kept(base, tmp_path):
    train(base, tmp_path, checkpoint_every=1, keep=2)
    assert [path.name for path in states(tmp_path)] == ["state_00000005.safetensors", "state_00000006.safetensors"]


def test_a_state_has_every_tensor_by_name_and_no_pickle(base, tmp_path):
    path = saved(base, tmp_path)
    header = weight_files.read_header(path)
    keys = set(Trainer(fakes.config(tmp_path), base, fakes.pairs()).network.state_dict())
    parts = ("weights", "average", "moment1", "moment2", "count")
    assert set(header.shapes) == {f"{part}.{key}" for part in parts for key in keys} | {"meter"}
    about = json.loads(header.metadata[STATE_KEY])
    assert about["progress"]["step"] == 3 and about["config"]["seed"] == 3
    assert [
        key for key, value in weight_files.read_tensors(path).items() if key[:6] == "moment" and not value.any()
    ] == []


# --- reading


def resume_from(base, tmp_path, **changes):
    return train(base, tmp_path, resume=True, **changes)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("moment2.preservation.queries"), "1 tensors are missing and 0 unknown .such as moment2.pres"),
        (lambda t: t.update(extra=torch.zeros(1)), "0 tensors are missing and 1 unknown .such as extra"),
        (lambda t: t.update(meter=torch.zeros(3)), r"meter has shape \[3\], this run needs \[2, 2, 4\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(base, tmp_path, edit, message):
    rewritten(saved(base, tmp_path), edit_tensors=edit)
    with pytest.raises(ValueError, match=message):
        resume_from(base, tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a: a.update(format="2"), "has state format '2', this version reads '1'"),
        (lambda a: a.pop("progress"), "its description is incomplete"),
        (lambda a: a.update(more=1), "its description is incomplete"),
        (lambda a: a["progress"].pop("step"), "its progress is not readable"),
        (lambda a: a["config"].update(old_setting=1), "was written with old_setting = 1, the config now says None"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(base, tmp_path, edit, message):
    rewritten(saved(base, tmp_path), edit_about=edit)
    with pytest.raises(ValueError, match=message):
        resume_from(base, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seed=4), "seed = 3, the config now says 4"),
        (dict(start="zero"), "start = 'text', the config now says 'zero'"),
        (dict(train_adapters=("preservation",)), "train_adapters = "),
    ],
)
def test_a_run_goes_on_with_the_settings_it_was_started_with(base, tmp_path, changes, message):
    saved(base, tmp_path)
    with pytest.raises(ValueError, match=message):
        resume_from(base, tmp_path, **changes)


def test_what_may_change_from_a_step_on_is_told_and_acts_from_there(base, tmp_path, caplog):
    """So that what a message advises after a NaN or where memory is short can be done."""
    saved(base, tmp_path / "run")
    changes = dict(
        optimizer=OptimizerConfig(lr=1e-3, warmup=2),
        gates=GateConfig((0.9, 0.9), (0.2, 0.2)),
        dropout=DropoutConfig(image=0.3),
        batch=2,
        mix=0.7,
        precision="bf16",
    )
    with caplog.at_level("INFO"):
        resumed = train(base, tmp_path / "run", resume=True, **changes)
    for line in (
        "From step 4 on optimizer.lr is 0.001; it was 0.01.",
        "From step 4 on gates.invariant is [0.9, 0.9]; it was [0.5, 1.0].",
        "From step 4 on dropout.image is 0.3; it was 0.05.",
        "From step 4 on batch is 2; it was 4.",
        "From step 4 on mix is 0.7; it was 0.5.",
        "From step 4 on precision is bf16; it was fp32.",
    ):
        assert line in caplog.messages
    one = saved(base, tmp_path / "other")
    trainer = Trainer(fakes.config(tmp_path / "other", **changes), base, fakes.pairs())
    trainer.resume(one)
    step = trainer.step()
    assert step.lr == lr_at(3, 6, changes["optimizer"]) and trainer.progress.step == 4
    assert resumed.progress.step == 6


def test_a_state_of_an_older_version_knows_fewer_settings(base, tmp_path):
    rewritten(saved(base, tmp_path), edit_about=lambda about: about["config"].pop("recompute"))
    assert resume_from(base, tmp_path).progress.step == 6


def test_a_run_goes_on_with_the_files_it_was_started_with(base, tmp_path):
    saved(base, tmp_path, task={"dino": "models/small.safetensors", "data": "pets"})
    with pytest.raises(ValueError, match="task.dino = 'models/small.safetensors', the config now says 'models/large"):
        resume_from(base, tmp_path, task={"dino": "models/large.safetensors", "data": "pets"})
    moved = resume_from(base, tmp_path, task={"dino": "elsewhere/small.safetensors", "data": "/disk/pets"})
    assert moved.progress.step == 6


def test_another_base_is_refused(base, tmp_path):
    saved(base, tmp_path)
    other = fakes.FakeBase(widths=(32, 64))
    with pytest.raises(ValueError, match="belongs to another base"):
        resume_from(other, tmp_path)


def test_a_file_that_is_no_state_is_refused(base, tmp_path):
    path = saved(base, tmp_path)
    save_file({"meter": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not the state of a training run"):
        resume_from(base, tmp_path)
    save_file({"meter": torch.zeros(1)}, path, metadata={STATE_KEY: "[1"})
    with pytest.raises(ValueError, match="its description is unreadable"):
        resume_from(base, tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off"):
        resume_from(base, tmp_path)


def test_a_new_run_does_not_write_over_an_old_one(base, tmp_path):
    saved(base, tmp_path)
    with pytest.raises(ValueError, match="already holds a run .state_00000003.safetensors.; resume it with --resume"):
        train(base, tmp_path)


def test_a_resumed_run_that_never_began_begins(base, tmp_path):
    assert train(base, tmp_path, resume=True).progress.step == 6


# --- the command line


def test_export_gives_the_averaged_or_the_last_weights(base, tmp_path):
    trainer = train(base, tmp_path / "run")
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "average.safetensors")]) == 0
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "last.safetensors"), "--last"]) == 0
    for name, network in (("average", trainer.average), ("last", trainer.network)):
        got = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert got.cfg == network.cfg
        torch.testing.assert_close(got.state_dict(), network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "task, message",
    [
        ("", r'lacks \[task\] make = "module:function"'),
        ('task = { make = "nowhere:task" }', "'nowhere:task' does not name a function"),
        ('task = { make = "training_fakes:nothing" }', "'training_fakes:nothing' does not name a function"),
    ],
)
def test_the_command_line_answers_errors_with_a_sentence(tmp_path, caplog, task, message):
    config = tmp_path / "config.toml"
    config.write_text(f'steps = 1\nbatch = 1\nseed = 0\nfolder = "{tmp_path.as_posix()}"\n{task}\n')
    assert command.main(["run", str(config), "--allow-code"]) == 1
    assert re.search(message, caplog.text) and "Traceback" not in caplog.text
    assert command.main(["export", str(tmp_path), "x.safetensors"]) == 1
    assert "holds no training state" in caplog.text


@pytest.mark.parametrize(
    "name, words",
    [
        ("check", ["(default: 512)"]),
        ("import", ["dreambench", "kohya", "ip_adapter"]),
        ("memory", ["[config]", "batch 4, bf16"]),
    ],
)
def test_the_help_of_a_command_names_defaults_and_choices(capsys, name, words):
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    arguments = capsys.readouterr().out
    assert all(word in arguments for word in words)
