"""The evaluation's encoders and scores against their publishers' code, on small random weights, to 1e-5.

CLIP-IQA and the aesthetic predictor are written out here in float64 from their definitions.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import transforms
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flexip_core.encoders import scorer_files
from flexip_core.encoders.scorer_files import clip_scorer, dino_scorer
from flexip_core.encoders.text_tower import tokenize
from flexip_core.evaluation import aesthetic, clip_iqa, instruments, metrics
from flexip_core.evaluation.benchmark import Case, Picture, Subject
from flexip_core.files.weights import read_header

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = [(224, 224), (512, 512), (300, 517), (517, 300), (1000, 301), (61, 90), (333, 222), (225, 224)]


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter away from the values that a wrong layer would also give."""
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def clip(projection=32, **vision) -> transformers.CLIPModel:
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "vocab_size": 49408,
    }
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
    }
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 49407},
        vision_config={**sizes, "patch_size": 32, "hidden_act": "gelu", **vision},
        projection_dim=projection,
    )
    return shaken(transformers.CLIPModel(config))


def vit() -> transformers.ViTModel:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
    }
    config = transformers.ViTConfig(**sizes, patch_size=16, layer_norm_eps=1e-6)
    return shaken(transformers.ViTModel(config, add_pooling_layer=False))


