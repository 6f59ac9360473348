"""The evaluation's scores by hand, which files it measures by, and what it says when files or pictures are lacking.

Whole-size files of published layouts are views into a small pool, a few MB on disk.
"""

from __future__ import annotations

import hashlib
import math
import runpy

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from flexip_core.evaluation import aesthetic, clip_iqa, instruments, metrics
from flexip_core.evaluation.benchmark import Case, Picture, Subject
from flexip_core.evaluation.clip_iqa import probability_of_good
from flexip_core.evaluation.instruments import COLUMNS, ROLES, find
from flexip_core.evaluation.metrics import clip_t, read_picture
from flexip_core.files.weights import read_header, read_tensors
from flexip_core.measuring.scores import image_scores

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- by hand ---


def test_clip_t_pairs_each_picture_with_its_own_prompt():
    pictures, prompts = (
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]),
        torch.tensor([[9.0, 0.0], [0.0, 5.0], [0.0, 1.0]]),
    )
    torch.testing.assert_close(clip_t(pictures, prompts), doubles(0.6, 1, 0))
    torch.testing.assert_close(clip_t(pictures, -pictures), doubles(-1, -1, -1))


def test_identity_is_the_mean_over_the_real_pictures():
    same, across = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 7.0]])
    assert image_scores(same, same).item() == 1 and image_scores(same, across).item() == 0
    two = torch.tensor([[5.0, 0.0], [3.0, 4.0]])  # cosines 1 and 0.6, whatever the lengths
    torch.testing.assert_close(image_scores(same, two), doubles(0.8))


def test_quality_is_a_half_where_both_prompts_are_as_near_and_follows_the_logistic_curve():
    good, bad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        probability_of_good(torch.tensor([[1.0, 1.0], [-3.0, -3.0]]), good, bad), doubles(0.5, 0.5)
    )
    one, zero = probability_of_good(torch.tensor([[5.0, 0.0], [0.0, 5.0]]), good, bad)
    assert one == pytest.approx(1) and zero == pytest.approx(0, abs=1e-40)
    # cosines 0.3 and 0.29: a difference of 0.01 is one unit of the exponent
    picture = torch.tensor([[0.3, 0.29, math.sqrt(1 - 0.3**2 - 0.29**2)]], dtype=torch.float64)
    axes = torch.eye(3, dtype=torch.float64)
    assert probability_of_good(picture, axes[0], axes[1]).item() == pytest.approx(1 / (1 + math.exp(-1)))


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.floats(0.1, 30))
def test_quality_ignores_lengths_and_swapping_the_prompts_complements_it(numbers, factor):
    picture, good, bad = torch.tensor(numbers, dtype=torch.float64).view(3, 2)
    assume(min(v.norm() for v in (picture, good, bad)) > 1e-6)  # below 1e-12 a vector counts as none
    found = probability_of_good(picture[None], good, bad).item()
    assert probability_of_good(factor * picture[None], good, factor * bad).item() == pytest.approx(found, abs=1e-9)
    assert probability_of_good(picture[None], bad, good).item() == pytest.approx(1 - found, abs=1e-9)


def test_the_aesthetic_score_by_hand(tmp_path):
    """Each layer passes its first number on, doubled; biases add 1 at the end."""
    state = {}
    for name, inputs, outputs in zip(aesthetic._LAYERS, aesthetic.WIDTHS, aesthetic.WIDTHS[1:]):
        state[f"{name}.weight"] = torch.zeros(outputs, inputs).index_put(
            (torch.tensor(0), torch.tensor(0)), torch.tensor(2.0)
        )
        state[f"{name}.bias"] = torch.zeros(outputs)
    state["layers.7.bias"] += 1
    save_file(state, tmp_path / "head.safetensors")
    head = aesthetic.AestheticHead(aesthetic.identify("head", read_header(tmp_path / "head.safetensors")))
    along, tilted, across = torch.zeros(3, 768)
    along[0], tilted[0], tilted[1], across[1] = 7, 3, 4, 1
    torch.testing.assert_close(head(torch.stack([along, tilted, -along, across])), doubles(33, 0.6 * 32 + 1, -31, 1))


# --- reading pictures ---


def test_transparency_greys_and_palettes_become_rgb(tmp_path):
    for mode, value, expected in (("RGBA", (9, 8, 7, 0), (9, 8, 7)), ("L", 50, (50, 50, 50)), ("P", 0, (0, 0, 0))):
        Image.new(mode, (4, 3), value).save(tmp_path / "a.png")
        picture = read_picture(tmp_path / "a.png")
        assert picture.mode == "RGB" and picture.size == (4, 3) and picture.getpixel((0, 0)) == expected


