"""Shards: what is packed comes back byte by byte, webdataset reads them, and training on them is training on the folder."""

import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
import training_fakes as fakes
import training_folders as made
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexip_core.training import shards
from flexip_core.training.data import INVARIANT, VARIANT
from flexip_core.training.dataset import scan
from flexip_core.training.shard_store import ShardStore
from flexip_core.training.shards import pack, unpack
from flexip_core.training.sources import make_source

KINDS = torch.tensor([VARIANT, INVARIANT] * 8)


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def packed(tmp_path, **arguments):
    root = made.small_set(tmp_path / "data")
    made.put(root, {"dataset.toml": "min_frame_gap = 5\n"})
    return root, pack(root, tmp_path / "shards", **arguments)


def test_what_is_packed_comes_back_byte_by_byte(tmp_path):
    root, written = packed(tmp_path)
    assert [p.name for p in written] == [
        "variant-000000.tar",
        "invariant-000000.tar",
        "val-variant-000000.tar",
        "val-invariant-000000.tar",
    ]
    assert unpack(tmp_path / "shards", tmp_path / "back") == len(files_of(root))
    assert files_of(tmp_path / "back") == files_of(root)


NAMES = st.text("ab .1-é_", min_size=1, max_size=6).filter(lambda s: s.strip(" .") and s == s.strip(" ."))
VIEW = st.tuples(st.sampled_from(["png", "jpg", "JPG"]), st.booleans(), st.booleans())


@settings(max_examples=12)  # each writes, packs and unpacks a folder
@given(
    st.dictionaries(NAMES, st.dictionaries(NAMES, VIEW, min_size=1, max_size=10), min_size=1, max_size=3),
    st.sampled_from([1, 3000, 2**30]),
    st.booleans(),
)
def test_any_folder_survives_packing(tree, shard_bytes, keep_index):
    with tempfile.TemporaryDirectory() as folder:
        root, files = Path(folder), {}
        for i, (subject, views) in enumerate(tree.items()):
            for j, (stem, (extension, caption, mask)) in enumerate(views.items()):
                name = f"variant/{subject}/{stem}"
                files[f"{name}.{extension}"] = b"picture %d %d" % (i, j)
                files |= {f"{name}.txt": f"{i} {j}"} if caption else {}
                files |= {f"{name}.mask.png": b"mask %d" % j} if mask else {}
        made.put(root / "data", files)
        pack(root / "data", root / "shards", shard_bytes)
        if not keep_index:
            for index in (root / "shards").glob("*.index.json"):
                index.unlink()
        unpack(root / "shards", root / "back")
        known = files_of(root / "data")
        assert files_of(root / "back") == known
        for shard in (root / "shards").glob("*.tar"):
            for sample in wds.WebDataset(str(shard), shardshuffle=False):
                about = json.loads(sample["json"])
                assert all(sample[part] == known[name] for part, name in about["files"].items())


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    root, _ = packed(tmp_path)
    shutil.copytree(root, tmp_path / "copy")  # other times
    for path in (tmp_path / "copy").rglob("*"):
        path.touch()
    pack(tmp_path / "copy", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "shards")


