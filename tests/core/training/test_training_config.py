"""The training config is read strictly, and what cannot train is refused in one sentence."""

import dataclasses
import json
import sys

import pytest
import training_fakes as fakes

from flexip_core.training.__main__ import main
from flexip_core.training.config import DropoutConfig, GateConfig, TrainConfig, read_config

SMALLEST = """
steps = 10
batch = 4
seed = 0
folder = "run"
"""


def read(tmp_path, text, base=SMALLEST):
    path = tmp_path / "config.toml"
    path.write_text(base + text, encoding="utf-8")
    return read_config(path)


def test_a_toml_file_sets_every_table(tmp_path):
    cfg = read(
        tmp_path,
        """
        mix = 0.25
        [gates]
        invariant = [0.5, 1]
        variant = 0.2
        [dropout]
        image = 0.1
        phrases = { ground = 0.5, hue = 1 }
        [optimizer]
        lr = 1e-3
        betas = [0.9, 0.99]
        [network]
        gate_mode = "tokens"
        resampler = { width = 64, depth = 1, heads = 2, dim_head = 32, ff_mult = 2 }
        [task]
        make = "module:function"
        size = 3
        """,
    )
    assert cfg.gates == GateConfig((0.5, 1.0), (0.2, 0.2)) and cfg.mix == 0.25
    assert cfg.dropout == DropoutConfig(image=0.1, phrases={"ground": 0.5, "hue": 1.0})
    assert cfg.optimizer.lr == 1e-3 and cfg.optimizer.betas == (0.9, 0.99) and cfg.optimizer.clip == 1.0
    assert cfg.network.gate_mode == "tokens" and cfg.network.resampler.width == 64
    assert cfg.train_adapters == ("preservation", "personalization") and cfg.task == {
        "make": "module:function",
        "size": 3,
    }


def test_a_config_survives_json():
    cfg = fakes.config("run", gates=GateConfig((0.5, 1.0), (0.0, 0.5)), dropout=DropoutConfig(phrases={"ground": 0.5}))
    assert TrainConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("name", ["steps", "batch", "seed", "folder"])
def test_a_missing_setting_is_named(tmp_path, name):
    text = "\n".join(line for line in SMALLEST.splitlines() if not line.startswith(name))
    with pytest.raises(ValueError, match=rf"config.toml: the setting {name} is missing"):
        read(tmp_path, "", text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate = 1", "unknown setting learning_rate; a config has steps"),
        ("[optimizer]\nrate = 1", "unknown setting optimizer.rate; optimizer has lr"),
        ("[network.resampler]\nwith = 3", "unknown setting network.resampler.with"),
        ("mix = 'half'", "mix must be a number, got 'half'"),
        ("mix = true", "mix must be a number, got True"),
        ("mix = 1.5", "mix must be a share within 0..1"),
        ("keep = 0", "keep must be a whole number of at least 1"),
        ("log_every = 2.5", "log_every must be a whole number, got 2.5"),
        ("device = 3", "device must be text, got 3"),
        ("gates = 3", "gates must be a table, got 3"),
        ("[gates]\nvariant = [0.5, 0.2]", "gates.variant must be a number or a rising pair"),
        ("[gates]\nvariant = 1.2", "gates.variant must be a number or a rising pair"),
        ("[gates]\nvariant = [0, 0.1, 0.2]", "gates.variant must be a number or a pair of numbers"),
        ("[dropout]\nimage = 0.5\ntext = 0.6", r"dropout.image \+ text \+ both must be at most 1"),
        ("[dropout.phrases]\nhue = -1", "dropout.phrases.hue must be a share"),
        ("[dropout]\nphrases = 0.5", "dropout.phrases must be a table"),
        ("min_snr_gamma = 0", "min_snr_gamma must be above 0"),
        ("loss_weight = 'p2'", "loss_weight must be one of min_snr, none"),
        ("precision = 'fp16'", "precision must be one of fp32, bf16"),
        ("start = 'warm'", "start must be one of text, zero, random"),
        ("train_adapters = ['preservation']\n[network]\ngate_mode = 'tokens'", "train_adapters must name both"),
        ("train_adapters = []", "train_adapters must be one or both"),
        ("train_adapters = ['ip']", "train_adapters must be one of preservation, personalization"),
        ("train_adapters = 'preservation'", "train_adapters must be a list of texts"),
        ("[optimizer]\nlr = 0", "optimizer.lr must be a number above 0"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "optimizer.betas must be two numbers"),
        ("[ema]\ndecay = 1.0", "ema.decay must be a number in 0..1"),
        ("[network]\ngate_mode = 'sum'", "network.gate_mode must be one of outputs, tokens"),
        ("[network]\ndetail_tokens = 0", "network.detail_tokens must be at least 1"),
        ("mix =", "is not a TOML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert str(error.value).startswith("config.toml") and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.toml does not exist"):
        read_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    "changes, adapter",
    [
        (dict(gates=GateConfig((1, 1), (1, 1))), "personalization"),
        (dict(gates=GateConfig((0, 0), (0, 0))), "preservation"),
        (dict(gates=GateConfig((1, 1), (0, 0)), mix=0.0), "personalization"),
        (dict(gates=GateConfig((1, 1), (0, 0)), mix=1.0), "preservation"),
    ],
)
def test_an_adapter_that_no_row_weighs_is_refused(changes, adapter):
    with pytest.raises(ValueError, match=f"the {adapter} adapter the weight 0 in every row"):
        fakes.config("run", **changes)


