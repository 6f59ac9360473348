"""Data, shards and runs that somebody else made, to hurt: one sentence, little memory, no door opened."""

import io
import json
import os
import struct
import tarfile
import threading
import zlib

import pytest
import training_folders as made

from flexip_core.evaluation import run_file
from flexip_core.evaluation.recipe import read_recipe
from flexip_core.measuring import scores_file
from flexip_core.training import sd
from flexip_core.training.check import check
from flexip_core.training.dataset import scan
from flexip_core.training.entries import check_place
from flexip_core.training.importers import import_data
from flexip_core.training.loop import keep_log_up_to
from flexip_core.training.pictures import decode_picture, pixels_of
from flexip_core.training.shard_store import ShardStore
from flexip_core.training.shards import unpack
from flexip_core.training.stores import FOLLOW_LINKS, safe_name

SIZE = 32
SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 127.0.0.1
t=0 0
m=video 45678 RTP/AVP 96
a=rtpmap:96 H264/90000
"""


def sockets():
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return {name for name in found if name.startswith("socket:")}


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open sockets are read as Linux shows them")
@pytest.mark.parametrize("name", ["film.mp4", "film.mov", "film.m4v", "film.webm", "film.mkv", "film.avi"])
def test_texts_that_are_called_clips_open_no_socket_and_no_other_file(tmp_path, name):
    """FFmpeg finds the reader by the contents if it is let: a session description listens on a port, for 20 seconds."""
    made.put(tmp_path, {f"variant/mug/{name}": SDP})
    before, seen, done = sockets(), set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.update(sockets() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(ValueError, match=rf"the clip variant/mug/{name} cannot be read"):
        try:
            scan(tmp_path)
        finally:
            done.set()
            watcher.join()
    assert not seen
    made.clip(tmp_path / "variant/mug/real.mp4")
    lists = "ffconcat version 1.0\nfile real.mp4\n"  # the reader of lists opens what they name
    made.put(tmp_path, {f"variant/mug/{name}": lists})
    with pytest.raises(ValueError, match=rf"the clip variant/mug/{name} cannot be read"):
        scan(tmp_path)


def false_avi(path, frames):
    """A film of 12 frames whose headers tell of `frames`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    for chunk, place in ((b"avih", 24), (b"strh", 40)):
        begin = data.index(chunk) + place
        data[begin : begin + 4] = frames.to_bytes(4, "little")
    path.write_bytes(data)


def test_a_clip_has_no_more_frames_than_bytes(tmp_path):
    folder = tmp_path / "variant/mug"
    folder.mkdir(parents=True)
    false_avi(folder / "film.avi", 2_000_000_000)
    with pytest.raises(ValueError, match="2000000000 frames, which its .* bytes cannot hold"):
        scan(tmp_path)
    assert "cannot hold" in check(tmp_path, SIZE).text()


def test_a_clip_gives_at_most_some_thousand_views(tmp_path):
    made.put(made.small_set(tmp_path), {"dataset.toml": "clip_frames = 4096\nmin_frame_gap = 1"})
    assert scan(tmp_path).cfg.clip_frames == 4096
    for count in (4097, 10**9):
        made.put(tmp_path, {"dataset.toml": f"clip_frames = {count}"})
        with pytest.raises(ValueError, match=f"clip_frames must be at most 4096, got {count}"):
            scan(tmp_path)


