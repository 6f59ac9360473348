"""FlexIPTrain and FlexIPTrainingStatus without a training process: what they refuse, what they start, what they show."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import pytest
import torch
import training_folders
from flexip_pack.flexip_core.training import background
from flexip_pack.flexip_core.untrained import mini, mini_checkpoints
from flexip_pack.nodes import files, notices, train, training_status
from flexip_pack.nodes.train import RUNS, FlexIPTrain
from flexip_pack.nodes.training_status import FlexIPTrainingStatus
from PIL import Image

INPUTS = {
    "run": "mine",
    "checkpoint": "base.ckpt",
    "clip_vision": "clip.safetensors",
    "dino": "dino.safetensors",
    "data": "pets",
    "steps": 10,
    "batch": 2,
    "size": 64,
    "learning_rate": 1e-3,
    "seed": 7,
}
START = background.start
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # the plot's first two lines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base and tiny encoders."""
    folder = tmp_path_factory.mktemp("models")
    mini_checkpoints.make_base(folder / "base.ckpt", text_layers=(2, 2))
    mini.make_mini_encoders(folder)
    encoders = {"clip.safetensors": mini.MINI_CLIP_FILE, "dino.safetensors": mini.MINI_DINO_FILE}
    return {"base.ckpt": folder / "base.ckpt", **{name: folder / made for name, made in encoders.items()}}


@pytest.fixture
def place(tmp_path, monkeypatch, models):
    """ComfyUI's folders with tiny models, a small data set, and a list of what would have been started."""
    table = dict(folder_paths.folder_names_and_paths)
    for folder, names in {
        "checkpoints": ["base.ckpt"],
        files.ENCODER_FOLDER: ["clip.safetensors", "dino.safetensors"],
        "flexip": [],
    }.items():
        (tmp_path / folder).mkdir()
        table[folder] = ([str(tmp_path / folder)], {".ckpt", ".safetensors"})
        for name in names:
            os.link(models[name], tmp_path / folder / name)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    training_folders.small_set(tmp_path / "input" / "pets")
    started: list = []
    monkeypatch.setattr(background, "start", lambda cfg, export: started.append((cfg, export)))
    return SimpleNamespace(
        root=tmp_path,
        started=started,
        folder=tmp_path / "output" / RUNS / "mine",
        adapters=tmp_path / "flexip" / "mine.safetensors",
    )


def execute(**changes):
    return FlexIPTrain.execute(**{**INPUTS, **changes})


def put_run(place, cfg, step: int, said: str = "", finished: bool = False) -> None:
    """A run's folder as `cfg` left it at `step`."""
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / background.CONFIG).write_text(json.dumps(cfg.to_dict()))
    (place.folder / background.LOG).write_text("".join(json.dumps(line(n)) + "\n" for n in range(1, step + 1)))
    (place.folder / background.OUTPUT).write_text(said)
    if finished:
        (place.folder / background.FINAL).touch()


def line(step: int, variant: float | None = 0.5) -> dict:
    kinds = {"invariant": 1 / step, "variant": variant}
    return {"step": step, "loss": 0.5, "loss_by_kind": kinds, "seconds": 2.0 * step}


# --- what is started


def test_the_inputs_become_a_config_and_the_adapters_go_to_models(place):
    out = execute(gate_mode="tokens", precision="fp32", recompute=False)
    ((cfg, export),) = place.started
    assert (cfg.steps, cfg.batch, cfg.seed, cfg.optimizer.lr) == (10, 2, 7, 1e-3)
    assert (cfg.precision, cfg.recompute, cfg.network.gate_mode, cfg.device) == ("fp32", False, "tokens", "cpu")
    assert cfg.folder == str(place.folder) and export == place.adapters
    assert cfg.task == {
        "make": "flexip_core.training.sd:make",
        "checkpoint": str(place.root / "checkpoints" / "base.ckpt"),
        "clip_vision": str(place.root / files.ENCODER_FOLDER / "clip.safetensors"),
        "dino": str(place.root / files.ENCODER_FOLDER / "dino.safetensors"),
        "data": str(place.root / "input" / "pets"),
        "size": 64,
    }
    assert out.args[0] == "mine" and "2 subjects with 5 views" in out.args[1] and out.ui["text"] == (out.args[1],)


