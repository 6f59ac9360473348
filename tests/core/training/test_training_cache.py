"""What is kept equals what the encoders say, stays valid exactly as long as its sources do, and trains without encoders."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
import training_fakes as fakes
import training_folders as made
from hypothesis import given, settings
from hypothesis import strategies as st

from flexip_core.training import entries as entries_module
from flexip_core.training.base import Text
from flexip_core.training.cache import fill, subsets
from flexip_core.training.cached import CachedBase, CachedSource, cached
from flexip_core.training.config import DropoutConfig
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.dataset import scan
from flexip_core.training.entries import ENTRIES, Entries, file_identity
from flexip_core.training.loop import Trainer
from flexip_core.training.pictures import reference, target
from flexip_core.training.sources import make_source

SIZE = 16
IDENTITY = {name: f"hash of {name}" for name in ENTRIES}
KINDS = torch.tensor([VARIANT, INVARIANT] * 8)


class WordBase(fakes.PhraseBase):
    """Texts in phrases; counts what it encodes; can be forbidden to encode."""

    def __init__(self, pooled=False, **unet):
        super().__init__(**unet)
        self.counts, self.allowed, self.pooled, self.released = dict.fromkeys(ENTRIES, 0), True, pooled, 0

    def _count(self, entry, n):
        assert self.allowed, f"{entry} must not be encoded"
        self.counts[entry] += n

    def encode_text(self, captions):
        self._count("text", len(captions))
        tokens = super().encode_text(captions).tokens
        return Text(tokens, tokens.mean(1)[:, :7] if self.pooled else None)

    def to_latents(self, pictures):
        self._count("latents", len(pictures))
        return super().to_latents(pictures)

    def features(self, references):
        self._count("cls", len(references))
        return super().features(references)

    def release(self):
        self.released += 1


def filled(tmp_path, **arguments):
    base = WordBase()
    root = made.small_set(tmp_path / "data")
    return base, root, fill(base, root, SIZE, tmp_path / "cache", IDENTITY, **arguments)


def again(root, tmp_path, identity=IDENTITY, **arguments):
    """What a second run encodes."""
    base = WordBase()
    result = fill(base, root, SIZE, tmp_path / "cache", identity, **arguments)
    return result.computed


def test_too_many_texts_are_not_kept_and_it_is_said_with_the_size(tmp_path):
    _, _, all_ = filled(tmp_path / "all", drop_phrases=True)
    base, root, few = filled(tmp_path / "few", drop_phrases=True, texts=5)
    texts = all_.computed - few.computed
    assert few.left_out == texts > 5 and few.bytes < all_.bytes and not all_.left_out
    assert f"{texts} texts are too many to keep (--texts raises it)" in few.text() and "MB to write" in few.text()
    wrapped, source = cached(WordBase(), root, SIZE, tmp_path / "few" / "cache", IDENTITY)
    assert wrapped.encode_text([("a mug", "in snow")]).tokens.isfinite().all(), "encoded while training"


def test_a_cache_says_how_large_pictures_were_as_their_folder_does(tmp_path):
    root = made.put(
        made.small_set(tmp_path / "data"),
        {"invariant/wide.png": made.noise(3, (2100, 1500)), "invariant/wide.txt": "x"},
    )
    fill(WordBase(), root, SIZE, tmp_path / "cache", IDENTITY)
    folder, kept = make_source(root, SIZE), cached(WordBase(), root, SIZE, tmp_path / "cache", IDENTITY)[1]
    kinds = torch.full((30,), INVARIANT)
    places = {row: set() for row in ("folder", "cache")}
    for name, source in (("folder", folder), ("cache", kept)):
        batch = source.batch(kinds, fakes.generator(0))
        places[name] = {(*caption, *size) for caption, size in zip(batch.captions, batch.sizes.tolist())}
    assert places["folder"] == places["cache"]
    scaled = round((2100 - 1500) / 2 * SIZE / 1500)
    assert ("x", 1500, 2100, 0, scaled) in places["cache"]


def test_everything_is_encoded_once(tmp_path):
    base, root, result = filled(tmp_path, patches=True)
    assert base.counts["latents"] == 11 + 1, "each picture of train and val, and one to measure"
    texts = 9 + 1  # orange cat's two views share theirs; the empty text is one
    assert result.computed == texts + 11 + base.counts["cls"] - 1
    assert base.released >= 3, "one encoder leaves before the next comes"
    assert again(root, tmp_path, patches=True) == 0
    on_disk = Entries(tmp_path / "cache").bytes()
    assert result.bytes <= on_disk <= result.bytes + 120 * result.computed + 10000, "the size was told rightly"


def test_the_size_is_told_before_anything_is_written_and_may_be_refused(tmp_path):
    told = []
    _, _, result = filled(tmp_path, on_start=lambda about: told.append(about) or False)
    assert told == [result] and result.bytes > 0 and "to encode" in result.text()
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 100))
    with pytest.raises(RuntimeError, match="0 MB are free; make room"):
        filled(tmp_path)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_what_is_kept_is_what_the_encoders_say(tmp_path):
    base, root, _ = filled(tmp_path, patches=True)
    wrapped, source = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    batch = source.batch(KINDS, fakes.generator(3))
    assert source.patches and set(batch.references) == {"cls", "patches"}
    latents, features = wrapped.to_latents(batch.targets), wrapped.features(batch.references)
    assert latents.dtype == features["cls"].dtype == features["patches"].dtype == torch.float32

    load = make_source(root, SIZE).load
    views = [view for _, view in source.data.views()]
    every_target = base.to_latents(torch.stack([target(load(view), SIZE) for view in views]))
    every_cut = {cut for cuts in source._cuts.values() for cut in cuts}
    every_reference = base.features(torch.stack([reference(load(v), cut, SIZE) for v in views for cut in every_cut]))
    for row, caption in enumerate(batch.captions):
        shown = [i for i, view in enumerate(views) if source.data.caption(view) == ", ".join(caption)]
        assert (every_target[shown] - latents[row]).abs().flatten(1).amax(1).min() < 1e-3
        cls = (every_reference["cls"] - features["cls"][row]).abs().amax(1)
        patches = (every_reference["patches"] - features["patches"][row]).abs().amax((1, 2))
        assert ((cls < 2e-2) & (patches < 2e-3)).any(), "both are of one view, cut in one way"
    text = wrapped.encode_text(batch.captions).tokens
    torch.testing.assert_close(text, base.encode_text(batch.captions).tokens, atol=2e-3, rtol=1e-3)


def test_variant_references_are_another_view_and_invariant_ones_the_target(tmp_path):
    base = WordBase()
    root = made.put(
        tmp_path / "data",
        {f"variant/s{s}/{v}.png": made.flat((40 * s, 60 * v, 0)) for s in range(3) for v in range(2)}
        | {f"variant/s{s}/{v}.txt": f"{s} {v}" for s in range(3) for v in range(2)},
    )
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY, patches=True)
    wrapped, source = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    batch = source.batch(KINDS, fakes.generator(0))
    latents = wrapped.to_latents(batch.targets).mean((2, 3))[:, [0, 4]]  # red and green of FakeBase's latents
    patches = wrapped.features(batch.references)["patches"].mean(1)[:, [0, 16]]
    same_subject = (latents[:, 0] - patches[:, 0]).abs() < 0.01
    same_view = (latents[:, 1] - patches[:, 1]).abs() < 0.01
    assert same_subject.all() and torch.equal(same_view, KINDS == INVARIANT)
    for caption, latent in zip(batch.captions, latents):
        assert caption == (
            f"{round((latent[0].item() + 1) * 127.5 / 40)} {round((latent[1].item() + 1) * 127.5 / 60)}",
        )


def test_batches_are_functions_of_their_generator_and_split_by_rows(tmp_path):
    _, root, _ = filled(tmp_path)
    one, other = (CachedSource(scan(root), SIZE, tmp_path / "cache", IDENTITY) for _ in range(2))
    a, b = one.batch(KINDS, fakes.generator(1)), other.batch(KINDS, fakes.generator(1))
    half = other.batch(KINDS, fakes.generator(1), slice(1, None, 2))
    assert torch.equal(a.targets, b.targets) and torch.equal(a.references["cls"], b.references["cls"])
    assert torch.equal(half.targets, a.targets[1::2]) and torch.equal(half.references["cls"], a.references["cls"][1::2])
    assert not torch.equal(a.targets, one.batch(KINDS, fakes.generator(2)).targets)


# --- validity

CHANGES = {
    # what changes -> how many of (texts, latents, references) are computed anew; references of fixed cuts vary with the mask
    "nothing": lambda root: None,
    "caption": lambda root: made.put(root, {"invariant/hill.txt": "a green hill"}),
    "class": lambda root: made.put(root, {"variant/orange cat.2/class.txt": "red cat"}),
    "picture": lambda root: made.put(root, {"invariant/hill.jpg": made.noise(99)}),
    "mask": lambda root: made.put(root, {"invariant/tree.mask.png": made.box_mask((1, 1, 9, 30))}),
    "new picture": lambda root: made.put(root, {"variant/mug/d.png": made.noise(98)}),
    "renamed": lambda root: (
        (root / "invariant/hill.jpg").rename(root / "invariant/mount.jpg")
        and (root / "invariant/hill.txt").rename(root / "invariant/mount.txt")
    ),
    "touched": lambda root: [os.utime(p, (5, 5)) for p in root.rglob("*.png")],
    "dataset.toml": lambda root: made.put(root, {"dataset.toml": "min_frame_gap = 3"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_only_its_own_entries_anew(tmp_path, change):
    _, root, _ = filled(tmp_path, patches=True)
    CHANGES[change](root)
    base = WordBase()
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY, patches=True, batch=1)
    computed = {name: max(0, count - 1) for name, count in base.counts.items()}  # one of each is measured first
    expected = {
        "caption": (1, 0, 0),
        "class": (1, 0, 0),
        "picture": (0, 1, 3),  # whole and two parts
        "mask": (0, 1, 4),
        "new picture": (0, 1, 1),  # without a mask it is shown whole
    }.get(change, (0, 0, 0))
    assert (computed["text"], computed["latents"], computed["cls"]) == expected
    CachedSource(scan(root), SIZE, tmp_path / "cache", IDENTITY)


@pytest.mark.parametrize(
    "entry, expected", [("text", "text"), ("latents", "latents"), ("cls", "cls"), ("patches", "cls")]
)
def test_another_encoder_makes_only_its_entries_anew(tmp_path, entry, expected):
    _, root, _ = filled(tmp_path, patches=True)
    base = WordBase()
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY | {entry: "another"}, patches=True)
    assert [name for name, count in base.counts.items() if count] == [expected]
    assert again(root, tmp_path, patches=True) == 0, "the first encoder's entries are still there"


def test_another_size_needs_other_entries_and_says_so(tmp_path):
    _, root, _ = filled(tmp_path)
    with pytest.raises(ValueError, match="8 of 8 pictures are new or changed .* run `cache` again"):
        make_source(root, 24, cache=tmp_path / "cache", identity=IDENTITY)
    with pytest.raises(ValueError, match="or its encoders or size were others"):
        make_source(root, SIZE, cache=tmp_path / "cache", identity=IDENTITY | {"cls": "other"})
    with pytest.raises(ValueError, match="identity lacks latents"):
        make_source(root, SIZE, cache=tmp_path / "cache")
    made.put(root, {"invariant/hill.jpg": made.noise(97)})
    with pytest.raises(ValueError, match="1 of 8 pictures are new or changed .*such as invariant/hill.jpg"):
        make_source(root, SIZE, cache=tmp_path / "cache", identity=IDENTITY)


STEPS = st.lists(st.sampled_from(sorted(CHANGES)), max_size=4)


# each fills several caches
@settings(max_examples=8)
@given(STEPS)
def test_after_any_changes_the_cache_equals_a_new_one(tmp_path_factory, steps):
    tmp_path = tmp_path_factory.mktemp("cache")
    base, root, _ = filled(tmp_path)
    for step in steps:
        if step != "renamed" or (root / "invariant/hill.jpg").exists():
            CHANGES[step](root)
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY)
    fill(base, root, SIZE, tmp_path / "new", IDENTITY)
    a, b = (CachedSource(scan(root), SIZE, tmp_path / name, IDENTITY) for name in ("cache", "new"))
    one, other = a.batch(KINDS, fakes.generator(1)), b.batch(KINDS, fakes.generator(1))
    assert torch.equal(one.targets, other.targets) and torch.equal(one.references["cls"], other.references["cls"])
    assert again(root, tmp_path) == 0


def test_adding_an_entry_looks_at_no_other_one(tmp_path, monkeypatch):
    looked = []

    class Pending(dict):
        def __iter__(self):
            return (looked.append(name) or name for name in super().__iter__())

        def values(self):
            return [self[name] for name in self]

        def items(self):
            return [(name, self[name]) for name in self]

    entries = Entries(tmp_path)
    entries._new = Pending()
    for number in range(50):
        entries.add(str(number), torch.zeros(10))
    assert looked == []
    assert len(list(entries._new.values())) == len(looked) == 50, "looking is seen"


def test_a_shard_is_written_as_soon_as_its_size_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(entries_module, "SHARD_BYTES", 100)
    entries = Entries(tmp_path)
    for name in ("a", "a", "a", "b", "c", "d", "d"):  # 20 bytes each; the same name takes its room once
        entries.add(name, torch.zeros(10))
    assert not list(tmp_path.iterdir()) and set(entries._new) == set("abcd")
    entries.add("e", torch.zeros(10))
    assert len(list(tmp_path.iterdir())) == 1 and not entries._new
    for name in "fghi":
        entries.add(name, torch.zeros(10))
    assert len(list(tmp_path.iterdir())) == 1, "counting begins again"
    entries.add("j", torch.zeros(10))
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(entries_module, "SHARD_BYTES", 4000)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > 14:
            raise Stop

    with pytest.raises(Stop):
        filled(tmp_path, batch=2, on_progress=stop)
    shards = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(shards) > 1 and not list((tmp_path / "cache").glob("*.tmp"))
    kept = sum(not name.endswith(".place") for name in Entries(tmp_path / "cache")._shard_of)
    assert kept > 10
    base = WordBase()
    result = fill(base, tmp_path / "data", SIZE, tmp_path / "cache", IDENTITY)
    assert result.kept >= kept and 0 < result.computed
    CachedSource(scan(tmp_path / "data"), SIZE, tmp_path / "cache", IDENTITY)


def test_a_damaged_shard_is_named(tmp_path):
    filled(tmp_path)
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{shard.name} in .* is damaged; delete it"):
        Entries(tmp_path / "cache")


def test_values_beyond_half_precision_are_refused(tmp_path):
    entries = Entries(tmp_path)
    with pytest.raises(RuntimeError, match="beyond half precision"):
        entries.add("x", torch.tensor([1e6]))


def test_files_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    files = made.put(tmp_path / "models", {"base": b"1", "clip": b"2", "dino": b"3"})
    paths = [files / name for name in ("base", "clip", "dino")]
    first = file_identity(*paths, tmp_path / "cache")
    assert first["latents"] == first["text"] != first["cls"] != first["patches"] and set(first) == set(ENTRIES)
    monkeypatch.setattr(entries_module, "_hash", lambda path: "hashed " + path.name)
    assert file_identity(*paths, tmp_path / "cache") == first
    (files / "clip").write_bytes(b"22")
    assert file_identity(*paths, tmp_path / "cache") == first | {"cls": "hashed clip"}
    json.loads((tmp_path / "cache/files.json").read_text())
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        file_identity(files / "nowhere", *paths[1:], tmp_path / "cache")


# --- texts


def test_what_dropout_leaves_of_captions_is_kept_if_asked(tmp_path):
    base, root, _ = filled(tmp_path, drop_phrases=True)
    wrapped, _ = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    base.allowed = False
    for caption in [("a mug", "in snow"), ("in snow",), ("a mug",), (), ("a hill",)]:
        got = wrapped.encode_text([caption])
        base.allowed = True
        torch.testing.assert_close(got.tokens, base.encode_text([caption]).tokens, atol=2e-3, rtol=1e-3)
        base.allowed = False
    assert got.pooled is None


def test_texts_that_are_not_kept_are_encoded_on_the_spot_and_told_once(tmp_path, caplog):
    base, root, _ = filled(tmp_path)
    wrapped, _ = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    with caplog.at_level("INFO"):
        for _ in range(2):
            got = wrapped.encode_text([("a mug", "in snow"), ("in snow",)])
    assert torch.equal(got.tokens, base.encode_text([("a mug", "in snow"), ("in snow",)]).tokens)
    assert caplog.text.count("encoded while training") == 1


def test_pooled_texts_are_kept_too(tmp_path):
    base, root = WordBase(pooled=True), made.small_set(tmp_path / "data")
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY)
    wrapped, _ = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    base.allowed = False
    got = wrapped.encode_text([("a hill",), ()])
    base.allowed = True
    wanted = base.encode_text([("a hill",), ()])
    torch.testing.assert_close(got.pooled, wanted.pooled, atol=2e-3, rtol=1e-3)


def test_long_captions_are_counted_instead_of_kept_in_all_parts(tmp_path):
    assert len(subsets(("a", "b", "c", "d"))) == 16 and subsets(tuple("abcde")) == [tuple("abcde")]
    assert set(subsets(("a", "b"))) == {("a", "b"), ("a",), ("b",), ()}
    root = made.put(made.small_set(tmp_path / "data"), {"invariant/hill.txt": "a, b, c, d, e"})
    result = fill(WordBase(), root, SIZE, tmp_path / "cache", IDENTITY, drop_phrases=True)
    assert result.long_captions == 1 and "1 captions have more than 4 phrases" in result.text()


# --- training


def test_training_needs_no_encoder_and_comes_close_to_training_with_them(tmp_path):
    base, root, _ = filled(tmp_path, patches=True, drop_phrases=True, cuts=2)
    wrapped, source = cached(base, root, SIZE, tmp_path / "cache", IDENTITY, cuts=2)
    base.allowed = False
    cfg = fakes.config(tmp_path / "run", steps=3, dropout=DropoutConfig(phrase=0.3))
    trainer = Trainer(cfg, wrapped, source)
    assert trainer.run()
    base.allowed = True
    batch = source.batch(KINDS, fakes.generator(0))
    torch.testing.assert_close(
        wrapped.to_pictures(wrapped.to_latents(batch.targets)).shape, torch.Size([16, 3, 16, 16])
    )


def test_without_kept_patches_only_the_pictures_of_references_are_decoded(tmp_path):
    base, root, _ = filled(tmp_path)
    wrapped, source = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    batch = source.batch(KINDS, fakes.generator(0))
    assert not source.patches and batch.references["pictures"].shape == (16, 3, SIZE, SIZE)
    features = wrapped.features(batch.references)
    direct = fakes.FakeBase.features(base, batch.references["pictures"])
    assert torch.equal(features["patches"], direct["patches"]), "by the encoder, at full precision"
    torch.testing.assert_close(features["cls"], direct["cls"], atol=2e-2, rtol=2e-3)
    base.patches = lambda pictures: "by DINO alone"
    assert wrapped.features(batch.references)["patches"] == "by DINO alone"
    assert Trainer(
        fakes.config(tmp_path / "run", steps=1), CachedBase(WordBase(), source.entries, IDENTITY), source
    ).run()


def test_a_cached_base_is_the_base_for_everything_else(tmp_path):
    base, root, _ = filled(tmp_path)
    wrapped, _ = cached(base, root, SIZE, tmp_path / "cache", IDENTITY)
    picture = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    assert torch.equal(wrapped.to_latents(picture), base.to_latents(picture))
    assert torch.equal(wrapped.features(picture)["cls"], base.features(picture)["cls"])
    assert wrapped.unet is base.unet and wrapped.clip == base.clip


def test_shards_and_clips_are_cached_like_folders(tmp_path):
    from flexip_core.training.shards import pack

    root = made.small_set(tmp_path / "data")
    made.clip(root / "variant/lamp/film.mp4", 40)
    base = WordBase()
    fill(base, root, SIZE, tmp_path / "cache", IDENTITY)
    pack(root, tmp_path / "shards")
    assert again(tmp_path / "shards", tmp_path) == 0, "the same content has the same entries"
    a, b = (CachedSource(scan(d), SIZE, tmp_path / "cache", IDENTITY) for d in (root, tmp_path / "shards"))
    assert torch.equal(a.batch(KINDS, fakes.generator(1)).targets, b.batch(KINDS, fakes.generator(1)).targets)
