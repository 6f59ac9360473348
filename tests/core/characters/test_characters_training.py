"""The whole chain in miniature: judge, encoders, base, adapters and a sweep, a few steps each on eight characters."""

from __future__ import annotations

import dataclasses

import eight_characters
import pytest
import torch

from flexip_core.characters import (
    base,
    drawings,
    encoders,
    files,
    judge,
    lines,
    runs,
    scenes,
    scores,
    sweep,
    task,
    words,
)
from flexip_core.characters.architecture import UNET
from flexip_core.characters.codec import Codec
from flexip_core.characters.render import render
from flexip_core.characters.run import Plan, Run, average_of, state_of
from flexip_core.encoders.towers import load_tower
from flexip_core.training.loop import Trainer

BATCH = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def small_unet():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(UNET, "block_out_channels", (32, 32, 32))
        yield


@pytest.fixture(scope="module")
def layers() -> drawings.Drawings:
    return drawings.load(eight_characters.FILE)


@pytest.fixture(scope="module")
def codec(layers) -> Codec:
    return Codec.learned(render(layers, scenes.stage(scenes.characters(64, generator(0)), generator(1))))


@pytest.fixture(scope="module")
def home(tmp_path_factory, layers, codec):
    """A folder as scripts/characters.py fills it, with models that have hardly been trained."""
    folder = tmp_path_factory.mktemp("home")
    drawings.save(layers, folder / files.DRAWINGS)
    files.save(codec.state_dict(), folder / files.CODEC)
    files.save(judge.Judge().state_dict(), folder / files.JUDGE)
    files.save(base.new_generator(1).state_dict(), folder / files.BASE)
    task.save_contrast(dict(encoders.untrained(2).state_dict()), folder)
    pictures = render(layers, scenes.stage(scenes.characters(64, generator(2)), generator(3)))
    files.save(encoders.make_dino(pictures).model.state_dict(), folder / files.DINO_FILE)
    return folder


def plan(name: str, steps: int) -> Plan:
    return Plan(name, steps, BATCH, rate=1e-3, seed=3, warm=1)


def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, layers, codec):
    def run() -> Run:
        return Run(plan("base", 3), base.new_generator(0), base.BaseLoss(layers, codec, BATCH))

    whole = run()
    list(whole.until_done(tmp_path / "whole"))
    next(run().until_done(tmp_path / "parts", save_every=1))  # one step, then the end of the process
    resumed = run()
    assert list(resumed.until_done(tmp_path / "parts", save_every=1)) == [2, 3]
    assert all(torch.equal(value, resumed.average[name]) for name, value in whole.average.items())
    assert state_of(tmp_path / "parts")["done"] == 3
    assert all(torch.equal(value, whole.average[name]) for name, value in average_of(tmp_path / "parts").items())
    other = Run(plan("base", 4), base.new_generator(0), base.BaseLoss(layers, codec, BATCH))
    with pytest.raises(ValueError, match="belongs to another training"):
        other.load(tmp_path / "parts")


def test_the_rate_rises_stays_and_falls():
    some = Plan("any", 100, 1, rate=2.0, seed=0, warm=10, falling=0.5)
    assert some.rate_at(0) == pytest.approx(0.2)
    assert some.rate_at(9) == some.rate_at(49) == 2.0
    assert some.rate_at(75) == pytest.approx(1.0)
    assert some.rate_at(99) == pytest.approx(0.04)