def test_settings_win_and_leave_the_rest(place):
    execute(
        settings="mix = 0.3\nsteps = 99\n[optimizer]\nwarmup = 7\n[dropout.phrases]\nground = 0.5\n[task]\nprobe_steps = 4"
    )
    ((cfg, _),) = place.started
    assert (cfg.mix, cfg.steps, cfg.optimizer.warmup, cfg.dropout.phrases) == (0.3, 99, 7, {"ground": 0.5})
    assert (cfg.optimizer.lr, cfg.batch, cfg.task["size"], cfg.task["probe_steps"]) == (1e-3, 2, 64, 4)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ("mix = ", "the text in settings is not a TOML file"),
        ("colour = 1", "unknown setting colour"),
        ("mix = 2", "mix must be a share"),
        ("optimizer = 3", "optimizer must be a table"),
        ("task = 3", "task must be a table"),
        ('folder = "/tmp/x"', "settings must not hold folder"),
        ('[task]\nmake = "os:system"\ndata = "/"', r"settings must not hold \[task\] make, \[task\] data"),
        ('[task]\ncache = "/etc"\nprobe_cases = 2', r"settings: \[task\] cache must be a folder in ComfyUI's input"),
        ('[task]\ncache = "../x"', r"settings: \[task\] cache must be a folder in ComfyUI's input"),
        ('[task]\nfilter = "x"', r"settings must not hold \[task\] filter;"),
        ("x = " + "[" * 3000, "the text in settings is not a TOML file: it is nested too deeply"),
        ("mix = " + "9" * 5000, "the text in settings is not a TOML file"),
        *(
            (f'[task]\ncache = "{cache}"', "is the folder of the pictures, or one lies inside")
            for cache in (".", "pets", "pets/variant")
        ),
        ("[task]\ndevice = 1", r"unknown setting \[task\] device; training without a cache has"),
        ("[task]\nrun = 1", r"unknown setting \[task\] run"),
        ('[task]\ncache = "kept"\nflip = 0.5', r"unknown setting \[task\] flip; training with a cache has"),
        ("[task]\nprobe_steps = 1000000", r"\[task\] probe_steps must be a whole number from 1 to 1000, got 1000000"),
    ],
)
def test_settings_that_make_no_config_or_lead_elsewhere_are_a_sentence(place, settings, sentence):
    with pytest.raises(ValueError, match=f"FlexIPTrain: .*{sentence}"):
        execute(settings=settings)
    assert not place.started and not place.folder.exists()


# --- what is refused


OUTSIDE = [
    "",
    " ",
    "..",
    "../mine",
    "a/b",
    "a\\b",
    "/tmp/mine",
    "C:mine",
    "nul",
    "COM1.x",
    ".mine",
    "mine.",
    "a\nb",
    "a\0b",
    "m" * 81,
]


@pytest.mark.parametrize("run", OUTSIDE)
def test_a_run_has_a_name_that_leads_nowhere_else(place, run):
    for attempt in (lambda: execute(run=run), lambda: FlexIPTrainingStatus.execute(run, "look")):
        with pytest.raises(ValueError, match="FlexIPTrain.*cannot be the name of a run"):
            attempt()
    assert not place.started


def test_a_name_may_have_spaces_dots_and_any_letters(place):
    execute(run=" Größe 2.b_c-d ")
    ((cfg, export),) = place.started
    assert (
        cfg.folder == str(place.root / "output" / RUNS / "Größe 2.b_c-d") and export.name == "Größe 2.b_c-d.safetensors"
    )


@pytest.mark.parametrize("data", ["nothing", "../input/pets", ".", ""])
def test_data_that_is_not_in_the_input_folder_is_a_sentence_with_what_is_there(place, data):
    (place.root / "input" / "holiday").mkdir()
    with pytest.raises(ValueError, match="FlexIPTrain: there is no training data .* Found: pets."):
        execute(data=data)


def test_only_folders_of_training_data_are_offered(place):
    (place.root / "input" / "holiday").mkdir()
    (place.root / "input" / "picture.png").touch()
    (place.root / "input" / "loose" / "invariant").mkdir(parents=True)
    assert train.data_names() == ["loose", "pets"]