def tar_with(folder, names=("invariant/x.png",)):
    """A shard of one picture under these names."""
    for number, name in enumerate(names):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for member, content in (
                (f"{number}.png", b"picture"),
                (f"{number}.json", json.dumps({"files": {"png": name}}).encode()),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder / "0.tar"


DEEP = "[" * 100_000 + "]" * 100_000
PLACES = [
    [512, 10**12, ""],
    [512, 2**70, ""],
    [-512, 7, ""],
    [512, -7, ""],
    [10**12, 7, ""],
    ["512", 7, ""],
    [512, 7, 1],
    [512],
    7,
    None,
]


@pytest.mark.parametrize("text", [DEEP, "9" * 100_000, "\xff", "{", "[1]", "null", "1"], ids=len)
def test_damaged_json_of_an_evaluation_is_a_sentence(tmp_path, text):
    for name in ("scores.json", run_file.NAME):
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is not a file of scores"):
        scores_file.read(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="is not the header of a run"):
        run_file.joined(tmp_path, {})
    with pytest.raises(ValueError, match="is not a workflow"):
        read_recipe(tmp_path / "scores.json", {}, dict)
    (tmp_path / "log.jsonl").write_text(text + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        keep_log_up_to(tmp_path / "log.jsonl", 3)
    with pytest.raises(ValueError, match="scores.json is not"):
        import_data("ip_adapter", tmp_path / "scores.json", tmp_path / "data")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_index_is_believed_only_where_its_shard_has_such_bytes(tmp_path, place):
    shard = tar_with(tmp_path)
    index = {"format": 1, "bytes": shard.stat().st_size, "files": {"invariant/x.png": place}}
    (tmp_path / "0.index.json").write_text(json.dumps(index))
    assert ShardStore(tmp_path).open("invariant/x.png").read() == b"picture", "the tar itself says where it is"


@pytest.mark.parametrize("text", [DEEP, '{"format": 1, "bytes": 1, "files": []}', "9" * 100_000, "\xff", "[1]", "null"])
def test_a_damaged_index_is_passed_over_and_a_damaged_list_of_shards_is_a_sentence(tmp_path, text):
    tar_with(tmp_path)
    (tmp_path / "0.index.json").write_text(text)
    assert ShardStore(tmp_path).names() == ["invariant/x.png"]
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(ValueError, match="shards.json in .* is damaged"):
        ShardStore(tmp_path)


def test_a_shard_whose_headers_lie_is_a_sentence(tmp_path):
    shard = tar_with(tmp_path)
    data = bytearray(shard.read_bytes())
    info = tarfile.TarInfo("0.png")
    info.size = 10**12
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="0.tar is damaged or not a tar file"):
        ShardStore(tmp_path)
    # names of names of names: Python's reader calls itself for each
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    shard.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 20_000)
    with pytest.raises(ValueError, match="0.tar is damaged or not a tar file"):
        ShardStore(tmp_path)


def test_the_description_of_a_sample_may_be_damaged_too(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("0.png", b"picture"), ("0.json", DEEP.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="^Shards: 0.json in 0.tar is not JSON; pack again.$"):
        ShardStore(tmp_path)


def test_settings_beside_shards_are_no_link(tmp_path):
    tar_with(tmp_path)
    (tmp_path / "elsewhere").write_text("secret")
    (tmp_path / "dataset.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="dataset.toml in .* is a link"):
        unpack(tmp_path, tmp_path / "back")


def test_a_file_and_a_folder_of_one_name_are_refused(tmp_path):
    tar_with(tmp_path, ["invariant/x", "invariant/x/y.png"])
    with pytest.raises(ValueError, match="invariant/x is a file and a folder"):
        unpack(tmp_path, tmp_path / "back")


DEVICES = ["nul", "CON", "com1.x", "variant/dog/nul.jpg", "aux /x.png", "variant/LPT9/1.png", "COM\u00b9.png", "conin$"]


@pytest.mark.parametrize("name", DEVICES)
def test_names_of_devices_are_no_names(tmp_path, name):
    assert not safe_name(name)
    tar_with(tmp_path, [name])
    with pytest.raises(ValueError, match="kept by Windows for a device"):
        ShardStore(tmp_path)


@pytest.mark.parametrize(
    "name", ["null.png", "console/1.png", "variant/com10.jpg", "a.nul", "lpt", "invariant/my con.png"]
)
def test_names_that_only_look_like_devices_are_names(name):
    assert safe_name(name)


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 3000, "clip_frames = " + "9" * 5000, f"[weights]\n'variant/mug' = {'9' * 400}"]
)
def test_damaged_settings_are_a_sentence(tmp_path, text):
    made.put(made.small_set(tmp_path), {"dataset.toml": text})
    with pytest.raises(ValueError, match="^dataset.toml is not a TOML file: ") as told:
        scan(tmp_path)
    assert len(str(told.value)) < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of Unix")
@pytest.mark.parametrize("name", ["invariant/pipe.png", "variant/mug/pipe.txt"])
def test_a_pipe_is_no_file(tmp_path, name):
    """Whoever opens it waits until somebody writes, which no cancel ends."""
    made.small_set(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} in .* is no file; delete it"):
        scan(tmp_path)
    shards = tmp_path / "shards"
    shards.mkdir()
    os.mkfifo(shards / "1.tar")
    with pytest.raises(ValueError, match="holds no .tar files"):
        ShardStore(shards)