def test_the_base_learns(layers, codec):
    run = Run(plan("base", 30), base.new_generator(0), base.BaseLoss(layers, codec, BATCH))
    losses = [run.step() for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_judge_learns_and_hidden_parts_do_not_count(layers):
    torch.manual_seed(0)
    run = Run(plan("judge", 30), judge.Judge(), judge.JudgeLoss(layers, BATCH))
    losses = [run.step() for _ in range(12)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    people = eight_characters.people()
    inked = scenes.stage(people, generator(4)).but(style=torch.full((8,), words.STYLES.index("ink")))
    tells = judge.visible(layers, inked)
    assert not tells["skin"].any() and not tells["clothes"].any() and tells["hair"].all()
    comic = inked.but(style=torch.zeros(8, dtype=torch.long))
    bald = people["hair"] == words.HAIR.index("noHair1")
    assert judge.visible(layers, comic)["hair colour"].equal(~bald)  # the bald one has no beard


def test_a_judge_that_is_right_finds_all_parts_and_one_that_is_wrong_none(layers):
    shown = scenes.stage(eight_characters.people(), generator(5), own_style=1.0)
    tells = judge.visible(layers, shown)

    def shares(shift: int) -> dict[str, float]:
        verdict = {
            slot: torch.nn.functional.one_hot(
                (shown[slot] + shift) % len(words.WORDS[slot]), len(words.WORDS[slot])
            ).float()
            for slot in judge.READ
        }
        return judge.shares(judge.agreement(verdict, shown, tells))

    assert set(shares(0).values()) == {1.0}
    assert set(shares(1).values()) == {0.0}


def test_dropped_captions_lose_words_identity_at_once_and_all_of_them():
    captions = base.dropped(torch.ones(4000, len(words.SLOTS), dtype=torch.long), generator(6))
    identity = captions[:, -len(words.IDENTITY) :]
    assert 0.08 < (captions == 0).all(1).float().mean() < 0.12
    assert 0.29 < (identity == 0).all(1).float().mean() < 0.36  # 1 - 0.9 * 0.75, and a few by chance


def test_encoders_load_from_their_files_and_give_the_same_features(home):
    clip = task.load_contrast(home)
    pictures = torch.rand(2, 3, 64, 64, generator=generator(7)) * 2 - 1
    tower = load_tower(encoders.CLIP, home / files.CLIP_FILE)
    assert torch.equal(
        tower(encoders.pixels_for(tower, pictures)), clip.tower(encoders.pixels_for(clip.tower, pictures))
    )
    shown = encoders.enlarge(pictures)
    assert shown.shape == (2, 128, 128, 3) and torch.allclose(encoders.shrink(shown), pictures, atol=1e-6)


def test_patch_tokens_of_the_dino_stand_in_tell_their_pixels_and_their_place(home, layers):
    tower = load_tower(encoders.DINO, home / files.DINO_FILE)
    pictures = render(layers, scenes.stage(scenes.characters(64, generator(2)), generator(3)))
    tokens = tower(encoders.pixels_for(tower, pictures)).flatten(0, 1)
    pixels = torch.nn.functional.unfold(pictures, 8, stride=8).transpose(1, 2).flatten(0, 1)
    inputs = torch.cat([tokens, torch.ones(len(tokens), 1)], 1).double()
    fit = torch.linalg.lstsq(inputs, pixels.double(), driver="gelsd").solution
    assert (inputs @ fit - pixels).square().mean() < 0.02 * pixels.var()
    flat = tower(encoders.pixels_for(tower, torch.full((1, 3, 64, 64), 0.2)))[0]
    assert torch.cdist(flat, flat)[~torch.eye(64, dtype=torch.bool)].min() > 0.1


def test_pairs_show_one_character_twice_and_no_identity_word_is_kept(layers):
    pairs = task.CharacterPairs(layers)
    batch = pairs.batch(torch.tensor([0, 1, 0, 1]), generator(9))
    same = (batch.targets == batch.references).flatten(1).all(1)
    assert same.tolist() == [True, False, True, False]
    part = pairs.batch(torch.tensor([0, 1, 0, 1]), generator(9), slice(1, 3))
    assert torch.equal(part.targets, batch.targets[1:3]) and torch.equal(part.captions, batch.captions[1:3])
    assert all(runs.DROPPED[slot] == 1 for slot in words.IDENTITY)


def test_adapters_train_and_a_sweep_reads_them(home):
    cfg = dataclasses.replace(runs.config("outputs-jitter", 1, home, steps=2), batch=4)
    pack = task.make("cpu", str(home))
    trainer = Trainer(cfg, *pack)
    assert trainer.run()
    tools = task.load_instruments(home, "cpu")
    setup = scores.Setup(cases=2, gates=(0.0, 1.0), steps=2)
    swept = {mode: sweep.gate_sweep(pack.base, trainer.average, mode, tools, setup) for mode in ("named", "open")}
    assert not torch.equal(swept["named"].pictures[0], swept["named"].pictures[1])  # the gate does something
    found = {mode: sweep.summary(one) for mode, one in swept.items()}
    found["controls"] = sweep.controls(pack.base, trainer.average, tools, setup)
    found["base"] = {"untold": {**dict.fromkeys(words.STAGING, 0.5), "parts": 0.2}}
    assert not any(outcome.passed for outcome in lines.outcomes(found)[:3])  # nothing is learned in two steps


def test_prompts_of_a_sweep_name_what_the_reference_does_not_show(layers):
    setup = scores.Setup(cases=32)
    named, opened = (scores.tests_for(setup, mode, layers) for mode in ("named", "open"))
    for slot in ("expression", "clothes", "ground", "pattern", "place"):
        assert (named.wanted[slot] != named.seen[slot]).all()
    assert all(torch.equal(named.wanted[part], named.seen[part]) for part in words.IDENTITY)
    assert (named.captions[:, -len(words.IDENTITY) :] == 0).all()
    assert words.in_words(opened.captions[0]) == "a person"
    styled = scores.tests_for(setup, "styled", layers)
    assert (styled.wanted["style"] != styled.seen["style"]).all()


def test_unknown_runs_and_missing_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="There is no run 'outputs-wide'"):
        runs.config("outputs-wide", 1, tmp_path)
    with pytest.raises(ValueError, match="holds no finished run"):
        runs.adapters_file(tmp_path, "ip", 1)
    with pytest.raises(ValueError, match="There is no .*judge.safetensors yet"):
        files.load(judge.Judge(), tmp_path / files.JUDGE)


def test_the_ip_adapter_is_of_equal_size(home):
    world, pairs = task.make("cpu", str(home))[:2]
    sizes = {
        name: sum(p.numel() for p in Trainer(runs.config(name, 1, home), world, pairs).parameters.values())
        for name in ("outputs-jitter", runs.BASELINE)
    }
    assert sizes[runs.BASELINE] == pytest.approx(sizes["outputs-jitter"], rel=0.1)