def test_without_any_data_there_is_something_to_choose_and_a_sentence_that_says_what_to_make(place):
    """From an empty list the page sends nothing, and ComfyUI would only say that an input is missing."""
    (place.root / "input" / "pets").rename(place.root / "pets")
    (data,) = [i for i in FlexIPTrain.define_schema().inputs if i.id == "data"]
    assert len(data.options) == 1
    with pytest.raises(ValueError, match="no training data in .*input. A folder there with variant/ or .* Make one"):
        execute(data=data.options[0])


def test_a_missing_input_folder_does_not_take_the_node_along(place, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(place.root / "gone"))
    assert FlexIPTrain.define_schema() and train.data_names() == []


def test_wrong_data_is_not_trained_on_and_all_that_is_wrong_is_said(place):
    training_folders.put(
        place.root / "input" / "pets",
        {"variant/lonely/1.png": training_folders.noise(20), "invariant/broken.jpg": b"no picture"},
    )
    with pytest.raises(ValueError, match="FlexIPTrain: pets cannot be trained on") as error:
        execute()
    assert "variant/lonely has one view" in str(error.value) and "broken.jpg cannot be read" in str(error.value)
    assert not place.started


@pytest.mark.parametrize("name", ["checkpoint", "clip_vision", "dino"])
def test_files_that_are_not_listed_are_refused(place, name):
    with pytest.raises(ValueError, match="FlexIPTrain: there is no file '../secret.ckpt'"):
        execute(**{name: "../secret.ckpt"})


def test_without_diffusers_it_says_what_to_install(place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else find(name, *more)
    )
    with pytest.raises(RuntimeError, match="pip install diffusers"):
        execute()
    with pytest.raises(ValueError, match="no training run"):
        FlexIPTrainingStatus.execute("mine", "look")


def test_a_new_run_does_not_write_over_adapters_of_its_name(place):
    place.adapters.write_bytes(b"mine")
    with pytest.raises(ValueError, match="mine.safetensors .* give the run another name"):
        execute()
    assert not place.started


