"""Data, shards and runs that somebody else made, to hurt: one sentence, little memory, no door opened."""

import os
import threading

import pytest
import training_folders as made

from flexip_core.training.check import check
from flexip_core.training.dataset import scan

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
