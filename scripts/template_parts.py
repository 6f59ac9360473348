"""What the template workflows of templates.py are made of: nodes, notes, and what every template begins with."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flexip_core.untrained import mini

NARROW, WIDE, RESULT = 320, 400, 480  # of a column
NOTE_COLORS = ("#432", "#653")
# No inline code in a note: Nodes 2.0 draws it in dark blue on grey.
FILES = """
| file | folder |
| --- | --- |
| SD1.5 or SDXL checkpoint | models/checkpoints |
| FlexIP checkpoint for the same base | models/flexip |
| CLIP and DINOv2 image encoders that it asks for | models/clip_vision |

**Choose** your own files: any names will do, they are recognised by their contents. The names here are those of the mini models, which are **untrained** and draw coloured noise. To see the workflow run with them, in a git clone of the pack (an installed pack is without the script), with ComfyUI's Python:

**python scripts/mini_models.py ComfyUI/models**"""


@dataclass(eq=False)
class Node:
    """`inputs`: a wire is (node, output), everything else a widget's value. `tall` is the least height, for a preview. `models`:
    where the files that its widgets name can be had."""

    kind: str
    inputs: dict[str, Any]
    title: str = ""
    tall: int = 0
    colors: tuple[str, str] | None = None
    models: list[dict[str, str]] = field(default_factory=list)

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


@dataclass(eq=False)
class Group:
    title: str
    nodes: list[Node]
    color: str = "#3f789e"


@dataclass(eq=False)
class Template:
    columns: list[tuple[int, list[Node]]]  # width, nodes from top to bottom
    groups: list[Group] = field(default_factory=list)


def node(kind: str, title: str = "", tall: int = 0, **inputs: Any) -> Node:
    return Node(kind, inputs, title, tall)


def note(title: str, text: str, tall: int = 560, files: str = FILES) -> Node:
    return Node("MarkdownNote", {"text": f"## {title}\n{text}\n{files}"}, "Read me", tall, NOTE_COLORS)


class Base:
    """What every template begins with. `size`, `settings` and `negative_text`: of the latents and samplers."""

    size = 512
    settings: dict[str, Any] = {"cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    negative_text = "blurry, low quality"
    model: tuple
    clip: tuple
    vae: tuple
    adapters: tuple

    def encode(self, picture: tuple, title: str = "") -> Node:
        return node("EncodeReference", title, 400, adapters=self.adapters, image=picture)

    def prompt(self, text: Any, title: str = "Prompt", tall: int = 130) -> Node:
        return node("CLIPTextEncode", title, tall, clip=self.clip, text=text)

    def negative(self) -> Node:
        return self.prompt(self.negative_text, "Negative prompt", 100)

    def latent(self, batch_size: int = 1, width: int = 0) -> Node:
        return node("EmptyLatentImage", width=width or self.size, height=self.size, batch_size=batch_size)

    def apply(self, reference: tuple, title: str = "", tall: int = 480, **inputs: Any) -> Node:
        wires = {"model": self.model, "adapters": self.adapters, "reference": reference}
        return node("ApplyFlexIPGate", title, tall, **{**wires, **inputs})

    def sampler(
        self, model: Node, positive: Node, negative: Node, latent: Node, kind: str = "KSampler", **inputs: Any
    ) -> Node:
        wires = {"model": model[0], "positive": positive[0], "negative": negative[0], "latent_image": latent[0]}
        settings = {"seed": 1, "steps": 20, **self.settings}
        if kind != "FlexIPAutoGate":  # whose own default it is
            settings["control_after_generate"] = "fixed"
        return node(kind, **{**wires, **settings, **inputs})


class Files(Base):
    """Files that the user has: names of the mini models stand for them."""

    def __init__(self, base: str = mini.MINI_BASE, **adapters: str) -> None:
        self.checkpoint = node("CheckpointLoaderSimple", ckpt_name=base)
        self.loader = node("LoadFlexIPAdapters", **(adapters or {"preservation": mini.MINI_FLEXIP}))
        self.model, self.clip, self.vae = self.checkpoint[0], self.checkpoint[1], self.checkpoint[2]
        self.adapters = self.loader[0]

    def picture(self, title: str = "Reference picture") -> Node:
        return node("LoadImage", title, 340, image="example.png")

    def result(self, latent: tuple, name: str, tall: int = 540) -> list[Node]:
        decode = node("VAEDecode", samples=latent, vae=self.vae)
        return [decode, node("SaveImage", tall=tall, images=decode[0], filename_prefix=f"flexip/{name}")]


class Demo(Base):
    """The small trained world, where nothing has to be downloaded and the gate shows."""

    size = 64
    settings = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    negative_text = ""

    def __init__(self, subject: int, title: str = "") -> None:
        self.models = node("FlexIPDemoModels", title, 280, subject=subject)
        self.model, self.clip, self.vae, self.adapters, self.reference, self.words = map(
            self.models.__getitem__, range(6)
        )

    def result(self, latent: tuple, name: str, tall: int = 540) -> list[Node]:
        decode = node("VAEDecode", samples=latent, vae=self.vae)
        large = enlarged(decode[0])
        return [decode, large, node("SaveImage", tall=tall, images=large[0], filename_prefix=f"flexip/{name}")]


def enlarged(picture: tuple, title: str = "Enlarged") -> Node:
    return node("ImageScaleBy", title, image=picture, upscale_method="nearest-exact", scale_by=4.0)