def test_a_cancel_ends_the_check_of_the_data(place):
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            execute()
    finally:
        mm.interrupt_current_processing(False)
    assert not place.started


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dino": "clip.safetensors"}, "dino: clip.safetensors .*is CLIP .*training needs a DINOv2"),
        ({"clip_vision": "dino.safetensors"}, "clip_vision: dino.safetensors .*is DINOv2 .*training needs a CLIP ViT"),
        ({"checkpoint": "clip.ckpt"}, "clip.ckpt .*is not a Stable Diffusion checkpoint"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused_before_anything_starts(place, models, changes, sentence):
    os.link(models["clip.safetensors"], place.root / "checkpoints" / "clip.ckpt")
    with pytest.raises(ValueError, match=f"FlexIPTrain: {sentence}"):
        execute(**changes)
    assert not place.started and not place.folder.exists()


def test_auto_comes_first_and_finds_each_encoder_by_its_contents(place):
    options = {i.id: i.options for i in FlexIPTrain.define_schema().inputs if i.id in ("clip_vision", "dino")}
    assert [found[0] for found in options.values()] == ["auto", "auto"]
    execute(clip_vision="auto", dino="auto")
    execute()
    (found, _), (chosen, _) = place.started
    assert found.task == chosen.task
    (place.root / files.ENCODER_FOLDER / "dino.safetensors").unlink()
    folder_paths.filename_list_cache.clear()
    with pytest.raises(ValueError, match=r"FlexIPTrain: dino: no file in .* is a DINOv2 .*clip.safetensors \(CLIP"):
        execute(dino="auto")


# --- a run that is there already


@pytest.fixture
def cfg(place):
    execute()
    return place.started.pop()[0]


def test_other_settings_are_refused_and_named(place, cfg, monkeypatch):
    put_run(place, cfg, 3)
    (place.folder / "state_00000003.safetensors").touch()
    monkeypatch.setattr(background, "start", START)
    with pytest.raises(ValueError, match=r"FlexIPTrain: .*begun with other settings \(seed: 7 there, 8 now\)"):
        execute(seed=8)


@pytest.fixture
def others(place, models):
    """A second base, encoder and data folder beside those of the run."""
    (place.root / "checkpoints" / "other.ckpt").symlink_to(models["base.ckpt"])
    (place.root / files.ENCODER_FOLDER / "other.safetensors").symlink_to(models["dino.safetensors"])
    training_folders.small_set(place.root / "input" / "cats")
    folder_paths.filename_list_cache.clear()
    return {"checkpoint": "other.ckpt", "dino": "other.safetensors", "data": "cats", "size": 128}


@pytest.mark.parametrize("name", ["checkpoint", "dino", "data", "size"])
def test_another_base_encoder_data_or_size_is_refused_while_it_runs_and_when_it_is_finished(
    place, cfg, others, monkeypatch, name
):
    """Else the run with the wrong file would go on, and the node would say that all is well."""
    monkeypatch.setattr(background, "start", START)
    put_run(place, cfg, 3)
    with background.locked(place.folder):
        with pytest.raises(
            ValueError, match=rf"FlexIPTrain: .*already being trained, with other settings \(task.{name}: "
        ):
            execute(**{name: others[name]})
    put_run(place, cfg, 10, finished=True)
    place.adapters.touch()
    (place.folder / "state_00000010.safetensors").touch()
    with pytest.raises(ValueError, match=rf"FlexIPTrain: .*begun with other settings \(task.{name}: "):
        execute(**{name: others[name]})


def test_more_pictures_in_the_folder_are_no_other_run(place, cfg):
    put_run(place, cfg, 3)
    training_folders.put(place.root / "input" / "pets", {"invariant/new.png": training_folders.noise(99)})
    with background.locked(place.folder):
        assert "mine is being trained" in execute().args[1]


def test_a_run_that_was_stopped_or_wants_more_steps_goes_on(place, cfg):
    put_run(place, cfg, 3)
    execute()
    put_run(place, cfg, 10, finished=True)
    (place.folder / "state_00000010.safetensors").touch()
    place.adapters.touch()
    execute(steps=20)
    assert [(one.steps, export) for one, export in place.started] == [(10, place.adapters), (20, place.adapters)]


def test_a_finished_run_is_told_and_not_trained_again(place, cfg):
    put_run(place, cfg, 10, finished=True)
    place.adapters.touch()
    assert "is finished, its adapters are in" in execute().args[1] and not place.started
    place.adapters.unlink()
    execute()
    assert place.started, "the adapters are made again where somebody took them away"


def test_a_run_that_is_being_trained_is_told_and_other_settings_are_not_smuggled_in(place, cfg, monkeypatch):
    put_run(place, cfg, 3)
    with background.locked(place.folder):
        assert "mine is being trained" in execute().args[1] and not place.started
        monkeypatch.setattr(background, "start", START)
        with pytest.raises(ValueError, match="is already being trained"):
            execute(batch=5)


# --- what is trained already, and what else is being trained


def test_adapters_stay_when_the_states_of_a_run_are_gone_and_other_settings_come(place, cfg):
    """Whoever deletes states to win space, and then tries another rate under the same name, loses nothing."""
    put_run(place, cfg, 10, finished=True)
    place.adapters.touch()  # as final.safetensors: the run's own
    for changes, sentence in (
        ({"learning_rate": 1e-4}, r"begun with other settings \(optimizer.lr"),
        ({"steps": 20}, "begun with other settings .*no state to go on from"),
    ):
        with pytest.raises(ValueError, match=f"FlexIPTrain: .*{sentence}"):
            execute(**changes)
    (place.folder / background.FINAL).unlink()
    with pytest.raises(ValueError, match="FlexIPTrain: mine.safetensors .* is not from this run"):
        execute(learning_rate=1e-4)
    assert not place.started and place.adapters.read_bytes() == b""


def test_adapters_of_this_name_that_came_from_elsewhere_stay(place, cfg):
    put_run(place, cfg, 10, finished=True)
    place.adapters.write_bytes(b"another's")
    (place.folder / "state_00000010.safetensors").touch()
    with pytest.raises(ValueError, match="FlexIPTrain: mine.safetensors .* is not from this run"):
        execute(steps=20)
    assert not place.started


def test_a_second_run_on_the_device_is_refused_and_one_on_another_device_is_not(place, cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    put_run(place, cfg, 3)
    with background.locked(place.folder):
        with pytest.raises(ValueError, match="FlexIPTrain: The run mine is being trained on cpu.*stop it"):
            execute(run="other")
        execute(run="other", settings='device = "cuda:1"')
    execute(run="other")
    assert [one.device for one, _ in place.started] == ["cuda:1", "cpu"]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ("steps = 1000000000000000000", "steps must be within 1 and 1e"),
        ("batch = 1000000000", "batch must be within 1 and 4096"),
        ("seed = 4294967296", "seed must be within 0 and"),
        ("keep = 21", "keep must be within 1 and 20"),
        ("[optimizer]\nlr = 2", "optimizer.lr must be within"),
        ("[task]\nprobe_cases = 1000", "probe_cases must be a whole number from 0 to 64"),
        ("[task]\nworkers = 1000", "workers must be a whole number from 1 to 64"),
        ("[network]\nresampler = { depth = 65 }", "network.resampler.depth must be within 1 and 64"),
        ("steps = 20000\ncheckpoint_every = 99", "checkpoint_every must be at least 100"),
        ("steps = 200\nprobe_every = 1", "probe_every must be at least 2"),
        ("steps = 10000000\nlog_every = 49", "log_every must be at least 50"),
        ('device = "tpu"', "device must be like cuda:0 or cpu"),
        # each would count as another device, so that one workflow starts any number of processes
        *(
            (f'device = "{name}"', "device must be one of this machine")
            for name in ("cpu:1", "meta", "cuda:99", "xla:7")
        ),
    ],
)
def test_settings_take_no_more_than_the_inputs_could(place, settings, sentence):
    with pytest.raises(ValueError, match=f"FlexIPTrain: .*{sentence}"):
        execute(settings=settings)
    assert not place.started and not place.folder.exists()


