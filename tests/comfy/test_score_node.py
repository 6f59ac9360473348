"""FlexIPScore: real files in the folder, what is missing in words, marks, gates, and the piece that FlexIPAutoGate uses."""

import inspect
import re

import comfy.model_management as mm
import folder_paths
import pytest
import torch
import transformers
from comfy_execution.graph_utils import ExecutionBlocker
from flexip_pack.flexip_core.encoders import scorer_files
from flexip_pack.flexip_core.encoders.text_tower import tokenize
from flexip_pack.flexip_core.network.config import FeatureNeed
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes import files, score, scorers
from flexip_pack.nodes.auto_gate import FlexIPAutoGate
from flexip_pack.nodes.score import FlexIPScore
from PIL import Image
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLIP, DINO = mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE
FULL = "full_clip.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/clip_vision of our own."""
    encoders = tmp_path / files.ENCODER_FOLDER
    encoders.mkdir()
    table = {**folder_paths.folder_names_and_paths, files.ENCODER_FOLDER: ([str(encoders)], {".safetensors", ".ckpt"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return encoders


@pytest.fixture
def minis(folder):
    mini.make_mini_encoders(folder)
    whole = scorer_files.read_tensors(folder / CLIP)
    image_tower = {key: value.clone() for key, value in whole.items() if key.startswith("visual.")}
    save_file(image_tower, folder / CLIP)
    return folder


@torch.no_grad()
def full_clip(folder, name=FULL):
    """A small CLIP with both towers, as transformers saves it, and the model."""
    torch.manual_seed(3)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**text, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    text |= {"vocab_size": 49408, "eos_token_id": 49407, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / name)
    folder_paths.filename_list_cache.clear()
    return model


def pictures(count=1, height=33, width=57, seed=0, channels=3):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def run(images=None, reference=None, **options):
    images = pictures(2) if images is None else images
    return FlexIPScore.execute(images, pictures(1, 40, 40, 9) if reference is None else reference, **options)


def features(model, images):
    scorer = scorer_files.clip_scorer("x", files.path_of(files.ENCODER_FOLDER, FULL, "test"))
    with torch.no_grad():
        return model.get_image_features(pixel_values=scorer_files.prepare(scorer, images)).pooler_output


def test_all_three_scores_equal_what_transformers_gives(minis):
    model = full_clip(minis)
    images, reference = pictures(5, 33, 57), pictures(3, 71, 40, 7)
    report, clip_i, dino_i, clip_t, plot = run(images, reference, prompt="a Red cat", clip_vision=FULL).args
    seen, expected = features(model, images), features(model, reference)
    with torch.no_grad():
        read = model.get_text_features(input_ids=tokenize(["a Red cat"], 77)).pooler_output
    cosine = torch.nn.functional.cosine_similarity
    pairs = torch.stack([cosine(seen, view[None]) for view in expected])
    assert clip_i == pytest.approx(pairs.mean(0).tolist(), abs=1e-4)
    assert clip_t == pytest.approx(cosine(seen, read).tolist(), abs=1e-4)
    assert len(dino_i) == 5 and len(set(dino_i)) == 5 and max(map(abs, dino_i)) <= 1
    assert report.startswith(
        f"CLIP-I {sum(clip_i) / 5:.3f}, DINO-I {sum(dino_i) / 5:.3f}, CLIP-T {sum(clip_t) / 5:.3f} (means of 5"
    )
    assert "not available" not in report
    for label in (f"CLIP ViT with 14 px patches at 28 px ({FULL})", f"({DINO})"):
        assert label in report
    assert report.count("image ") == 5 and plot.shape[0] == 1 and plot.shape[3] == 3


def test_a_picture_equals_itself_and_every_view_counts_equally(minis):
    one, two = pictures(1, 50, 50, 1), pictures(1, 50, 50, 2)
    for output in (1, 2):
        itself = run(one, one).args[output]
        other = run(one, two).args[output]
        both = run(one, torch.cat([one, two])).args[output]
        assert itself == pytest.approx([1.0], abs=1e-6) and other[0] < 0.9999
        assert both == pytest.approx([(1 + other[0]) / 2], abs=1e-5)


def test_scores_do_not_depend_on_the_batch_or_its_chunks(minis):
    images = pictures(2 * scorers.CHUNK + 3, 20, 31)
    together = run(images).args[2]
    alone = [run(images[i : i + 1]).args[2][0] for i in (0, scorers.CHUNK, len(images) - 1)]
    assert [together[i] for i in (0, scorers.CHUNK, len(images) - 1)] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_are_scored(minis, channels):
    assert len(run(pictures(2, channels=channels), pictures(1, channels=4)).args[1]) == 2


def blocked(value, *words):
    assert isinstance(value, ExecutionBlocker)
    assert all(word in value.message for word in ("FlexIPScore: ", "not available: ", *words)), value.message


def test_an_empty_folder_says_what_to_put_where(folder):
    report, clip_i, dino_i, clip_t, plot = run(prompt="a cat").args
    blocked(clip_i, "CLIP-I", str(folder), "openai/clip-vit-base-patch32", "no files at all")
    blocked(dino_i, "DINO-I", str(folder), "dino_deitsmall16_pretrain.pth")
    blocked(clip_t, "CLIP-T", str(folder))
    assert isinstance(plot, ExecutionBlocker) and report.count("not available: ") == 3 and "images" not in report
    assert "images" not in run(prompt="a cat").ui


def test_one_missing_thing_does_not_take_the_others_away(minis):
    _, clip_i, dino_i, clip_t, plot = run(prompt="a cat").args
    assert len(clip_i) == len(dino_i) == 2 and torch.is_tensor(plot)
    blocked(clip_t, CLIP, "has no text tower", "openai/clip-vit-base-patch32")
    blocked(run().args[3], "no prompt")
    blocked(run(dino="none").args[2], "dino is set to none")
    (minis / DINO).unlink()
    folder_paths.filename_list_cache.clear()
    blocked(run().args[2], "DINO v1 ViT-S/16", f"Looked at: {CLIP}")
    assert len(run().args[1]) == 2


@pytest.mark.parametrize(
    "options, output, words",
    [
        ({"clip_vision": DINO}, 1, f"{DINO} is DINOv2 .*, not a CLIP"),
        ({"dino": CLIP}, 2, f"{CLIP} is CLIP .*, not a DINO"),
        ({"clip_vision": "gone.safetensors"}, 1, "there is no file 'gone.safetensors'"),
        ({"dino": "page.safetensors"}, 2, "page.safetensors .*web page"),
        ({"dino": "aaa.safetensors"}, 2, "aaa.safetensors is no image encoder that FlexIP knows, not a DINO"),
    ],
)
def test_a_wrong_file_is_a_sentence_in_place_of_the_score(minis, options, output, words):
    (minis / "page.safetensors").write_text("<!DOCTYPE html><html>")
    save_file({"x": torch.zeros(2)}, minis / "aaa.safetensors")
    folder_paths.filename_list_cache.clear()
    result = run(prompt="a cat", **options).args
    blocked(result[output])
    assert re.search(words, result[output].message) and words.split(" ")[0] in result[0]
    assert isinstance(result[3 - output], list), "the other score is still there"


def test_auto_passes_over_files_that_cannot_score(minis):
    (minis / "page.safetensors").write_text("<!DOCTYPE html><html>")
    save_file({"x": torch.zeros(2)}, minis / "aaa.safetensors")
    broken = scorer_files.read_tensors(minis / DINO)
    broken = {key: value for key, value in broken.items() if key != "blocks.1.norm2.bias"}
    broken |= {key.replace("blocks.1.", "blocks.2."): value for key, value in broken.items()}
    save_file({key: value.clone() for key, value in broken.items()}, minis / "a broken but larger one.safetensors")
    folder_paths.filename_list_cache.clear()
    assert scorers.find("dino", "auto", "test").name == DINO
    assert scorers.find("clip_vision", "auto", "test").name == CLIP
    full_clip(minis)
    assert scorers.find("clip_vision", "auto", "test").name == FULL, "it has the text tower"


def test_names_and_folders_of_files_mean_nothing(minis):
    expected = run().args[1:3]
    (minis / "deep" / "er").mkdir(parents=True)
    (minis / CLIP).rename(minis / "deep" / "dino.safetensors")
    (minis / DINO).rename(minis / "deep" / "er" / "clip.safetensors")
    folder_paths.filename_list_cache.clear()
    assert run().args[1:3] == expected


class Adapters:
    """As much of LoadedAdapters as the node reads."""

    def __init__(self, *needs):
        self.network = self
        self.needs = lambda: needs


def need(encoder, kind="embedding"):
    return FeatureNeed("x", encoder, kind, encoder.width)


def test_scores_by_an_encoder_that_the_wired_adapters_read_are_marked(minis):
    marked = "the adapters read this encoder themselves"
    assert marked not in run().args[0] and run().args[0].count("NOT comparable with published") == 2
    both = Adapters(need(mini.MINI_CLIP), need(mini.MINI_DINO, "patches"))
    assert run(adapters=both).args[0].count(marked) == 2
    report = run(adapters=Adapters(need(mini.MINI_CLIP)), prompt="a cat").args[0]
    clip_line, dino_line = report.split("\n")[1:3]
    assert marked in clip_line and marked not in dino_line
    full_clip(minis)
    assert marked not in run(adapters=both, dino="none", prompt="a cat").args[0], "another CLIP than the adapters'"


def test_gates_are_averaged_and_plotted(minis, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        score.scores, "line_plot", lambda series, **o: drawn.append((series, o)) or torch.zeros(1, 8, 8, 3)
    )
    images = pictures(6)
    report, clip_i, *_ = run(images, gates="0, 0.5 1").args
    lines = report.split("\n")[-3:]
    for number, (line, gate) in enumerate(zip(lines, ("0", "0.5", "1"))):
        first, second = clip_i[2 * number : 2 * number + 2]
        assert line.startswith(f"gate {gate}: CLIP-I {(first + second) / 2:.3f} ± ")
    (series, options), *rest = drawn
    assert [s.name for s in series] == ["CLIP-I", "DINO-I"] and list(series[0].xs) == [0, 0.5, 1] and not rest
    assert options["x_label"] == "gate"


@pytest.mark.parametrize("gates, words", [("0, 1", "got 3 images for 2 gates"), ("0, x", "gates must be numbers"), ("0 2", "from 0 to 1")])  # fmt: skip
def test_gates_that_do_not_fit_are_an_error_of_the_input(minis, gates, words):
    with pytest.raises(ValueError, match=f"^FlexIPScore: .*{words}"):
        run(pictures(3), gates=gates)


@pytest.mark.parametrize("which", ["images", "reference_image"])
@pytest.mark.parametrize(
    "wrong, words",
    [
        (torch.zeros(0, 8, 8, 3), "at least one image"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\)"),
        (torch.zeros(1, 8, 8, 5), r"shape \(1, 8, 8, 5\)"),
        (torch.cat([torch.zeros(1, 8, 8, 3), torch.full((1, 8, 8, 3), float("nan"))]), "picture 2 of .* not numbers"),
    ],
)
def test_what_is_no_picture_names_the_input(minis, which, wrong, words):
    arguments = {"images": pictures(1), "reference_image": pictures(1), which: wrong}
    with pytest.raises(ValueError, match=f"^FlexIPScore: .*{which}") as error:
        FlexIPScore.execute(**arguments)
    assert re.search(words, str(error.value))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a (red:1.2) cat", "a red cat"),
        (" ((big)) dog ", "big dog"),
        (r"a \(real\) bracket", "a (real) bracket"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_comfyuis_weights_are_not_words(prompt, words):
    assert score.plain(prompt) == words


def test_a_prompt_longer_than_clip_reads_is_said(minis):
    full_clip(minis)
    assert "only the first 77 of the prompt's 102 tokens" in run(prompt="cat " * 100).args[0]
    assert "only the first" not in run(prompt="cat").args[0]


def test_the_node_shows_its_report_and_plot(minis, tmp_path):
    result = run(prompt="a cat")
    [report] = result.ui[score.notices.REPORT]
    assert result.ui["text"] == (result.args[0],) and result.args[0].startswith(report["line"])
    assert all(line in result.args[0] for line in report["details"]) and report["details"]
    (picture,) = result.ui["images"]
    assert Image.open(tmp_path / picture["filename"]).size == (result.args[4].shape[2], result.args[4].shape[1])


def test_towers_are_under_comfyuis_memory_manager_and_are_freed_afterwards(minis, monkeypatch):
    seen = []
    load = mm.load_models_gpu
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, **o: seen.extend(models) or load(models, **o))
    full_clip(minis)
    run(prompt="a cat")
    kinds = {type(patcher.model).__name__ for patcher in seen}
    assert kinds == {"ClipTower", "DinoTower", "TextTower"}
    assert all(p.dtype == torch.float32 for patcher in seen for p in patcher.model.parameters())
    towers = {id(patcher.model) for patcher in seen}
    seen.clear()
    mm.cleanup_models_gc()
    held = [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]
    assert not towers & {id(patcher.model) for patcher in held}


def test_an_interrupted_run_stops_between_chunks(minis):
    mm.interrupt_current_processing(True)
    with pytest.raises(mm.InterruptProcessingException):
        run()


def test_a_changed_folder_scores_again(minis):
    before = FlexIPScore.fingerprint_inputs(clip_vision="auto", dino="auto", prompt="x")
    assert FlexIPScore.fingerprint_inputs(clip_vision="auto", dino="auto") == before
    full_clip(minis)
    assert FlexIPScore.fingerprint_inputs(clip_vision="auto", dino="auto") != before
    assert FlexIPScore.fingerprint_inputs(clip_vision="none", dino="none") == []


def test_auto_gate_searches_again_after_the_same_changes(minis):
    ask = FlexIPAutoGate.fingerprint_inputs
    before = ask(clip_vision="auto", dino="auto", model=None, target=0.5)
    assert ask(clip_vision="auto", dino=None) == before and ask(clip_vision="none", dino="none") == []
    full_clip(minis)
    assert ask(clip_vision="auto", dino="auto") != before


def test_inputs_match_execute_and_every_socket_has_a_tooltip(minis):
    schema = FlexIPScore.define_schema()
    assert [i.id for i in schema.inputs] == list(inspect.signature(FlexIPScore.execute).parameters)
    assert all(socket.tooltip for socket in (*schema.inputs, *schema.outputs))
    options = {i.id: i.options for i in schema.inputs if i.id in ("clip_vision", "dino")}
    assert options["clip_vision"] == options["dino"] == ["auto", "none", CLIP, DINO]
    assert schema.is_output_node and [o.is_output_list for o in schema.outputs] == [False, True, True, True, False]


def test_identity_is_measured_by_dino_or_else_by_clip(minis):
    images, reference = pictures(2), pictures(1, seed=4)
    by_dino = scorers.identity_scorer("auto", "auto", "FlexIPAutoGate")
    values, label = by_dino.score(images, reference)
    assert list(values) == run(images, reference).args[2] and label.startswith("DINO-I by DINOv2")
    assert by_dino.note.startswith("NOT comparable")
    by_clip = scorers.identity_scorer("auto", "none", "FlexIPAutoGate", (need(mini.MINI_CLIP),))
    values, label = by_clip.score(images, reference)
    assert list(values) == run(images, reference).args[1] and label.startswith("CLIP-I by CLIP")
    assert "read this encoder themselves" in by_clip.note
    with pytest.raises(ValueError, match="^FlexIPAutoGate: .*DINO-I is not available: .*CLIP-I is not available: "):
        scorers.identity_scorer("none", "none", "FlexIPAutoGate")


def test_identity_encodes_the_reference_once(minis, monkeypatch):
    scorer, reference = scorers.identity_scorer("auto", "auto", "x"), pictures(1, seed=4)
    encoded = []
    original = scorers.ImageScorer.features
    monkeypatch.setattr(scorers.ImageScorer, "features", lambda self, p: encoded.append(p) or original(self, p))
    first, _ = scorer.score(pictures(1), reference)
    second, _ = scorer.score(pictures(1), reference)
    other, _ = scorer.score(pictures(1), pictures(1, seed=5))
    assert first == second != other and len(encoded) == 5


def test_the_published_standard_wins_over_everything_else(minis):
    """A whole-size file with the names of openai/clip-vit-base-patch32; every value is a half precision number."""
    with torch.device("meta"):
        shapes = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=512)).state_dict()
    pool = (torch.randn(80_000, generator=torch.Generator().manual_seed(0)) * 0.05).half().float()
    # every row one number further along the same few numbers
    views = {key: torch.as_strided(pool, value.shape, [1] * value.ndim) for key, value in shapes.items()}
    torch.save(views, minis / "openai.ckpt")
    full_clip(minis)
    report, clip_i, _, clip_t, _ = run(prompt="a cat").args
    assert re.search(
        r"CLIP-I by OpenAI CLIP ViT-B/32 \(openai.ckpt\): .*\. Comparable with published CLIP-I that", report
    )
    assert "Comparable with published CLIP-T that used" in report and len(clip_i) == len(clip_t) == 2