def test_one_adapter_alone_may_have_the_whole_weight():
    cfg = fakes.config("run", gates=GateConfig((1, 1), (1, 1)), train_adapters=("preservation",))
    assert dataclasses.replace(cfg, mix=1.0).train_adapters == ("preservation",)


FOREIGN = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def make(**options):
    raise SystemExit("called")
"""


@pytest.mark.parametrize(
    "make",
    [
        *(
            "stranger:make",
            "stranger.inner:make",
            "torch.hub:load",
            "subprocess:run",
            "os:system",
            "flexip_core_x:make",
        ),
        *(
            "flexip_core.training.importers:import_data",
            "flexip_core.training.background:subprocess",
            "flexip_core:make",
        ),
    ],
)
def test_a_config_is_no_code_unless_the_command_allows_it(tmp_path, monkeypatch, caplog, make):
    package = tmp_path / "stranger"
    package.mkdir()
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    folder = (tmp_path / "run").as_posix()
    path = tmp_path / "config.toml"
    path.write_text(
        f'steps = 1\nbatch = 1\nseed = 0\nfolder = "{folder}"\n[task]\nmake = "{make}"\nrepo_or_dir = "."\n'
    )
    assert main(["run", str(path)]) == 1
    assert f"make = {make!r} is code outside flexip_core" in caplog.text and "add --allow-code" in caplog.text
    assert not list(package.glob("imported")) and not {"stranger", "stranger.inner"} & set(sys.modules)
    if make == "stranger:make":
        with pytest.raises(SystemExit, match="called"):
            main(["run", str(path), "--allow-code"])
        del sys.modules["stranger"]


@pytest.mark.parametrize("value", ["[" * 3000, "[" * 3000 + "]" * 3000, "9" * 5000, "9" * 30, "-" + "9" * 30])
@pytest.mark.parametrize("name", ["config.toml", "config.json"])
def test_a_config_of_brackets_or_endless_numbers_is_a_sentence(tmp_path, name, value):
    path = tmp_path / name
    path.write_text(f"steps = {value}" if name.endswith("toml") else f'{{"steps": {value}}}')
    with pytest.raises(ValueError, match=f"^{name} is not a .* file: .*") as told:
        read_config(path)
    assert len(str(told.value)) < 200 and "\n" not in str(told.value)
