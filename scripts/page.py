"""ComfyUI's web page in a headless browser, with the pack and the mini models: for make_workflows.py and make_pictures.py.

Needs what the tests need (tests/requirements.txt, Chromium).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "scripts"), str(REPO)]
import environment
import skimage.data
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from server import ComfyServer

from flexip_core.untrained import mini

PACK = "flexip"
PICTURE = "example.png"  # every ComfyUI has it in its input folder
REFERENCE = "hero.flexip-ref.safetensors"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
READY = "window.app && app.vueAppReady && app.graph && app.graph.nodes.length > 0"
SETTLE_MS = 700  # widgets in HTML and previews follow the canvas by some frames
NO_MENUS = "#graph-canvas-container > .z-999, .p-toast, .selection-toolbox { display: none !important }"
BOX = """() => { const title = LiteGraph.NODE_TITLE_HEIGHT, boxes = [
        ...app.graph.nodes.map(n => [n.pos[0], n.pos[1] - title, n.size[0], n.size[1] + title]),
        ...app.graph.groups.map(g => [...g.pos, ...g.size])];
    const x = Math.min(...boxes.map(b => b[0])), y = Math.min(...boxes.map(b => b[1]));
    return [x, y, Math.max(...boxes.map(b => b[0] + b[2])) - x, Math.max(...boxes.map(b => b[1] + b[3])) - y]; }"""
LOOK = """([x, y, scale]) => { app.canvas.deselectAll(); app.canvas.show_info = false;
    app.canvas.ds.scale = scale; app.canvas.ds.offset = [-x, -y]; app.canvas.setDirty(true, true); }"""


@contextlib.contextmanager
def comfyui_pages(comfyui: Path, sharpness: float = 1.0, names: Iterable[str] = ()) -> Iterator[Callable[[], Page]]:
    """Opens new pages on a server of its own in a temporary folder. `sharpness`: screen pixels per pixel of the page; `names`: of
    files that are not here but shall be listed."""
    path = environment.find_browser()
    if path is None:
        raise RuntimeError(environment.NO_BROWSER)
    with tempfile.TemporaryDirectory() as folder:
        mini.make_mini_models(Path(folder) / "models")
        server = ComfyServer(comfyui, folder, packs={PACK: REPO})
        shutil.copyfile(Path(skimage.data.__file__).parent / "astronaut.png", server.base / "input" / PICTURE)
        for name in (f"input/{REFERENCE}", *names):
            (server.base / name).parent.mkdir(exist_ok=True)
            (server.base / name).touch()
        (server.base / "input" / "my_pictures" / "variant").mkdir(parents=True, exist_ok=True)
        with server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
            yield lambda: new_page(browser, server.url, sharpness)
            browser.close()


def new_page(browser: Browser, url: str, sharpness: float) -> Page:
    """Without menus. A page remembers values and pictures by node ids, so every graph gets a new one, and the server forgets, too."""
    for context in browser.contexts:
        context.close()
    page = browser.new_page(viewport={"width": 1800, "height": 1100}, device_scale_factor=sharpness)
    page.goto(url)
    page.wait_for_function(READY, timeout=60_000)
    page.add_style_tag(content=NO_MENUS)
    page.request.post(f"{url}/free", data={"free_memory": True})
    return page


def set_widgets(page: Page, kind: str, **values: Any) -> None:
    """On every node of a class; a name that one of them does not have is a mistake."""
    page.evaluate(
        """([kind, values]) => { for (const node of app.graph.nodes.filter(n => n.type == kind))
            for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name == name).value = value; }""",
        [kind, values],
    )


def run(page: Page) -> None:
    """Queues the graph and waits for its end."""
    page.evaluate(
        """() => { window.finished = null; for (const kind of ['execution_success', 'execution_error'])
            app.api.addEventListener(kind, e => window.finished = [kind, e.detail], { once: true }); }"""
    )
    if not page.evaluate("app.queuePrompt(0)"):
        raise RuntimeError(page.evaluate("JSON.stringify(app.lastNodeErrors)"))
    page.wait_for_function("window.finished", timeout=600_000)
    kind, detail = page.evaluate("window.finished")
    if kind != "execution_success":
        raise RuntimeError(f"{detail['node_type']}: {detail['exception_message']}")


def picture(page: Page, margin: int = 20) -> Image.Image:
    """The whole graph and nothing else."""
    x, y, width, height = page.evaluate(BOX)
    page.set_viewport_size({"width": round(width + 2 * margin), "height": round(height + 2 * margin)})
    page.wait_for_timeout(SETTLE_MS)
    page.evaluate(LOOK, [x - margin, y - margin, 1.0])
    page.wait_for_timeout(SETTLE_MS)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")
