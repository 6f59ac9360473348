"""Hostile .bin, .pt and .ckpt files (row 19 of the users' table): code in them never runs, nothing is allocated by their claims,
and each gets one sentence with its name.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile

import hostile_pickles as hostile
import pytest
import torch
import weight_files
from hypothesis import given
from hypothesis import strategies as st
from weight_files import outcome, pairs, refused, whole

from flexip_core.files.weights import read_header, read_tensors

KINDS = weight_files.kinds()
SUFFIXES = (".bin", ".safetensors")  # a pickle may be named either way, and torch looks at the name


@pytest.fixture(autouse=True, scope="module")
def tiny_bases():
    with pytest.MonkeyPatch.context() as monkeypatch:
        weight_files.tiny_bases(monkeypatch)
        yield


def saved(tensors: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def nested(tensors: dict[str, torch.Tensor]) -> dict:
    parts: dict = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return parts


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_honest_files_load_in_either_format(tmp_path, zipped, suffix):
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(saved(nested(weight_files.ip_adapter_tensors("plus")), zipped))
    assert not isinstance(found := outcome(KINDS["ip-adapter"].read, path), str), found
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool, torch.complex64):
        if not zipped and dtype in (torch.float8_e4m3fn, torch.uint16):
            continue  # torch cannot read back what it writes there
        content = {"a": torch.ones(3, 4).to(dtype)[1:], "b": torch.nn.Parameter(torch.ones(2)), "epoch": 3, "s": {1, 2}}
        path.write_bytes(saved(content, zipped))
        assert torch.equal(read_tensors(path)["a"].float(), torch.ones(2, 4))
        assert read_header(path).dtypes["a"] == str(dtype).removeprefix("torch.")


def test_a_file_by_hand_is_read_like_one_by_torch(tmp_path):
    """The hostile files below must be refused for what they claim, not for how they were written."""
    for name, write in hostile.WRITERS.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(write({"w": hostile.tensor()}))
        assert torch.equal(read_tensors(path)["w"], torch.zeros(4))


def test_the_zip_of_every_torch_and_of_python_is_read(tmp_path):
    """1.6 wrote no byteorder, newer ones write more entries; the folder is "archive" or the file's name."""
    pickle, storage = hostile.pickled({"w": hostile.tensor()}), bytes(16)
    first = ["data.pkl", "data/0", "version"]
    layouts = {
        "1.6": first,
        "2.1": ["data.pkl", "byteorder", "data/0", "version"],
        "2.6": ["data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0", "version", ".data/serialization_id"],
        "packed again by hand": sorted(first, reverse=True),
    }  # fmt: skip
    contents = {"data.pkl": pickle, "data/0": storage, "byteorder": b"little", "version": b"3\n"}
    path = tmp_path / "my model.v1.bin"
    for layout in layouts.values():
        for folder in ("archive", "my model.v1", "模型"):
            path.write_bytes(hostile.packed([(f"{folder}/{name}", contents.get(name, b"1")) for name in layout]))
            assert torch.equal(read_tensors(path)["w"], torch.zeros(4))
    torch.save({"w": torch.zeros(4)}, path)
    assert zipfile.ZipFile(path).namelist()[0] == "my model.v1/data.pkl"
    assert torch.equal(read_tensors(path)["w"], torch.zeros(4))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_zip_that_torch_could_read_differently_is_refused(tmp_path, suffix):
    for what, content in hostile.disguised().items():
        path = tmp_path / f"disguised{suffix}"
        path.write_bytes(content)
        assert "is not packed as PyTorch packs weights" in refused(read_tensors, path), what


def test_torch_would_find_the_tensor_behind_each_disguise(tmp_path):
    for what, content in hostile.disguised().items():
        path = tmp_path / "disguised.bin"
        path.write_bytes(content)
        assert torch.load(path, weights_only=True)["w"].shape == (hostile.LARGE,), what


@whole
def test_code_in_a_pickle_never_runs(tmp_path, whole):
    marker = tmp_path / "ran"
    armed = [(what, content, suffix) for what, content in hostile.armed(str(marker)).items() for suffix in SUFFIXES]
    for kind, (what, content, suffix) in pairs(KINDS, armed, whole):
        path = tmp_path / f"{kind.name}{suffix}"
        path.write_bytes(content)
        refused(kind.read, path)
        assert not marker.exists(), (kind.name, what)


def test_the_pickles_with_code_are_armed(tmp_path):
    for number, name in enumerate(
        ("zip, as a value", "legacy, as a value", "legacy, in its machine", "protocol 4", "protocol 0")
    ):
        marker, path = tmp_path / f"ran {number}", tmp_path / "armed.bin"
        path.write_bytes(hostile.armed(str(marker))[name])
        try:
            torch.load(path, weights_only=False)
        except Exception:  # noqa: BLE001 - some only fail after their code ran
            pass
        if not marker.exists():
            pickle.loads(path.read_bytes())
        assert marker.exists(), name


