"""A workflow as a recipe: the API prompt that makes one case's pictures, with places for reference, text, seed and gates.

Any workflow will do that has one FlexIPSampler, a LoadImage behind EncodeReference, a CLIPTextEncode behind the sampler's
positive, and a SaveImage of the pictures that come from the sampler's latent. What does not lead to that SaveImage is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.parse import read_json
from .workflow import nodes_of, set_inputs, to_prompt

DEFAULT, DEMO = "generate.json", "generate_demo.json"  # beside this file, in API format
SAMPLER, APPLY = "FlexIPSampler", "ApplyFlexIPGate"
LATENT, REPORT = 0, 2  # outputs of the sampler
REPORT_NODE = "flexip_report"
SAMPLER_SETTINGS = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
SIZE_SETTINGS = ("width", "height")
FILE_SETTINGS = {
    "checkpoint": ("CheckpointLoaderSimple", "ckpt_name"),
    "adapters": ("LoadFlexIPAdapters", "preservation"),
}
SETTINGS = (*SAMPLER_SETTINGS, *SIZE_SETTINGS, *FILE_SETTINGS, "negative")

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    prompt: Prompt
    sampler: str  # ids of nodes
    picture: str  # LoadImage
    text: str  # the positive CLIPTextEncode
    output: str
    size: str | None  # the node with width and height, if there is one
    negative: str | None

    def filled(self, picture: str, text: str, seed: int, knob: str, values: Sequence[float]) -> Prompt:
        """The prompt of one case. `picture` as LoadImage knows it; without values the workflow's own gate stays."""
        prompt = copy.deepcopy(self.prompt)
        prompt[self.picture]["inputs"]["image"] = picture
        prompt[self.text]["inputs"]["text"] = text
        lists = {"gates": "", "strengths": "", f"{knob}s": ", ".join(f"{value:g}" for value in values)}
        prompt[self.sampler]["inputs"].update(seed=seed, **lists)
        return prompt

    def gate(self) -> Any:
        """Of the workflow's Apply nodes, where they agree: what a picture without a sweep of gates is made at."""
        found = [self._value(node, "gate") for node in nodes_of(self.prompt, APPLY)]
        return found[0] if found and all(value == found[0] for value in found) else None

    def header(self) -> dict[str, Any]:
        """What a table says about the sampling; a value that another node computes is given as that node."""
        places = {name: (self.sampler, name) for name in SAMPLER_SETTINGS}
        places |= {name: (self.size, name) for name in SIZE_SETTINGS}
        places |= {"negative": (self.negative, "text")}
        return {name: self._value(*place) for name, place in places.items()}

    def _value(self, node: str | None, name: str) -> Any:
        value = self.prompt[node]["inputs"].get(name) if node else None
        return f"from {_title(self.prompt, value[0])}" if _is_link(value) else value


