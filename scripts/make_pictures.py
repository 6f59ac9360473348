"""Makes the pictures of the help pages: every node of the pack, alone, as the page draws it with all its inputs.

python scripts/make_pictures.py --comfyui TREE [NODE ...]       (with ComfyUI's own Python and tests/requirements.txt)

Writes web/docs/NODE.png. LOOK at the pictures afterwards.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import PACK, REPO, Image, Page, comfyui_pages, picture

FOLDER = REPO / "web" / "docs"
WIDTH, SHARPNESS, MARGIN, COLORS = 340, 1.5, 12, 256
IN_VUE = {"FlexIPGateSchedule": 500}  # the height of what only Nodes 2.0 draws: its curve
NODES = """pack => fetch('/object_info').then(answer => answer.json()).then(all =>
    Object.keys(all).filter(id => all[id].python_module == 'custom_nodes.' + pack))"""
# The id goes up with every node: the page remembers the values of those that were removed.
ALONE = """async ([kind, width, height]) => {
    const settings = app.extensionManager.setting;
    await settings.set('Comfy.NodeBadge.NodeSourceBadgeMode', 'None');
    await settings.set('Comfy.VueNodes.Enabled', height > 0);
    for (const node of [...app.graph.nodes]) app.graph.remove(node);
    const node = LiteGraph.createNode(kind);
    node.showAdvanced = node.widgets.some(widget => widget.options?.advanced);
    app.graph.add(node);
    node.pos = [0, 0];
    node.setSize([width, height || node.computeSize()[1]]);
}"""


def node_alone(page: Page, kind: str) -> Image.Image:
    page.evaluate(ALONE, [kind, WIDTH, IN_VUE.get(kind, 0)])
    return picture(page, MARGIN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="TREE", type=Path, required=True, help="the folder of ComfyUI's main.py")
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="ids of nodes (default: all)")
    options = parser.parse_args()
    start = time.monotonic()
    with comfyui_pages(options.comfyui, SHARPNESS) as new_page:
        page = new_page()
        kinds = options.nodes or page.evaluate(NODES, PACK)
        for kind in kinds:
            image = node_alone(page, kind).quantize(COLORS, dither=Image.Dither.NONE)
            image.save(FOLDER / f"{kind}.png", optimize=True)
    print(f"{len(kinds)} pictures, {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