def test_a_photo_is_turned_as_viewers_turn_it(tmp_path):
    photo, exif = Image.new("RGB", (4, 3)), Image.Exif()
    exif[274] = 6  # the camera was held upright
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (3, 4)


@pytest.mark.parametrize("kind", ["cut off", "no picture", "empty", "missing", "folder"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "dog-00-0.png"
    Image.effect_noise((64, 64), 90).save(path)
    data = path.read_bytes()
    path.write_bytes({"cut off": data[: len(data) // 2], "no picture": b"hello", "empty": b""}.get(kind, data))
    if kind in ("missing", "folder"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"^The picture dog-00-0.png .*\.$"):
        read_picture(path)


# --- which files are taken ---


def pooled(shapes, path, rounded=True):
    """A file with tensors of these shapes (or of a model's). `rounded`: every value is a half precision number."""
    if isinstance(shapes, torch.nn.Module):
        shapes = {key: tuple(value.shape) for key, value in shapes.state_dict().items()}
    pool = torch.randn(80_000, generator=torch.Generator().manual_seed(0)) * 0.05
    pool = pool.half().float() if rounded else pool
    tensors = {}
    for number, (key, shape) in enumerate(shapes.items()):
        rows, row = math.prod(shape[:-1]), math.prod(shape[-1:])
        step = min(row, (len(pool) - row) // rows)  # rows overlap, so that a small pool is enough
        room = len(pool) - (step * (rows - 1) + row)
        strides = [step * math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
        tensors[key] = torch.as_strided(pool, shape, [*strides, 1][: len(shape)], number * 7919 % (room + 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def on_meta(make):
    with torch.device("meta"):
        return make()


def b32():
    return on_meta(
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config={"eos_token_id": 49407}, projection_dim=512))
    )


def l14(text=True):
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "projection_dim": 768}
    if not text:
        config = transformers.CLIPVisionConfig(**vision)
        return on_meta(lambda: transformers.CLIPVisionModelWithProjection(config))
    words = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=words, vision_config=vision, projection_dim=768)
    return on_meta(lambda: transformers.CLIPModel(config))


def vit(name="vit_small_patch16_224.dino"):
    return on_meta(lambda: timm.create_model(name, num_classes=0))


def rn50():
    from open_clip.model import CLIP

    vision = {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None, "image_size": 224}
    words = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return on_meta(lambda: CLIP(1024, vision, words, quick_gelu=True))


def head(path, bias=0.98999):
    shapes = {key: torch.zeros(shape) for key, shape in aesthetic._SHAPES.items()}
    torch.save(shapes | {"layers.7.bias": torch.tensor([bias])}, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every standard file, under names that say nothing."""
    folder = tmp_path_factory.mktemp("published")
    for name, model in (
        ("1.pt", b32()),
        ("2.bin", vit()),
        ("below/3.pth", l14()),
        ("4.ckpt", vit("vit_small_patch14_dinov2")),
    ):
        pooled(model, folder / name)
    pooled(rn50(), folder / "5.pt")
    head(folder / "6.pth")
    (folder / "notes.txt").write_text("no weights")
    (folder / "damaged.safetensors").write_bytes(b"\0" * 99)
    save_file({"other": torch.zeros(3)}, folder / "other.safetensors")
    return folder


def test_all_standard_files_are_found_by_content_and_named_with_their_hashes(published):
    found = find(published)
    assert not found.missing and list(found.columns) == list(COLUMNS)
    titles = {
        "CLIP-T": ("OpenAI CLIP ViT-B/32", "1.pt"),
        "CLIP-I": ("OpenAI CLIP ViT-B/32", "1.pt"),
        "DINO-I": ("DINO v1 ViT-S/16", "2.bin"),
        "CLIP-IQA": ("OpenAI CLIP RN50", "5.pt"),
        "CLIP-T (L/14)": ("OpenAI CLIP ViT-L/14", "below/3.pth"),
        "CLIP-I (L/14)": ("OpenAI CLIP ViT-L/14", "below/3.pth"),
        "DINO-I (DINOv2)": ("DINOv2 ViT-S/14", "4.ckpt"),
        "Aesthetic": ("LAION's aesthetic predictor sac+logos+ava1", "6.pth"),
    }
    for column, (title, name) in titles.items():
        digest = hashlib.sha256((published / name).read_bytes()).hexdigest()
        assert f"{title} ({name.split('/')[-1]}, sha256 {digest})" in found.columns[column], column
        assert "NOT comparable" not in found.columns[column]
    assert f" on OpenAI CLIP ViT-L/14 (3.pth, sha256 {hashlib.sha256((published / 'below/3.pth').read_bytes()).hexdigest()})" in found.columns["Aesthetic"]  # fmt: skip
    assert "make sure that it is DINO's" in found.columns["DINO-I"]


def test_nothing_in_an_empty_folder_and_a_sentence_per_column(tmp_path):
    found = find([tmp_path])
    assert not found.columns and list(found.missing) == list(COLUMNS)
    for column, advice in {
        "CLIP-T": "OpenAI's CLIP ViT-B/32: put model.safetensors of openai/clip-vit-base-patch32",
        "CLIP-I": "OpenAI's CLIP ViT-B/32: put model.safetensors of openai/clip-vit-base-patch32",
        "DINO-I": "DINO v1 ViT-S/16: put dino_deitsmall16_pretrain.pth",
        "CLIP-IQA": "OpenAI's CLIP RN50: put open_clip_model.safetensors of timm/resnet50_clip.openai",
        "Aesthetic": "LAION's aesthetic predictor: put sac+logos+ava1-l14-linearMSE.pth",
        "CLIP-T (L/14)": "OpenAI's CLIP ViT-L/14: put model.safetensors of openai/clip-vit-large-patch14",
        "CLIP-I (L/14)": "OpenAI's CLIP ViT-L/14: put model.safetensors of openai/clip-vit-large-patch14",
        "DINO-I (DINOv2)": "DINOv2 ViT-S/14: put model.safetensors of facebook/dinov2-small",
    }.items():
        text = found.missing[column]
        assert text.startswith(f"{column} lacks {advice}") and f" into {tmp_path}." in text
    with pytest.raises(ValueError, match="(?s)CLIP-T lacks .*DINO-I lacks"):
        found.score([])


def test_a_folder_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder; .*clip_vision"):
        find([tmp_path / "nowhere"])


def test_other_weights_are_taken_only_by_name_and_marked(tmp_path):
    laion = pooled(b32(), tmp_path / "laion.pt", rounded=False)
    large = pooled(vit("vit_base_patch14_dinov2"), tmp_path / "dinov2_b.pt")
    yfcc = pooled(rn50(), tmp_path / "yfcc.pt", rounded=False)
    sister = head(tmp_path / "ava.pth", bias=0.5037)
    pooled(l14(), tmp_path / "l14.pt")
    found = find(tmp_path)
    assert list(found.columns) == ["CLIP-T (L/14)", "CLIP-I (L/14)"]
    for column, role, text in (
        ("CLIP-T", "clip", "laion.pt is CLIP ViT-B/32"),
        ("DINO-I (DINOv2)", "dinov2", "dinov2_b.pt is DINOv2 ViT-B/14"),
        ("CLIP-IQA", "clip-rn50", "yfcc.pt is CLIP RN50"),
        ("Aesthetic", "aesthetic", "ava.pth is an aesthetic predictor"),
    ):
        assert text in found.missing[column] and f"name it as {role})" in found.missing[column]
    named = find(tmp_path, {"clip": laion, "dinov2": large, "clip-rn50": yfcc, "aesthetic": sister})
    assert list(named.missing) == ["DINO-I"]
    for column, title in (
        ("CLIP-T", "OpenAI's CLIP ViT-B/32"),
        ("CLIP-I", "OpenAI's CLIP ViT-B/32"),
        ("DINO-I (DINOv2)", "DINOv2 ViT-S/14"),
        ("CLIP-IQA", "OpenAI's CLIP RN50"),
        ("Aesthetic", "LAION's aesthetic predictor"),
    ):
        assert f"NOT comparable with scores by {title}" in named.columns[column]
    assert "NOT comparable" not in named.columns["CLIP-T (L/14)"]


def test_a_named_file_that_cannot_serve_is_a_sentence(tmp_path, published):
    for use, words in (
        ({"clips": published / "1.pt"}, "no role 'clips' for a file; choose from clip, dino, clip-l14"),
        ({"aesthetic": published / "1.pt"}, "1.pt .* cannot serve as aesthetic; choose sac.logos.ava1"),
        ({"clip": published / "2.bin"}, "2.bin .* cannot serve as clip; choose model.safetensors of openai"),
        ({"dino": tmp_path / "gone.pt"}, "gone.pt .* does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            find([], use)


def test_without_a_text_tower_pictures_can_be_compared_but_no_prompts(tmp_path):
    pooled(l14(text=False), tmp_path / "vision.pt")
    found = find(tmp_path)
    assert list(found.columns) == ["CLIP-I (L/14)"]
    assert found.missing["CLIP-T (L/14)"].startswith("CLIP-T (L/14) lacks the text tower of OpenAI's CLIP ViT-L/14: vision.pt has no text tower")  # fmt: skip
    pooled(l14(), tmp_path / "whole.pt")
    assert "whole.pt" in find(tmp_path).columns["CLIP-T (L/14)"]


def test_a_standard_file_that_is_not_whole_is_passed_over(tmp_path):
    shapes = {key: tuple(value.shape) for key, value in rn50().state_dict().items()}
    pooled({k: v for k, v in shapes.items() if k != "visual.layer3.2.bn2.bias"}, tmp_path / "a.pt")
    assert "CLIP-IQA" in find(tmp_path).missing
    with pytest.raises(ValueError, match="a.pt is not a whole CLIP ResNet .*layer3.2.bn2.bias is missing"):
        find(tmp_path, {"clip-rn50": tmp_path / "a.pt"})
    pooled(shapes, tmp_path / "b.pt")
    assert "b.pt" in find(tmp_path).columns["CLIP-IQA"]


def test_an_aesthetic_predictor_needs_embeddings_of_its_width(tmp_path, published):
    found = find(published, {"clip-l14": published / "1.pt"})
    assert found.missing == {"Aesthetic": "Aesthetic lacks embeddings of width 768: 1.pt makes 512 numbers."}


class Clip(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0).half())

    def forward(self, x):
        return x * self.weight


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_openais_own_archive_is_not_opened_and_its_conversion_works(tmp_path, monkeypatch):
    torch.jit.script(Clip()).save(tmp_path / "RN50.pt")
    text = find(tmp_path).missing["CLIP-IQA"]
    assert "not opened: RN50.pt, a TorchScript program; write its weights to a plain file with: python -c" in text
    code = text.split('python -c "')[1].split('"')[0]
    (tmp_path / "convert.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("convert.py")
    assert read_tensors(tmp_path / "plain_RN50.pt")["weight"].tolist() == [0, 1, 2, 3]


def test_weights_that_are_not_numbers_are_refused_instead_of_scored(tmp_path):
    path = head(tmp_path / "head.pth")
    torch.save(torch.load(path) | {"layers.2.bias": torch.full((128,), math.nan)}, path)
    with pytest.raises(ValueError, match="head.pth .*not numbers"):
        aesthetic.AestheticHead(aesthetic.identify("head", read_header(path)))
    shapes = {key: tuple(value.shape) for key, value in rn50().state_dict().items()}
    pooled(shapes, tmp_path / "rn50.pt")
    broken = torch.load(tmp_path / "rn50.pt") | {"visual.bn1.running_var": torch.full((32,), math.inf)}
    torch.save(broken, tmp_path / "rn50.pt")
    with pytest.raises(ValueError, match="rn50.pt .*not numbers"):
        clip_iqa.load_resnet(clip_iqa.identify("rn50.pt", read_header(tmp_path / "rn50.pt")))


# --- measuring ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small CLIP as the only instrument, two subjects and their pictures."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**sizes, "image_size": 64, "patch_size": 32},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    random = np.random.default_rng(0)
    for name in ("cat_a", "cat_b", "dog_a", "0", "1", "2"):
        Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    cat = Subject("cat", "live", (folder / "cat_a.png", folder / "cat_b.png"), "cat")
    dog = Subject("dog", "live", (folder / "dog_a.png",), "dog")
    pictures = [
        Picture(Case(cat, 3, "a cat"), 0, None, folder / "cat_a.png"),
        Picture(Case(dog, 3, "a dog"), 0, None, folder / "dog_a.png"),
        Picture(Case(cat, 12, "a cat, smiling"), 1, None, folder / "0.png"),
    ]
    return find([], {"clip": folder / "clip" / "model.safetensors"}), pictures, folder


def test_a_copy_of_the_only_real_picture_scores_one_and_of_one_of_two_the_mean(small):
    found, pictures, _ = small
    rows = found.score(pictures, device="cpu").rows
    pair = metrics.ImageEncoder(found.files["clip"], "cpu")(
        [read_picture(p) for p in pictures[0].case.subject.references]
    )
    assert rows[1].scores["CLIP-I"] == pytest.approx(1, abs=1e-6)
    assert rows[0].scores["CLIP-I"] == pytest.approx((1 + image_scores(pair[:1], pair[1:]).item()) / 2, abs=1e-6)
    assert rows[0].scores["CLIP-I"] < 0.9999
    assert [(row.subject, row.case, row.image) for row in rows] == [
        ("cat", "03", 0),
        ("dog", "03", 0),
        ("cat", "12", 1),
    ]
    assert set(rows[0].scores) == {"CLIP-T", "CLIP-I"} and len({row.scores["CLIP-T"] for row in rows}) == 3


def test_no_dino_no_features_and_fewer_columns_on_request(small):
    found, pictures, _ = small
    measured = found.only(["CLIP-I"]).score(pictures, device="cpu")
    assert measured.features is None and all(set(row.scores) == {"CLIP-I"} for row in measured.rows)
    assert measured.rows[1].scores["CLIP-I"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="^DINO-I lacks DINO v1 ViT-S/16"):
        found.only(["DINO-I"])
    with pytest.raises(ValueError, match="no column 'PSNR'; choose from CLIP-T"):
        found.only(["PSNR"])


def test_references_are_encoded_once_per_subject(small, monkeypatch):
    found, pictures, _ = small
    read = []
    real = metrics.read_picture
    monkeypatch.setattr(metrics, "read_picture", lambda path: read.append(path.name) or real(path))
    found.score(pictures * 3, batch=2, device="cpu")
    assert read.count("cat_b.png") == 1 and len(read) == 9 + 3


def test_progress_counts_pictures(small):
    found, pictures, _ = small
    told = []
    found.score(pictures, batch=2, on_progress=lambda *counts: told.append(counts), device="cpu")
    assert told == [(2, 3), (3, 3)]
    with pytest.raises(ValueError, match="at least 1 picture, got 0"):
        found.score(pictures, batch=0, device="cpu")


def test_a_damaged_picture_stops_with_its_name(small):
    found, pictures, folder = small
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="broken.png .* cannot be read"):
        found.score([*pictures, Picture(pictures[0].case, 9, None, folder / "broken.png")], device="cpu")


def test_a_subject_without_real_pictures_stops_with_its_name(small):
    found, _, folder = small
    ghost = Case(Subject("ghost", "live", (), ""), 0, "a ghost")
    with pytest.raises(ValueError, match="subject ghost has no real pictures"):
        found.score([Picture(ghost, 0, None, folder / "0.png")], device="cpu")
    alone = found.only(["CLIP-T"]).score([Picture(ghost, 0, None, folder / "0.png")], device="cpu")
    assert set(alone.rows[0].scores) == {"CLIP-T"}


def test_pictures_too_small_for_clip_iqa_are_named(published, tmp_path):
    Image.new("RGB", (31, 64)).save(tmp_path / "tiny.png")
    case = Case(Subject("dog", "live", (), ""), 0, "a dog")
    with pytest.raises(ValueError, match="tiny.png .* has 31 x 64 pixels, too few for CLIP-IQA, which needs 32"):
        find(published).only(["CLIP-IQA"]).score([Picture(case, 0, None, tmp_path / "tiny.png")], device="cpu")


def test_real_pictures_give_the_features_that_calibrate(small):
    found, pictures, _ = small
    subjects = [pictures[0].case.subject, pictures[1].case.subject]
    told = []
    features = found.real_features(subjects, on_progress=lambda *counts: told.append(counts), device="cpu")
    assert list(features) == ["CLIP-I"] and {k: len(v) for k, v in features["CLIP-I"].items()} == {"cat": 2, "dog": 1}
    encoder = metrics.ImageEncoder(found.files["clip"], "cpu")
    torch.testing.assert_close(features["CLIP-I"]["dog"], encoder([read_picture(subjects[1].references[0])]))
    assert told == [(1, 2), (2, 2)]


def test_prompts_are_encoded_once_each_and_cut_at_the_towers_length():
    class Tower(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens.shape)
            return tokens.float()

    seen = []
    found = metrics.encode_prompts(Tower(), ["a dog", "a cat", "a dog", "a dog " * 99], 77, "cpu")
    assert seen == [(3, 77)] and list(found) == ["a dog", "a cat", "a dog " * 99]
    assert not torch.equal(found["a dog"], found["a cat"])


def test_every_role_serves_a_column():
    assert {role for column in COLUMNS.values() for role in column.roles} == set(ROLES)
    assert {column.kind for column in COLUMNS.values()} == {"prompt", "identity", "quality", "aesthetic"}
    assert instruments.FEATURES == COLUMNS["DINO-I"].roles[0] and clip_iqa.PROMPTS == ("Good photo.", "Bad photo.")