FALSE = {
    f"{what}, {name}": write({"w": data})
    for what, data in hostile.FALSE_SIZES.items()
    for name, write in hostile.WRITERS.items()
}
FALSE |= {
    f"{what}, {name}": write(data) for what, data in hostile.OPCODES.items() for name, write in hostile.WRITERS.items()
}
FALSE |= {f"{what}, alone": data for what, data in hostile.OPCODES.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pickle_that_claims_more_than_it_holds_is_refused(tmp_path, suffix):
    for what, content in FALSE.items():
        path = tmp_path / f"{what}{suffix}"
        path.write_bytes(content)
        refused(read_tensors, path)


def test_false_sizes_are_noticed_before_torch_reads_the_file(tmp_path):
    for what, claim in hostile.FALSE_SIZES.items():
        for name, write in hostile.WRITERS.items():
            path = tmp_path / f"{what}, {name}.bin"
            path.write_bytes(write({"w": claim}))
            assert "cut off" not in refused(read_tensors, path), "that is said of what torch cannot read"


@pytest.mark.parametrize(
    "parts", [("data", "machine"), ("magic", "keys"), ("magic", "version", "machine", "data", "keys")]
)
def test_what_all_pickles_of_an_old_file_claim_counts_together(tmp_path, parts):
    def claiming(elements):
        claims = {part: hostile.Storage(elements, str(number)) for number, part in enumerate(parts)}
        return hostile.legacy(**{"data": {"w": hostile.tensor()}, **claims})

    size, path = len(claiming(1)), tmp_path / "legacy.bin"
    path.write_bytes(claiming(size * 2 // 3 // 4))  # each claims two thirds of the file
    assert path.stat().st_size == size
    assert "larger tensors than it holds" in refused(read_tensors, path)


def test_a_key_of_tuples_is_refused_before_it_is_hashed(tmp_path):
    path = tmp_path / "key.bin"
    for write in hostile.WRITERS.values():
        path.write_bytes(write(hostile.laughing_key()))
        assert "other than weights" in refused(read_tensors, path)


# In a process of its own: the largest virtual size that it ever had tells of every allocation, also of memory never touched.
MEASURE = """
import sys, pathlib
import torch
import weight_files
from flexip_core.files.weights import read_header, read_tensors

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) * 1024

weight_files.refused(read_tensors, pathlib.Path(sys.argv[1]) / "warm up.bin")
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before = peak()
    for read in (read_header, read_tensors):
        weight_files.outcome(read, path)
    grown = peak() - before - 4 * path.stat().st_size
    if grown > 32 * 2**20:
        print(path.name, "took", grown >> 20, "MiB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_allocates_no_more_than_the_file_holds(tmp_path):
    (tmp_path / "warm up.bin").write_bytes(hostile.zipped({"x": hostile.touch("/none")}))
    for number, content in enumerate(hostile.disguised().values()):
        for suffix in SUFFIXES:
            (tmp_path / f"disguise {number}{suffix}").write_bytes(content)
    for number, (what, content) in enumerate(FALSE.items()):
        for suffix in SUFFIXES:
            (tmp_path / f"{number} {what}{suffix}").write_bytes(content)
    content = KINDS["flexip"].content
    header, data = weight_files.split(content)
    key = next(key for key in header if key != "__metadata__")
    for size in (2**29, 2**40):
        header[key] |= {"shape": [size], "data_offsets": [0, 4 * size]}
        (tmp_path / f"shape {size}.safetensors").write_bytes(weight_files.join(header, data))
    (tmp_path / "header.safetensors").write_bytes(weight_files.join(b"{" + content, b"", 99_000_000))
    big = {"w": torch.ones(4_000_000)}
    (tmp_path / "honest.bin").write_bytes(saved(big, True))
    (tmp_path / "honest legacy.bin").write_bytes(saved(big, False))
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        check=False,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


@whole
def test_archives_that_are_no_weights_are_named(tmp_path, whole):
    """A reader of references only says that this is none."""
    bomb = hostile.zipped({"w": hostile.tensor()}, (bytes(50_000_000),), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    honest = hostile.zipped({"w": hostile.tensor()})
    place = honest.rindex(b"PK\x01\x02") + 20  # sizes of the last entry in the list of entries
    files = {
        "a zip bomb": (bomb, "compressed"),
        "sizes beyond the file": (honest[:place] + b"\xf0\xff\xff\x7f" * 2 + honest[place + 8 :], "compressed"),
        "nothing in it": (b"PK\x05\x06" + bytes(18), "not a weight file"),
        "nothing but a version": (zip_of("archive/version"), "damaged"),
        "a picture book": (zip_of("pictures/1.png"), "damaged"),
        "the list of entries is gone": (honest[: honest.index(b"PK\x01\x02")], "damaged"),
        "one storage is gone": (hostile.zipped({"w": hostile.tensor()}, ()), "larger tensors than it holds"),
        "one storage is cut": (hostile.zipped({"w": hostile.tensor()}, (bytes(8),)), "larger tensors than it holds"),
        "two folders": (hostile.packed([("a/data.pkl", hostile.pickled({})), ("b/version", b"3")]), "not packed as"),
        "two storages of one name": (
            hostile.packed([("a/data.pkl", b""), ("a/data/b", b"1"), ("a/data/B", b"")]),
            "not packed as",
        ),
        "a storage of two spellings": (hostile.packed([("a/data.pkl", b""), ("a/data/\xe9", b"")]), "not packed as"),
        "a list": (hostile.zipped([hostile.tensor()]), "no tensors"),
        "billions of entries": (hostile.zipped(hostile.laughing_dicts()), "entries"),
    }
    cases = [(what, suffix) for suffix in SUFFIXES for what in files]
    reference, others = KINDS["reference"], {name: kind for name, kind in KINDS.items() if name != "reference"}
    for kind, (what, suffix) in [*pairs(others, cases, whole), *((reference, case) for case in cases)]:
        content, words = files[what]
        path = tmp_path / f"{kind.name}, {what}{suffix}"
        path.write_bytes(content)
        text = refused(kind.read, path)
        assert words in text or kind.name == "reference", (what, text)


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"3\n" * 20)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    for kind in KINDS.values():
        text = refused(kind.read, path)
        assert "TorchScript" in text or kind.name == "reference", kind.name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, zipped):
    for odd in (
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.ones(4, device="meta"),
    ):
        path = tmp_path / "odd.bin"
        path.write_bytes(saved({"w": odd}, zipped))
        refused(read_tensors, path)


def test_the_old_tar_format_is_refused(tmp_path):
    import tarfile

    path = tmp_path / "old.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = 10
            archive.addfile(info, io.BytesIO(bytes(10)))
    assert "not a weight file" in refused(read_tensors, path)


WHOLE = {zipped: saved(nested(weight_files.ip_adapter_tensors()), zipped) for zipped in (True, False)}


@pytest.mark.parametrize("zipped", [True, False])
def test_an_ip_adapter_cut_off_anywhere_is_refused(tmp_path, zipped):
    path = tmp_path / "cut.bin"
    content = WHOLE[zipped]
    for end in [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:end])
        refused(KINDS["ip-adapter"].read, path)


@given(st.booleans(), st.sampled_from(SUFFIXES), st.data())
def test_flipped_bits_in_an_ip_adapter_load_or_are_refused(tmp_path_factory, zipped, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"flipped{suffix}"
    content = bytearray(WHOLE[zipped])
    pickles = content.index(b"archive/byteorder") if b"archive/byteorder" in content else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from([pickles, len(content)]))
        content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    outcome(KINDS["ip-adapter"].read, path)


@pytest.mark.long
@pytest.mark.parametrize("zipped", [True, False])
def test_a_flipped_bit_at_any_byte_of_a_small_file_loads_or_is_refused(tmp_path, zipped):
    content = saved({"image_proj": {"latents": torch.ones(2)}}, zipped)
    path = tmp_path / "flipped.bin"
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        outcome(read_tensors, path)


@pytest.mark.parametrize("write", hostile.WRITERS.values(), ids=list(hostile.WRITERS))
def test_a_file_of_endless_opcodes_is_refused_while_it_is_counted(tmp_path, write):
    """Each is one byte, an empty dict 64 and an empty set 216 bytes of memory."""
    path = tmp_path / "adapter.bin"
    for opcode, words in (
        (b"}", "describes far more than weights"),
        (b"\x8f", "contains Python objects other than weights"),
    ):
        path.write_bytes(write(b"\x80\x04" + opcode * 1_500_000 + b"."))
        assert words in refused(read_tensors, path)
    path.write_bytes(write(b"\x80\x02" + b"}" * 10 + b"."))
    assert "far more" not in refused(read_tensors, path)


def test_a_file_of_many_tensors_is_far_from_the_limit(tmp_path):
    path = tmp_path / "adapter.bin"
    path.write_bytes(saved({f"blocks.{i}.weight": torch.zeros(1) for i in range(5000)}, True))
    assert len(read_tensors(path)) == 5000