@pytest.mark.parametrize("name", ["10_mug/b.txt", "10_mug/b.png", "11_jug"])
def test_an_import_brings_nothing_from_behind_a_link(tmp_path, name):
    made.put(tmp_path / "elsewhere", {"b.png": made.noise(2), "b.txt": "secret"})
    made.put(tmp_path / "source", {"10_mug/a.png": made.noise(1)})
    target = tmp_path / "elsewhere" if name == "11_jug" else tmp_path / "elsewhere" / name.rpartition("/")[2]
    (tmp_path / "source" / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name} in .* is a link; .* --follow-links"):
        import_data("kohya", tmp_path / "source", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    before = FOLLOW_LINKS.set(True)
    try:
        assert import_data("kohya", tmp_path / "source", tmp_path / "data") == (1 if name.endswith("txt") else 2)
    finally:
        FOLLOW_LINKS.reset(before)


def tiled(order, *sides, picture=16):
    """A TIFF of one byte that tells of tiles, each side once per entry."""
    entries = [(256, picture), (257, picture), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322 + i % 2, side) for i, side in enumerate(sides)]
    entries = sorted(entries, key=lambda one: one[0]) + [(324, 8 + 2 + 12 * (len(entries) + 2) + 4), (325, 1)]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries) + bytes(5)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_small_picture_of_large_tiles_is_refused_by_its_header(order):
    """A decoder makes room for whole tiles: 16 x 16 pixels took 194 MB, and 2 GB are possible, in each thread."""
    for sides in ((8192, 8192), (16, 2**19), (8192, 8192, 16, 16)):
        file = io.BytesIO(tiled(order, *sides))
        for read in (pixels_of, decode_picture):
            with pytest.raises(ValueError, match="x.tif cannot be read .it has tiles of "):
                read(file, "x.tif")
            file.seek(0)
    assert pixels_of(io.BytesIO(tiled(order, 256, 256)), "x.tif") == 256


def test_pictures_in_tiles_are_read():
    file = io.BytesIO()
    picture = made.noise(1)
    picture.save(file, "TIFF", compression="tiff_deflate", tiffinfo={322: 16, 323: 16})
    assert decode_picture(file, "x.tif").rgb.tobytes() == picture.convert("RGB").tobytes()


def test_a_caption_of_gigabytes_is_not_read(tmp_path):
    made.small_set(tmp_path)
    with (tmp_path / "variant/mug/a.txt").open("wb") as file:
        file.truncate(2**34)
    assert "variant/mug/a.txt is longer than 1048576 bytes" in check(tmp_path, SIZE).text()


def test_a_cache_is_a_folder_of_its_own(tmp_path):
    data = made.small_set(tmp_path / "input/pets")
    for cache in (data, data / "variant", data / "cache", tmp_path / "input", data / "../pets/invariant"):
        with pytest.raises(ValueError, match="is the folder of the pictures, or one lies inside the other"):
            check_place(cache, data)
        with pytest.raises(ValueError, match="is the folder of the pictures"):
            sd.make("cpu", "x", "x", "x", str(data), cache=str(cache))
    check_place(tmp_path / "input/pets_cache", data)


@pytest.mark.parametrize(
    "name, value",
    [
        ("size", 512.0),
        ("size", 2**70),
        ("workers", 0),
        ("flip", True),
        ("flip", 2),
        ("probe_steps", "20"),
        ("memory", -1),
    ],
)
def test_numbers_of_a_task_are_checked_before_anything_is_read(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"\[task\] {name} must be a (whole )?number from "):
        sd.make("cpu", "nothing", "nothing", "nothing", str(tmp_path), **{name: value})


def test_an_import_brings_no_picture_that_training_would_refuse(tmp_path):
    made.put(tmp_path / "source", {"1_mug/a.png": made.noise(1), "1_mug/b.bmp": b"damaged"})
    assert import_data("kohya", tmp_path / "source", tmp_path / "data") == 2, "the check tells of what is damaged"
    large = made.noise(1)
    large.save(tmp_path / "source/1_mug/c.png")
    data = bytearray((tmp_path / "source/1_mug/c.png").read_bytes())
    data[16:24] = struct.pack(">II", 9000, 9000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "source/1_mug/c.png").write_bytes(data)
    with pytest.raises(ValueError, match="c.png cannot be used: it has 9000 x 9000 pixels"):
        import_data("kohya", tmp_path / "source", tmp_path / "more")
    assert not (tmp_path / "more").exists()
