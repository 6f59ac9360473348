"""With the trained demo weights, through our nodes and ComfyUI's own sampler: gate 1 keeps the subject, gate 0 follows the prompt.

Identity is told without a trained judge: by the hues of the pixels of the subject, which no text ever names.
"""

import colorsys
import json
import math
from pathlib import Path

import folder_paths
import pytest
import torch
from flexip_pack.flexip_core.mini_world import world
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.demo import FlexIPDemoModels
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.sampler import FlexIPSampler

import nodes as core_nodes

SUBJECTS = 24
GATES = (0.0, 0.25, 0.5, 0.75, 1.0)


def encode(clip, text):
    return core_nodes.CLIPTextEncode().encode(clip, text)[0]


def identity_of(picture: torch.Tensor, hues: list[float]) -> float:
    """Cosine between the subject's two hues and those of the upper and lower half of what stands out from the ground."""
    pixels = picture[::4, ::4]  # the world's own
    away = (pixels - ground_of(picture)).norm(dim=-1) > 0.35
    places = [(y, *colorsys.rgb_to_hsv(*pixels[y, x].tolist())) for y, x in away.nonzero().tolist()]
    places = [(y, h) for y, h, s, v in places if s > 0.6 and v > 0.4]
    if len(places) < 8:
        return 0.0
    middle = (places[0][0] + places[-1][0]) / 2
    halves = ([h for y, h in places if y < middle], [h for y, h in places if y > middle])
    cosines = [[math.cos(2 * math.pi * (h - hue)) for h in half] for half, hue in zip(halves, hues)]
    return sum(sum(half) / max(1, len(half)) for half in cosines) / 2


def ground_of(picture: torch.Tensor) -> torch.Tensor:
    """The colour that most of the border has."""
    border = torch.cat([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, :4].reshape(-1, 3)])
    return border.median(0).values


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Per subject: its hues, its reference, the picture of each gate, and the caption that the prompt was made of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "temp_directory", str(tmp_path_factory.mktemp("previews")))
        out = []
        for subject in range(SUBJECTS):
            model, clip, vae, adapters, reference, prompt = FlexIPDemoModels.execute(subject).args
            encoded = EncodeReference.execute([adapters], [reference], ["squash"]).args[0]
            gated = ApplyFlexIPGate.execute(model, adapters, encoded, 0.6, 1.0, 0.0, 1.0).args[0]
            latent = core_nodes.EmptyLatentImage().generate(64, 64, 1)[0]
            settings = (subject, 20, 2.0, "euler", "normal", encode(clip, prompt), encode(clip, ""), latent, 1.0)
            result = FlexIPSampler.execute(gated, *settings, ", ".join(map(str, GATES))).args[0]
            scene = world.test_set(1, subject)
            pictures = vae.decode(result["samples"])
            out.append((scene.seen.hues[0].tolist(), reference[0], pictures, scene.prompts("conflict")[0]))
        return out


def identity(sweeps, gate):
    number = GATES.index(gate)
    return sum(identity_of(pictures[number], hues) for hues, _, pictures, _ in sweeps) / len(sweeps)


def test_gate_1_keeps_the_subject_and_gate_0_lets_it_go(sweeps):
    real = sum(identity_of(reference, hues) for hues, reference, _, _ in sweeps) / len(sweeps)
    assert real > 0.9, "what the measure says of the references themselves"
    assert identity(sweeps, 1.0) > 0.75 * real
    assert identity(sweeps, 0.0) < identity(sweeps, 1.0) - 0.25


def test_identity_grows_with_the_gate(sweeps):
    scores = [identity(sweeps, gate) for gate in GATES]
    assert all(after > before - 0.1 for before, after in zip(scores, scores[1:])), scores


def test_the_prompt_decides_the_ground_at_every_gate(sweeps):
    for _, _, pictures, caption in sweeps:
        ground = int(caption[world.GROUND]) - world.FIRST["ground"]
        for picture in pictures:
            distances = (world._GROUNDS - ground_of(picture)).norm(dim=1)
            assert int(distances.argmin()) == ground


def test_the_template_shows_what_its_note_says():
    """With its own subject, prompt and seed, in every row: 0.4 at most with gate 0, 0.95 at least with gate 1."""
    text = (Path(__file__).resolve().parents[2] / "workflows" / "flexip_demo_world.json").read_text(encoding="utf-8")
    values = {node["type"]: node.get("widgets_values") for node in json.loads(text)["nodes"]}
    [subject], (width, height, rows) = values["FlexIPDemoModels"], values["EmptyLatentImage"]
    seed, _, *settings, denoise, gates, _ = values["FlexIPSampler"]
    [note] = values["MarkdownNote"]
    assert "0.4 at most with gate 0, 0.95 at least with gate 1" in note
    model, clip, vae, adapters, reference, prompt = FlexIPDemoModels.execute(subject).args
    encoded = EncodeReference.execute([adapters], [reference], values["EncodeReference"]).args[0]
    gated = ApplyFlexIPGate.execute(model, adapters, encoded, *values["ApplyFlexIPGate"]).args[0]
    latent = core_nodes.EmptyLatentImage().generate(width, height, rows)[0]
    conditionings = encode(clip, prompt), encode(clip, "")
    result = FlexIPSampler.execute(gated, seed, *settings, *conditionings, latent, denoise, gates).args[0]
    hues = world.test_set(1, subject).seen.hues[0].tolist()
    scores = [identity_of(picture, hues) for picture in vae.decode(result["samples"])]
    assert max(scores[:rows]) <= 0.4 and min(scores[-rows:]) >= 0.95, scores