def test_who_starts_a_training_is_told_that_it_goes_on_and_how_to_end_it(place):
    out = execute()
    first = out.args[1].split(".\n")[0]
    [report] = out.ui[notices.REPORT]
    assert first == notices.WARNING + report["warnings"][0], "a badge and a notice on the page, too"
    assert "goes on after you close ComfyUI" in first and "Status twice with this run and action stop" in first


def test_the_status_names_the_other_runs(place, cfg):
    put_run(place, cfg, 3)
    for name in ("another", "busy"):
        (place.folder.parent / name).mkdir()
        (place.folder.parent / name / background.CONFIG).write_text(json.dumps(cfg.to_dict()))
    with background.locked(place.folder.parent / "busy"):
        report = FlexIPTrainingStatus.execute("mine", "look").args[0]
    assert report.endswith("Another run: busy, which is being trained.\nAnother run: another.")
    with pytest.raises(ValueError, match="no training run 'my_adapters' .* Runs there: another, busy, mine."):
        FlexIPTrainingStatus.execute("my_adapters", "look")


def test_previews_are_pngs_of_the_folder_itself_and_of_a_size(place, cfg, monkeypatch):
    put_run(place, cfg, 3)
    previews = place.folder / background.PREVIEWS
    previews.mkdir()
    secret = place.root / "secret.png"
    Image.new("RGB", (700, 90), "red").save(secret)
    (previews / "step_000002.png").symlink_to(secret)
    assert FlexIPTrainingStatus.execute("mine", "look").args[2].std() == 0, "a link is no preview"
    bad = previews / "step_000003.png"
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ValueError, match="FlexIPTrainingStatus: the preview step_000003.png is not a PNG"):
        FlexIPTrainingStatus.execute("mine", "look")
    monkeypatch.setattr(training_status, "MOST_PIXELS", 50)
    Image.new("RGB", (10, 6)).save(bad)
    with pytest.raises(ValueError, match="step_000003.png has 10 x 6 pixels"):
        FlexIPTrainingStatus.execute("mine", "look")


@pytest.mark.parametrize("name", ["CONFIG", "LOCK", "OUTPUT", "LOG", "PROCESS", "PREVIEWS", "STOP"])
def test_a_link_in_a_runs_folder_is_not_followed(place, cfg, name):
    """A lock that is taken empties the file that it is."""
    put_run(place, cfg, 3)
    secret, link = place.root / "secret", place.folder / getattr(background, name)
    secret.write_text("secret")
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(ValueError, match=f"FlexIPTrainingStatus: .*{link.name} is a link"):
        FlexIPTrainingStatus.execute("mine", "look")
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("node", [FlexIPTrain, FlexIPTrainingStatus])
def test_queued_again_it_runs_again(node):
    inputs = [i.id for i in node.define_schema().inputs]
    first = node.fingerprint_inputs(**dict.fromkeys(inputs))
    assert node.fingerprint_inputs(**dict.fromkeys(inputs)) >= first and node.fingerprint_inputs() != first


# --- what is shown