def read_recipe(
    workflow: str | Path | None, settings: Mapping[str, Any], object_info: Callable[[], Mapping[str, Any]]
) -> Recipe:
    """`workflow`: a file, saved by the page or in API format, or None for the shipped one, which wants the settings
    checkpoint and adapters. `object_info` is only asked for a workflow of the page. ValueError, one sentence, if it will not do."""
    path = Path(workflow or Path(__file__).with_name(DEFAULT))
    try:
        data = read_json(path)
    except OSError as error:
        raise ValueError(f"The workflow {path} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ValueError(f"{path} is not a workflow: it is not JSON.") from None
    if isinstance(data, dict) and {"nodes", "links"} <= data.keys():
        data = to_prompt(data, object_info())
    if not isinstance(data, dict) or not all(_is_node(node) for node in data.values()):
        raise ValueError(f"{path} is not a workflow; save one in ComfyUI, with Save or Export (API).")
    try:
        return make_recipe(data, settings)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def make_recipe(workflow: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """`workflow` in API format. A setting is one of SETTINGS, or Class.input: LoadFlexIPAdapters.clip_vision."""
    prompt = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in workflow.items()}
    sampler = _only(nodes_of(prompt, SAMPLER), f"{SAMPLER} node", "it samples all gates from the same noise")
    prompt[sampler]["inputs"].pop("vae", None)  # the contact sheets are not needed
    output = _only(
        [node for node in nodes_of(prompt, "SaveImage") if _comes_from(prompt, node, [sampler, LATENT])],
        f"SaveImage node for pictures decoded from the {SAMPLER}'s latent",
        "wire VAE Decode to the sampler's latent and SaveImage to that (the contact sheet does not count)",
    )
    # PreviewImage writes the same file, but into a folder that the server clears
    prompt[output] = {"class_type": "PreviewImage", "inputs": {"images": prompt[output]["inputs"]["images"]}}
    prompt = {node: prompt[node] for node in (*_behind(prompt, output), output)}
    encoders = nodes_of(prompt, "EncodeReference")
    picture = _only(
        sorted({node for encode in encoders for node in _of_class(prompt, encode, "image", "LoadImage")}),
        "LoadImage node behind EncodeReference",
        "it gets the subject's picture",
    )
    text = _only(
        _of_class(prompt, sampler, "positive", "CLIPTextEncode"),
        f"CLIPTextEncode node behind the {SAMPLER}'s positive",
        "it gets the prompt",
    )
    sizes = [
        node for node in _behind(prompt, sampler, "latent_image") if {*SIZE_SETTINGS} <= prompt[node]["inputs"].keys()
    ]
    negatives = [node for node in _of_class(prompt, sampler, "negative", "CLIPTextEncode") if node != text]
    recipe = Recipe(prompt, sampler, picture, text, output, _one_or_none(sizes), _one_or_none(negatives))
    _apply(recipe, settings)
    if recipe.size and "batch_size" in prompt[recipe.size]["inputs"]:
        prompt[recipe.size]["inputs"]["batch_size"] = 1
    for name, (kind, key) in FILE_SETTINGS.items():
        if any(prompt[node]["inputs"].get(key) == "" for node in nodes_of(prompt, kind)):
            raise ValueError(f"give the setting {name}, the name of a file as the {kind} node lists it.")
    prompt[REPORT_NODE] = {"class_type": "PreviewAny", "inputs": {"source": [sampler, REPORT]}}
    return recipe


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Between two prompts: "FlexIPSampler (9) steps: 20 there, 30 now"."""
    found = []
    for node in sorted({*before, *after}):
        old, new = before.get(node), after.get(node)
        if old is None or new is None or old["class_type"] != new["class_type"]:
            kinds = [f"{item['class_type']} ({node})" if item else "nothing" for item in (old, new)]
            found.append(f"node {kinds[0]} there, {kinds[1]} now")
            continue
        for name in sorted({*old["inputs"], *new["inputs"]}):
            values = [item["inputs"].get(name) for item in (old, new)]
            if values[0] != values[1]:
                found.append(f"{old['class_type']} ({node}) {name}: {values[0]!r} there, {values[1]!r} now")
    return found


def _apply(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        kind, dot, key = name.partition(".")
        if name in SAMPLER_SETTINGS:
            set_inputs(recipe.prompt, SAMPLER, **{name: value})
        elif name in SIZE_SETTINGS or name == "negative":
            node, key = (recipe.negative, "text") if name == "negative" else (recipe.size, name)
            if node is None:
                raise ValueError(
                    f"the setting {name} has no place in this workflow, or more than one; set it in the workflow."
                )
            recipe.prompt[node]["inputs"][key] = value
        elif name in FILE_SETTINGS:
            kind, key = FILE_SETTINGS[name]
            set_inputs(recipe.prompt, kind, **{key: value})
        elif dot:
            set_inputs(recipe.prompt, kind, **{key: value})
        else:
            raise ValueError(
                f"there is no setting {name!r}; there are {', '.join(SETTINGS)}, and Class.input for any node."
            )


def _only(nodes: list[str], what: str, why: str) -> str:
    if len(nodes) != 1:
        raise ValueError(f"the workflow has {len(nodes) or 'no'} {what}, exactly one is needed; {why}.")
    return nodes[0]


def _one_or_none(nodes: list[str]) -> str | None:
    return nodes[0] if len(nodes) == 1 else None


def _of_class(prompt: Prompt, node: str, name: str, kind: str) -> list[str]:
    return [found for found in _behind(prompt, node, name) if prompt[found]["class_type"] == kind]


def _behind(prompt: Prompt, node: str, name: str | None = None) -> list[str]:
    """The nodes that a node, or one input of it, is computed from: nearest first."""
    inputs = prompt[node]["inputs"]
    found = list(dict.fromkeys(_sources(prompt, node, inputs if name is None else {name: inputs.get(name)})))
    for nearer in found:  # grows
        found += [far for far in _sources(prompt, nearer, prompt[nearer]["inputs"]) if far not in found]
    return found


def _comes_from(prompt: Prompt, node: str, link: list) -> bool:
    return any(link in prompt[one]["inputs"].values() for one in (node, *_behind(prompt, node)))


def _sources(prompt: Prompt, node: str, inputs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in inputs.items():
        if _is_link(value):
            if value[0] not in prompt:
                raise ValueError(f"{_title(prompt, node)} {name} is wired to node {value[0]}, which is not there.")
            yield value[0]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _title(prompt: Prompt, node: str) -> str:
    return f"{prompt[node]['class_type']} ({node})"