def test_webdataset_reads_subjects_as_samples(tmp_path):
    _, written = packed(tmp_path)
    samples = list(wds.WebDataset(str(written[0]), shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == ["0000000-mug", "0000001-orange_cat_2"]
    mug = samples[0]
    assert mug["json"]["kind"] == "variant" and mug["json"]["captions"][0] == "a mug, on a table"
    assert mug["000.png"].size == (64, 48) and mug["000.mask.png"].size == (64, 48) and "002.jpg" in mug
    mixed = wds.RandomMix(
        [wds.WebDataset(str(p), resampled=True, shardshuffle=False, seed=1) for p in written[:2]], probs=[0.5, 0.5]
    )
    kinds = [json.loads(s["json"])["kind"] for s, _ in zip(mixed, range(60))]
    assert 10 < kinds.count("variant") < 50


def test_samples_hold_few_views_and_shards_few_bytes(tmp_path):
    made.put(tmp_path / "data", {f"variant/a/{i:02d}.png": made.noise(i) for i in range(20)})
    written = pack(tmp_path / "data", tmp_path / "shards", shard_bytes=1)
    assert len(written) == 3, "one sample per shard: 8, 8 and 4 views"
    samples = [list(wds.WebDataset(str(p), shardshuffle=False)) for p in written]
    assert [[sum(name.endswith("png") for name in s) for s in shard] for shard in samples] == [[8], [8], [4]]
    assert make_source(tmp_path / "shards", 16).views() == {"a": 20}, "a subject is whole again"


def test_training_on_shards_is_training_on_the_folder(tmp_path):
    root, _ = packed(tmp_path)
    folder, packed_ = make_source(root, 32), make_source(tmp_path / "shards", 32)
    for step in range(3):
        a, b = (s.batch(KINDS, fakes.generator(step)) for s in (folder, packed_))
        assert torch.equal(a.targets, b.targets) and torch.equal(a.references, b.references)
        assert a.captions == b.captions
    assert make_source(tmp_path / "shards", 32, part="val").views() == {"cup": 2}


def test_clips_train_from_shards(tmp_path):
    made.clip(tmp_path / "data/variant/lamp/film.mp4", 40)
    pack(tmp_path / "data", tmp_path / "shards")
    a, b = (make_source(tmp_path / name, 16).batch(KINDS, fakes.generator(1)) for name in ("data", "shards"))
    assert torch.equal(a.targets, b.targets) and torch.equal(a.references, b.references)


def test_the_index_is_only_a_shortcut(tmp_path):
    root, _ = packed(tmp_path)
    known = {n: ShardStore(tmp_path / "shards").open(n).read() for n in ShardStore(tmp_path / "shards").names()}
    index = tmp_path / "shards/variant-000000.index.json"
    for damage in (b"{}", b"not json", index.read_bytes().replace(b'"bytes": ', b'"bytes": 9')):
        index.write_bytes(damage)
        store = ShardStore(tmp_path / "shards")
        assert {n: store.open(n).read() for n in store.names()} == known
    assert known == files_of(root)


def test_an_interrupted_packing_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    root = made.small_set(tmp_path / "data")
    write = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda s, p, x: write(s, p, x) if "val" not in p.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack(root, tmp_path / "shards")
    with pytest.raises(ValueError, match="was interrupted; pack again"):
        make_source(tmp_path / "shards", 16)
    monkeypatch.setattr(shards, "_write_shard", write)
    pack(root, tmp_path / "shards")
    unpack(tmp_path / "shards", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(root)


def test_packing_touches_no_other_files(tmp_path):
    root, _ = packed(tmp_path)
    with pytest.raises(ValueError, match="already holds packed data"):
        pack(root, tmp_path / "shards")
    made.put(tmp_path / "mine", {"thesis.doc": "x"})
    with pytest.raises(ValueError, match="already holds thesis.doc"):
        pack(root, tmp_path / "mine")
    with pytest.raises(ValueError, match="inside the data"):
        pack(root, root / "shards")
    with pytest.raises(ValueError, match="already holds thesis.doc"):
        unpack(tmp_path / "shards", tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {"thesis.doc": b"x"}


def test_unpacking_goes_on_where_it_stopped(tmp_path):
    root, _ = packed(tmp_path)
    made.put(tmp_path / "back", {"variant/mug/a.png": b"cut off"})
    unpack(tmp_path / "shards", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(root)


def test_missing_and_cut_shards_are_named(tmp_path):
    packed(tmp_path)
    shard = tmp_path / "shards/variant-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-600])
    with pytest.raises(
        ValueError, match=f"variant-000000.tar in .* has {len(whole) - 600} bytes instead of {len(whole)}"
    ):
        ShardStore(tmp_path / "shards")
    shard.unlink()
    with pytest.raises(ValueError, match="variant-000000.tar in .* is missing; copy it again"):
        ShardStore(tmp_path / "shards")


def tar_of(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_shards_of_other_makers_are_read(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        {
            "0001/000.png": b"",  # no dot-separated field before it: key 000, field png
            "0002.png": png(made.noise(1)),
            "0002.txt": b"a hill",
            "0002.json": b'{"width": 64}',
            "mug.000.png": png(made.noise(2)),
            "mug.001.png": png(made.noise(3)),
            "mug.001.txt": b"a mug",
        },
    )
    data = scan(tmp_path)
    assert [(g.name, len(g.views)) for g in data.subjects] == [("variant/mug", 2)]
    assert {v.file: data.caption(v) for v in data.loose[0].views}["invariant/0002.png"] == "a hill"
    assert Image.open(data.store.open("invariant/0002.png")).size == (64, 48)


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "variant/../../evil.png", "dataset.toml"])
@pytest.mark.parametrize("where", ["json", "index"])
def test_shards_cannot_write_outside_the_folder(tmp_path, name, where):
    about = {"files": {"png": name if where == "json" else "invariant/x.png"}}
    tar = tmp_path / "shards/a.tar"
    tar_of(tar, {"x.png": b"evil", "x.json": json.dumps(about).encode()})
    if where == "index":
        index = {"format": 1, "bytes": tar.stat().st_size, "files": {name: [512, 4, ""]}}
        (tmp_path / "shards/a.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which leaves the folder"):
        unpack(tmp_path / "shards", tmp_path / "back")
    assert not (tmp_path / "evil.png").exists() and not (tmp_path / "back").exists()


def test_shards_that_contradict_each_other_are_refused(tmp_path):
    for name, content in (("a", b"one"), ("b", b"other")):
        about = {"files": {"png": "invariant/x.png"}}
        tar_of(tmp_path / f"{name}.tar", {"x.png": content, "x.json": json.dumps(about).encode()})
    with pytest.raises(ValueError, match="b.tar and a.tar hold different files called invariant/x.png"):
        ShardStore(tmp_path)
