"""Turns a workflow as the web page saves it (nodes, links, widget values) into the prompt that POST /prompt takes.

The page does the same when Queue is pressed. This module knows what shipped workflows use and refuses the rest: subgraphs,
reroutes, primitives, and muted or bypassed nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE")
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`object_info` is the server's answer to GET /object_info: it gives the order of each node's widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, object_info, sources)}
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def nodes_of(prompt: Mapping[str, Any], class_type: str) -> list[str]:
    return [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]


def set_inputs(prompt: dict[str, dict[str, Any]], class_type: str, **values: Any) -> None:
    """Sets inputs of every node of a class; a name that the node does not have is a mistake."""
    nodes = nodes_of(prompt, class_type)
    if not nodes:
        raise ValueError(f"The workflow has no {class_type} node.")
    for node_id in nodes:
        unknown = sorted(set(values) - set(prompt[node_id]["inputs"]))
        if unknown:
            raise ValueError(f"{class_type} ({node_id}) has no input {', '.join(unknown)}.")
        prompt[node_id]["inputs"].update(values)


def _inputs(node: Mapping[str, Any], object_info: Mapping[str, Any], sources: Mapping[int, list]) -> dict[str, Any]:
    title = f"Node {node['id']} ({node['type']})"
    if node.get("mode", 0) != 0:
        raise ValueError(f"{title} is muted or bypassed; only active nodes can be run from here.")
    if node["type"] not in object_info:
        raise ValueError(f"{title} is not known to the server. Install the pack that contains it.")
    values = dict(_widget_values(node, object_info[node["type"]], title))
    linked = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
    return {**values, **linked}  # a wired widget keeps its value in the file, but the wire counts


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any], title: str) -> Iterator[tuple[str, Any]]:
    values = list(node.get("widgets_values") or [])
    position, uploads = 0, 0
    for name, kind, options, is_optional in _declared(info):
        if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
            continue  # a socket
        if position >= len(values):
            if is_optional and "default" in options:
                yield name, options["default"]  # added to the node after the workflow was saved
                continue
            raise ValueError(
                f"{title} saves {len(values)} widget values, but has a widget {name!r} after them. "
                "Save the workflow again with this version of its pack."
            )
        yield name, values[position]
        position += 1
        # the page puts "control after generate" behind a seed, with a value of its own
        if _has_control(name, kind, options) and position < len(values) and values[position] in CONTROL_VALUES:
            position += 1
        uploads += bool(options.get("image_upload"))  # the upload button saves a value, too, behind all others
    if len(values) - position not in (0, uploads):
        raise ValueError(
            f"{title} saves {len(values)} widget values, but its inputs use only {position} of them. "
            "Save the workflow again with this version of its pack."
        )


def _declared(info: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Every input in the page's order: name, type or list of choices, options, whether it is optional.

    A growing input is one socket here; a workflow's wires go to its parts, such as "references.reference_0", as in a prompt.
    """
    for group in ("required", "optional"):
        for name in info.get("input_order", {}).get(group, []):
            kind, *options = info["input"][group][name]
            yield name, kind, options[0] if options else {}, group == "optional"


def _has_control(name: str, kind: Any, options: Mapping[str, Any]) -> bool:
    return bool(options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")))