@pytest.mark.parametrize("action, sentence", [("look", "no training run 'mine'"), ("stop", "nothing to stop")])
def test_nothing_to_look_at_or_to_stop_is_a_sentence(place, action, sentence):
    with pytest.raises(ValueError, match=f"FlexIPTrainingStatus: .*{sentence}"):
        FlexIPTrainingStatus.execute("mine", action)


def test_a_run_is_shown_with_losses_and_its_newest_preview(place, cfg):
    put_run(place, cfg, 4, "Step 4: loss 1.0.\nCUDA out of memory")
    out = FlexIPTrainingStatus.execute("mine", "look")
    report, losses, preview = out.args
    assert "failed at step 4 of 10" in report and "CUDA out of memory" in report and "variant 0.5000" in report
    assert (
        losses.shape == (1, training_status.PLOT[1], training_status.PLOT[0], 3)
        and preview.shape == losses.shape
        and preview.std() == 0
    )
    assert out.ui["text"] == (report,) and len(out.ui["images"]) == 1, "no placeholder on the node"
    previews = place.folder / background.PREVIEWS
    previews.mkdir()
    for step, colour in ((500, "red"), (1000, "lime")):
        Image.new("P" if step == 500 else "RGB", (700, 90), colour if step == 1000 else 0).save(
            previews / f"step_{step:06d}.png"
        )
    out = FlexIPTrainingStatus.execute(" mine ", "look")
    assert torch.equal(out.args[2], torch.tensor([0.0, 1.0, 0.0]).expand(1, 90, 700, 3))
    assert sizes_of(out) == [training_status.PLOT, (700, 90)], "each fills its own picture"


def sizes_of(out) -> list[tuple[int, int]]:
    temp = Path(folder_paths.get_temp_directory())
    return [Image.open(temp / saved["subfolder"] / saved["filename"]).size for saved in out.ui["images"]]


def test_the_nodes_show_their_reports_on_themselves(place):
    started = execute()
    put_run(place, place.started.pop()[0], 3)
    for out, text in (
        (started, started.args[1]),
        ((looked := FlexIPTrainingStatus.execute("mine", "look")), looked.args[0]),
    ):
        [report] = out.ui[notices.REPORT]
        assert report["line"] in text and report["details"] and out.ui["text"] == (text,)


def test_stopping_asks_and_says_what_comes(place, cfg):
    put_run(place, cfg, 3)
    with background.locked(place.folder):
        assert "queue this node once more" in FlexIPTrainingStatus.execute("mine", "stop").args[0]
        report = FlexIPTrainingStatus.execute("mine", "stop").args[0]
    assert "running at step 3" in report and "asked to stop" in report
    assert (place.folder / background.STOP).exists()


def test_a_workflow_from_elsewhere_that_holds_stop_stops_nothing(place, cfg, monkeypatch):
    """However often its one prompt asks: only a second prompt in a row is somebody's wish."""
    put_run(place, cfg, 3)
    prompts = iter(["one", "one", "two", "three", "four"])
    monkeypatch.setattr(training_status, "_prompt_id", lambda: next(prompts))
    with background.locked(place.folder):
        for action in ("stop", "stop", "look", "stop"):  # a look between them takes the first back
            report = FlexIPTrainingStatus.execute("mine", action).args[0]
            assert ("WARNING: to stop mine, queue this node once more" in report) == (action == "stop")
            prompts = prompts if action == "stop" else iter(["three", "four"])
        assert not (place.folder / background.STOP).exists()
        FlexIPTrainingStatus.execute("mine", "stop")
    assert (place.folder / background.STOP).exists()


def colours(picture: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in (picture[0] * 255).round().int().reshape(-1, 3).unique(dim=0).tolist()}


def test_the_plot_has_a_line_per_kind_that_was_seen():
    both = tuple(line(step, None if step == 2 else 0.1 * step) for step in range(1, 6))
    assert {BLUE, ORANGE} <= colours(training_status.loss_plot(both))
    one = tuple(line(step, None) for step in range(1, 6))
    assert BLUE in colours(training_status.loss_plot(one)) and ORANGE not in colours(training_status.loss_plot(one))
    assert not {BLUE, ORANGE} & colours(training_status.loss_plot(())), "nothing logged yet"
    assert training_status.loss_plot(both[:1]).shape == training_status.loss_plot(()).shape