def dinov2(image_size=518, registers=0):
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 14,
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return shaken(transformers.Dinov2WithRegistersModel(config))
    return shaken(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def picture(width=80, height=80, seed=0) -> Image.Image:
    """Soft blobs: noise would hide where a picture is cut."""
    small = np.random.default_rng(seed).integers(0, 255, (-(-height // 16), -(-width // 16), 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def torchvisions(scorer):
    bicubic, (mean, std) = transforms.InterpolationMode.BICUBIC, scorer_files.towers.normalisation(scorer.encoder)
    steps = [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(mean, std)])


# --- how pictures are scaled and cut ---


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    model = clip()
    return model, clip_scorer("clip", saved(model, tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    model = vit()
    return model, dino_scorer("dino", saved(model, tmp_path_factory.mktemp("dino")))


@pytest.mark.parametrize("width, height", SIZES)
def test_clips_pictures_equal_its_own_processors(clip_file, width, height):
    image = picture(width, height)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(metrics.square(image, clip_file[1]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width, height", SIZES)
def test_dinos_pictures_equal_torchvisions(dino_file, width, height):
    image = picture(width, height)
    expected = torchvisions(dino_file[1])(image)
    torch.testing.assert_close(metrics.square(image, dino_file[1]), expected, atol=1e-6, rtol=0)
    assert list(scorer_files.towers.normalisation(dino_file[1].encoder)[0]) == [0.485, 0.456, 0.406]


def floats(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def test_the_nodes_pictures_differ_by_a_rounding_where_they_are_soft_and_square(clip_file, dino_file):
    """Hard edges overshoot, which PIL clips once more; other shapes are cut up to a pixel elsewhere."""
    for _, scorer in (clip_file, dino_file):
        std = torch.tensor(scorer_files.towers.normalisation(scorer.encoder)[1]).view(3, 1, 1)
        encoder = metrics.ImageEncoder(scorer, "cpu")
        for side in (224, 512, 777):
            image = picture(side, side)
            node, ours = scorer_files.prepare(scorer, floats(image)), metrics.square(image, scorer)
            assert ((node[0] - ours) * std).abs().max() < 1.5 / 255
            node = scorer_files.embed(encoder.tower, node)
            assert F.cosine_similarity(node, encoder([image])).item() > 0.9999


# --- encoders ---


IMAGES = [picture(224, 224, 1), picture(300, 200, 2), picture(90, 260, 3)]


def test_clip_equals_transformers(clip_file):
    model, scorer = clip_file
    values = CLIPImageProcessorPil()(IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=values).pooler_output
    got = metrics.ImageEncoder(scorer, "cpu")(IMAGES)
    torch.testing.assert_close(F.normalize(got), F.normalize(expected), atol=1e-5, rtol=0)
    assert (F.normalize(got)[0] - F.normalize(got)[1]).abs().max() > 1e-2


def test_dino_equals_transformers_behind_dinos_transform(dino_file):
    model, scorer = dino_file
    values = torch.stack([torchvisions(scorer)(image) for image in IMAGES])
    with torch.no_grad():
        expected = model(pixel_values=values).last_hidden_state[:, 0]
    got = metrics.ImageEncoder(scorer, "cpu")(IMAGES)
    torch.testing.assert_close(F.normalize(got), F.normalize(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("image_size", [224, 518])
def test_dinov2_equals_transformers_with_positions_for_any_size(tmp_path, image_size, registers):
    model = dinov2(image_size, registers)
    scorer = dino_scorer("v2", saved(model, tmp_path))
    values = torch.stack([torchvisions(scorer)(image) for image in IMAGES])
    with torch.no_grad():
        expected = model(pixel_values=values).last_hidden_state[:, 0]
    got = metrics.ImageEncoder(scorer, "cpu")(IMAGES)
    torch.testing.assert_close(F.normalize(got), F.normalize(expected), atol=1e-5, rtol=0)


# --- CLIP-IQA, in float64, from its definition ---

WIDTH, LAYERS, OUT, TEXT, CONTEXT = 8, (1, 2, 1, 1), 48, 64, 77


def resnet_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """OpenAI's names; convolutions and linear layers hold half precision numbers, as its code leaves them."""
    g = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}

    def weight(key, *shape):
        fan = math.prod(shape[1:])
        state[key] = (torch.randn(shape, generator=g) * (1.6 / fan) ** 0.5).half().to(dtype)

    def norm(key, width, batch=True):
        state[f"{key}.weight"] = 0.7 + 0.6 * torch.rand(width, generator=g)
        state[f"{key}.bias"] = 0.3 * torch.randn(width, generator=g)
        if batch:
            state[f"{key}.running_mean"] = 0.2 * torch.randn(width, generator=g)
            state[f"{key}.running_var"] = 0.5 + torch.rand(width, generator=g)
            state[f"{key}.num_batches_tracked"] = torch.tensor(7)

    def dense(key, outputs, inputs):
        weight(f"{key}.weight", outputs, inputs)
        state[f"{key}.bias"] = (0.3 * torch.randn(outputs, generator=g)).half().to(dtype)

    for number, (inputs, outputs) in enumerate(((3, WIDTH // 2), (WIDTH // 2, WIDTH // 2), (WIDTH // 2, WIDTH)), 1):
        weight(f"visual.conv{number}.weight", outputs, inputs, 3, 3)
        norm(f"visual.bn{number}", outputs)
    inputs = WIDTH
    for layer, blocks in enumerate(LAYERS, 1):
        planes = WIDTH * 2 ** (layer - 1)
        for block in range(blocks):
            key = f"visual.layer{layer}.{block}"
            weight(f"{key}.conv1.weight", planes, inputs, 1, 1)
            weight(f"{key}.conv2.weight", planes, planes, 3, 3)
            weight(f"{key}.conv3.weight", 4 * planes, planes, 1, 1)
            for number, width in enumerate((planes, planes, 4 * planes), 1):
                norm(f"{key}.bn{number}", width)
            if block == 0:
                weight(f"{key}.downsample.0.weight", 4 * planes, inputs, 1, 1)
                norm(f"{key}.downsample.1", 4 * planes)
            inputs = 4 * planes
    state["visual.attnpool.positional_embedding"] = 5 * torch.randn(50, inputs, generator=g)  # must not matter
    for name in "qkv":
        dense(f"visual.attnpool.{name}_proj", inputs, inputs)
    dense("visual.attnpool.c_proj", OUT, inputs)
    state["token_embedding.weight"] = torch.randn(49408, TEXT, generator=g)
    state["positional_embedding"] = torch.randn(CONTEXT, TEXT, generator=g)
    for block in range(2):
        key = f"transformer.resblocks.{block}"
        norm(f"{key}.ln_1", TEXT, False), norm(f"{key}.ln_2", TEXT, False)
        dense(f"{key}.attn.in_proj", 3 * TEXT, TEXT)
        state[f"{key}.attn.in_proj_weight"] = state.pop(f"{key}.attn.in_proj.weight")
        state[f"{key}.attn.in_proj_bias"] = state.pop(f"{key}.attn.in_proj.bias")
        dense(f"{key}.attn.out_proj", TEXT, TEXT)
        dense(f"{key}.mlp.c_fc", 4 * TEXT, TEXT)
        dense(f"{key}.mlp.c_proj", TEXT, 4 * TEXT)
    norm("ln_final", TEXT, False)
    weight("text_projection", TEXT, OUT)
    state["logit_scale"] = torch.tensor(4.6052)
    return state


def batch_norm(s, key, x):
    mean, var, weight, bias = (
        s[f"{key}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def attention(q, k, v, heads, mask=0.0):
    """(n, c), (m, c), (m, c) -> (n, c)"""
    q, k, v = (x.view(len(x), heads, -1).movedim(1, 0) for x in (q, k, v))
    found = ((q @ k.mT) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
    return found.movedim(0, 1).flatten(1)


def reference_image(s, x):
    """Pixels (3, h, w) in 0..1 -> (OUT,): the modified ResNet of CLIP's paper, its pool without positions."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    s = {key.removeprefix("visual."): value for key, value in s.items() if key.startswith("visual.")}
    x = x.double()[None]
    for number in (1, 2, 3):
        x = F.conv2d(x, s[f"conv{number}.weight"], padding=1, stride=2 if number == 1 else 1)
        x = batch_norm(s, f"bn{number}", x).relu()
    x = F.avg_pool2d(x, 2)
    for layer, blocks in enumerate(LAYERS, 1):
        for block in range(blocks):
            key, half = f"layer{layer}.{block}", layer > 1 and block == 0
            y = batch_norm(s, f"{key}.bn1", F.conv2d(x, s[f"{key}.conv1.weight"])).relu()
            y = batch_norm(s, f"{key}.bn2", F.conv2d(y, s[f"{key}.conv2.weight"], padding=1)).relu()
            y = batch_norm(s, f"{key}.bn3", F.conv2d(F.avg_pool2d(y, 2) if half else y, s[f"{key}.conv3.weight"]))
            if block == 0:
                x = F.conv2d(F.avg_pool2d(x, 2) if half else x, s[f"{key}.downsample.0.weight"])
                x = batch_norm(s, f"{key}.downsample.1", x)
            x = (x + y).relu()
    places = x[0].flatten(1).mT  # (h w, c)
    places = torch.cat([places.mean(0, keepdim=True), places])
    q, k, v = (F.linear(places, s[f"attnpool.{n}_proj.weight"], s[f"attnpool.{n}_proj.bias"]) for n in "qkv")
    pooled = attention(q[:1], k, v, heads=32 * WIDTH // 64)
    return F.linear(pooled, s["attnpool.c_proj.weight"], s["attnpool.c_proj.bias"])[0]


def reference_text(s, prompt):
    tokens = tokenize([prompt], CONTEXT)[0]
    x = s["token_embedding.weight"][tokens] + s["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -torch.inf, dtype=torch.float64).triu(1)
    for block in range(2):
        key = f"transformer.resblocks.{block}"
        y = F.layer_norm(x, (TEXT,), s[f"{key}.ln_1.weight"], s[f"{key}.ln_1.bias"])
        q, k, v = F.linear(y, s[f"{key}.attn.in_proj_weight"], s[f"{key}.attn.in_proj_bias"]).chunk(3, -1)
        y = attention(q, k, v, TEXT // 64, mask)
        x = x + F.linear(y, s[f"{key}.attn.out_proj.weight"], s[f"{key}.attn.out_proj.bias"])
        y = F.layer_norm(x, (TEXT,), s[f"{key}.ln_2.weight"], s[f"{key}.ln_2.bias"])
        y = F.linear(y, s[f"{key}.mlp.c_fc.weight"], s[f"{key}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, s[f"{key}.mlp.c_proj.weight"], s[f"{key}.mlp.c_proj.bias"])
    x = F.layer_norm(x, (TEXT,), s["ln_final.weight"], s["ln_final.bias"])
    return x[tokens.argmax()] @ s["text_projection"]


def reference_quality(state, image: Image.Image) -> float:
    s = {key: value.double() for key, value in state.items()}
    seen = F.normalize(reference_image(s, transforms.ToTensor()(image)), dim=0)
    good, bad = (100 * seen @ F.normalize(reference_text(s, p), dim=0) for p in ("Good photo.", "Bad photo."))
    return (good.exp() / (good.exp() + bad.exp())).item()


def resnet_file(folder, state=None, name="rn50.safetensors") -> clip_iqa.ResNetFile:
    save_file(resnet_state() if state is None else state, folder / name)
    return clip_iqa.identify(name, read_header(folder / name))


def test_clip_iqa_equals_its_definition_at_every_size(tmp_path):
    state = resnet_state()
    scorer = clip_iqa.QualityScorer(resnet_file(tmp_path, state), "cpu")
    images = [picture(224, 224, 1), picture(224, 224, 2), picture(96, 160, 3), picture(100, 75, 4), picture(32, 32, 5)]
    got = scorer(images)
    expected = torch.tensor([reference_quality(state, image) for image in images], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert ((expected > 0.01) & (expected < 0.99)).sum() >= 2  # not all at an end, where anything would agree
    s = {key: value.double() for key, value in state.items()}
    seen = torch.stack([reference_image(s, transforms.ToTensor()(image)) for image in images])
    torch.testing.assert_close(
        F.normalize(scorer.embed(images).double()), F.normalize(seen), atol=1e-6, rtol=0
    )  # the probability alone could agree by chance


@pytest.mark.parametrize("store", ["halves beside float32 norms", "nested in a checkpoint", "without counters"])
def test_clip_iqa_reads_every_layout_to_the_same_score(tmp_path, store):
    state = resnet_state()
    expected = clip_iqa.QualityScorer(resnet_file(tmp_path, state), "cpu")([picture(96, 96)])
    if store == "halves beside float32 norms":  # what a TorchScript file of OpenAI's holds
        state = resnet_state(torch.float16) | {
            "input_resolution": torch.tensor(224),
            "context_length": torch.tensor(77),
        }
    elif store == "nested in a checkpoint":
        state = {f"module.{key}": value for key, value in state.items()}
    else:
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    file = resnet_file(tmp_path, state, "other.safetensors")
    assert file.openai is True
    torch.testing.assert_close(clip_iqa.QualityScorer(file, "cpu")([picture(96, 96)]), expected, atol=1e-9, rtol=0)


# --- the aesthetic predictor ---


def head_state(seed=0, bias=aesthetic._STANDARD_BIAS) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    layers = torch.nn.Sequential(
        *(torch.nn.Linear(768, 1024), torch.nn.Dropout(), torch.nn.Linear(1024, 128), torch.nn.Dropout()),
        *(torch.nn.Linear(128, 64), torch.nn.Dropout(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1)),
    )
    state = {f"layers.{key}": torch.randn(v.shape, generator=g) * 0.05 for key, v in layers.state_dict().items()}
    return state | {"layers.7.bias": torch.tensor([bias])}


def reference_aesthetic(state, embeddings: np.ndarray) -> np.ndarray:
    x = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].double().numpy().T + state[f"layers.{number}.bias"].double().numpy()
    return x[:, 0]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_aesthetic_predictor_equals_five_matrix_products(tmp_path, ending):
    state, path = head_state(), tmp_path / f"head.{ending}"
    torch.save(state, path) if ending == "pth" else save_file(state, path)
    file = aesthetic.identify("head", read_header(path))
    embeddings = torch.randn(4, 768, generator=torch.Generator().manual_seed(1)) * 9
    got = aesthetic.AestheticHead(file)(embeddings)
    np.testing.assert_allclose(got.numpy(), reference_aesthetic(state, embeddings.double().numpy()), atol=1e-9)
    torch.testing.assert_close(aesthetic.AestheticHead(file)(0.1 * embeddings), got)  # only the direction counts


# --- all of it, from files to rows ---


def test_every_column_from_files_equals_the_publishers_code(tmp_path):
    weights, shots = tmp_path / "weights", tmp_path / "shots"
    for folder in ("clip", "l14", "dino", "v2"):
        (weights / folder).mkdir(parents=True)
    shots.mkdir()
    small, large, dino, second = clip(), clip(768, patch_size=14, image_size=56), vit(), dinov2()
    save_file(resnet_state(), weights / "rn50.safetensors")
    torch.save(head_state(), weights / "head.pth")
    use = {
        "clip": saved(small, weights / "clip"),
        "dino": saved(dino, weights / "dino"),
        "clip-l14": saved(large, weights / "l14"),
        "dinov2": saved(second, weights / "v2"),
        "clip-rn50": weights / "rn50.safetensors",
        "aesthetic": weights / "head.pth",
    }
    found = instruments.find(weights, use)
    assert not found.missing and list(found.columns) == list(instruments.COLUMNS)
    made = [picture(96, 96, 1), picture(96, 96, 2), picture(128, 80, 3)]
    real = [picture(120, 90, 4), picture(64, 64, 5)]
    for number, image in enumerate(made + real):
        image.save(shots / f"{number}.png")
    subject = Subject("dog", "live", (shots / "3.png", shots / "4.png"), "dog")
    cases = (Case(subject, 0, "a dog in the jungle"), Case(subject, 1, "a dog on the moon"))
    pictures = [
        Picture(cases[0], 0, 0.0, shots / "0.png"),
        Picture(cases[0], 1, 0.5, shots / "1.png"),
        Picture(cases[1], 0, 1.0, shots / "2.png"),
    ]
    measured = found.score(pictures, batch=2, device="cpu")

    def clips(model):
        side = model.config.vision_config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        ids = tokenize([p.case.prompt for p in pictures], 77)
        with torch.no_grad():
            values = processor(made + real, return_tensors="pt")["pixel_values"]
            seen = model.get_image_features(pixel_values=values).pooler_output.double()
            return seen[:3], seen[3:], model.get_text_features(input_ids=ids).pooler_output.double()

    def dinos(model):
        values = torch.stack([torchvisions(dino_scorer("d", use["dino"]))(image) for image in made + real])
        with torch.no_grad():
            seen = model(pixel_values=values).last_hidden_state[:, 0].double()
        return seen[:3], seen[3:]

    def mean_cosine(ours, theirs):
        return F.cosine_similarity(ours[:, None], theirs[None], dim=2).mean(1)

    (seen, theirs, said), (large_seen, large_theirs, large_said) = clips(small), clips(large)
    expected = {
        "CLIP-T": F.cosine_similarity(seen, said),
        "CLIP-I": mean_cosine(seen, theirs),
        "DINO-I": mean_cosine(*dinos(dino)),
        "CLIP-IQA": [reference_quality(resnet_state(), image) for image in made],
        "Aesthetic": reference_aesthetic(head_state(), large_seen.numpy()),
        "CLIP-T (L/14)": F.cosine_similarity(large_seen, large_said),
        "CLIP-I (L/14)": mean_cosine(large_seen, large_theirs),
        "DINO-I (DINOv2)": mean_cosine(*dinos(second)),
    }
    for column, values in expected.items():
        got = [row.scores[column] for row in measured.rows]
        np.testing.assert_allclose(got, np.asarray(values), atol=1e-5, rtol=0, err_msg=column)
        assert len({round(value, 5) for value in got}) > 1, column
    torch.testing.assert_close(F.normalize(measured.features.double()), F.normalize(dinos(dino)[0]), atol=1e-5, rtol=0)
    assert [(r.subject, r.category, r.case, r.image, r.gate) for r in measured.rows] == [
        ("dog", "live", "00", 0, 0.0),
        ("dog", "live", "00", 1, 0.5),
        ("dog", "live", "01", 0, 1.0),
    ]
    again = found.score(pictures, batch=1, device="cpu")
    for one, other in zip(measured.rows, again.rows):
        assert dict(one.scores) == pytest.approx(dict(other.scores), abs=1e-5)
    assert dataclasses.replace(again, rows=()) == dataclasses.replace(measured, rows=())
