"""Makes the template workflows of templates.py: each is built in the real page, saved as the page saves it, run, and photographed.

python scripts/make_workflows.py --comfyui TREE [NAME ...]       (with ComfyUI's own Python and tests/requirements.txt)

Writes workflows/NAME.json and its thumbnail NAME.jpg. LOOK at the thumbnail afterwards; --full keeps it in full size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import REPO, SETTLE_MS, Image, Page, comfyui_pages, picture, run, set_widgets
from template_parts import Template
from templates import TEMPLATES

FOLDER = REPO / "workflows"
THUMBNAIL_WIDTH, QUALITY = 640, 85
SMALL = {  # for the run that is photographed
    "EmptyLatentImage": {"width": 256, "height": 256},
    "KSampler": {"steps": 8},
    "FlexIPSampler": {"steps": 4},
    "FlexIPAutoGate": {"steps": 2},
}
# Columns stand side by side, their nodes under each other. A node is as high as it must be, or higher if asked, with room for
# Nodes 2.0: its widgets are higher, it has the pack's name inside, and it grows by what it shows after a run.
BUILD = """async ({ nodes, columns, groups }) => {
    const [TITLE, GAP_X, GAP_Y, GROUP] = [30, 70, 26, 40], frame = () => new Promise(requestAnimationFrame);
    app.graph.clear();
    const made = nodes.map(spec => {
        const node = LiteGraph.createNode(spec.kind);
        if (!node) throw new Error(`there is no node ${spec.kind}`);
        app.graph.add(node);
        if (spec.title) node.title = spec.title;
        if (spec.models.length) node.properties.models = spec.models;
        if (spec.colors) [node.color, node.bgcolor] = spec.colors;
        for (const [name, value] of Object.entries(spec.widgets)) {
            // the page calls the widget behind a seed "control after generate"
            const widget = node.widgets?.find(w => w.name.replaceAll(' ', '_') == name) ?? (spec.kind == 'MarkdownNote' && node.widgets[0]);
            if (!widget) throw new Error(`${spec.kind} has no widget ${name}`);
            widget.value = value;
        }
        return node;
    });
    for (const [number, spec] of nodes.entries()) for (const [name, [source, output]] of Object.entries(spec.wires)) {
        const slot = made[number].inputs.findIndex(i => i.name == name);
        if (slot < 0 || !made[source].connect(output, made[number], slot)) throw new Error(`${spec.kind}.${name} cannot be wired`);
        await frame(); await frame(); // a growing input adds its next socket
    }
    let x = 0;
    for (const column of columns) {
        let y = 0;
        for (const number of column.nodes) {
            const node = made[number];
            if (groups.some(group => group.nodes[0] == number)) y += GROUP;
            const room = 5 * (node.widgets?.length ?? 0) + (/FlexIP|EncodeReference/.test(node.type) ? 26 : 0);
            node.setSize([column.width, Math.max(nodes[number].tall, node.computeSize()[1] + room)]);
            node.pos = [x, y];
            y += node.size[1] + TITLE + GAP_Y;
            if (groups.some(group => group.nodes.at(-1) == number)) y += 10;
        }
        x += column.width + GAP_X;
    }
    for (const spec of groups) {
        const group = new LiteGraph.LGraphGroup(spec.title);
        app.graph.add(group);
        group.color = spec.color;
        const members = spec.nodes.map(number => made[number]);
        const left = Math.min(...members.map(n => n.pos[0])) - 10, top = Math.min(...members.map(n => n.pos[1])) - TITLE - GROUP;
        group.pos = [left, top];
        group.size = [
            Math.max(...members.map(n => n.pos[0] + n.size[0])) + 10 - left,
            Math.max(...members.map(n => n.pos[1] + n.size[1])) + 10 - top,
        ];
    }
    await frame();
    return app.graph.serialize();
}"""


def as_plain(template: Template) -> dict[str, Any]:
    """For BUILD: nodes by their number."""
    nodes = [node for _, column in template.columns for node in column]
    number = {node: index for index, node in enumerate(nodes)}
    plain = []
    for node in nodes:
        wires = {name: value for name, value in node.inputs.items() if isinstance(value, tuple)}
        plain.append(
            {
                "kind": node.kind,
                "title": node.title,
                "tall": node.tall,
                "colors": node.colors,
                "models": node.models,
                "wires": {name: [number[source], output] for name, (source, output) in wires.items()},
                "widgets": {name: value for name, value in node.inputs.items() if name not in wires},
            }
        )
    return {
        "nodes": plain,
        "columns": [{"width": width, "nodes": [number[node] for node in column]} for width, column in template.columns],
        "groups": [
            {"title": group.title, "color": group.color, "nodes": [number[node] for node in group.nodes]}
            for group in template.groups
        ],
    }


def public_files(templates: Iterable[Template]) -> set[str]:
    """As paths in ComfyUI's folder."""
    nodes = [node for template in templates for _, column in template.columns for node in column]
    return {f"models/{model['directory']}/{model['name']}" for node in nodes for model in node.models}


def build(page: Page, name: str, template: Template) -> dict[str, Any]:
    """The workflow as the page saves it, with the same ids every time."""
    workflow = page.evaluate(BUILD, as_plain(template))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
    workflow["extra"] = {"ds": {"scale": 0.6, "offset": [80, 80]}}
    for node in workflow["nodes"]:
        if node["type"] == "PreviewAny":
            node["widgets_values"] = []  # what it shows
    return workflow


def photograph(page: Page, workflow: dict[str, Any]) -> Image.Image:
    """The workflow after a small run (if all its files are here), opened from its file as a user does."""
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(SETTLE_MS)
    kinds = {node["type"] for node in workflow["nodes"]}
    for kind in SMALL.keys() & kinds if "FlexIPDemoModels" not in kinds else ():  # that world has one size, and is fast
        set_widgets(page, kind, **SMALL[kind])
    if not any("models" in node["properties"] for node in workflow["nodes"]):  # those files are names here
        run(page)
    page.wait_for_timeout(3 * SETTLE_MS)
    return picture(page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="TREE", type=Path, required=True, help="the folder of ComfyUI's main.py")
    parser.add_argument("--full", metavar="DIR", type=Path, help="also write the pictures here, unreduced")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of templates (default: all)")
    options = parser.parse_args()
    made = {name: TEMPLATES[name]() for name in options.names or TEMPLATES}
    with comfyui_pages(options.comfyui, names=public_files(made.values())) as new_page:
        for name, template in made.items():
            start, page = time.monotonic(), new_page()
            workflow = build(page, name, template)
            full = photograph(page, workflow)
            text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
            (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
            small = full.resize((THUMBNAIL_WIDTH, round(full.height * THUMBNAIL_WIDTH / full.width)), Image.LANCZOS)
            small.save(FOLDER / f"{name}.jpg", quality=QUALITY, optimize=True)
            if options.full:
                options.full.mkdir(parents=True, exist_ok=True)
                full.save(options.full / f"{name}.png")
            print(
                f"{name}: {len(workflow['nodes'])} nodes, {full.width} x {full.height}, {time.monotonic() - start:.1f} s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
