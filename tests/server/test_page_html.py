"""What strangers write into workflows and files stays text in the page: no script runs, and no link is made up.

In the page of the oldest ComfyUI that is supported, which takes HTML as it comes, in the environment's own and in the newest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import environment
import pytest
import training_folders
from conftest import BROWSER_ARGUMENTS, PACK, REPO
from playwright.sync_api import Page, sync_playwright
from safetensors import safe_open
from safetensors.torch import save_file
from server import CPU_ARGUMENTS, ComfyServer

from flexip_core.files.reference_file import ENCODERS_KEY, SUFFIX
from flexip_core.training import background
from flexip_core.training.config import TrainConfig
from flexip_core.untrained import mini

PAGES = [  # ComfyUI and its page; "" is the environment's own
    pytest.param(("0.16.3", "1.39.19"), id="oldest"),
    pytest.param(("0.18.2", "1.41.21"), id="old", marks=pytest.mark.long),
    pytest.param(("", ""), id="own"),
    pytest.param(("", "1.58.1"), id="newest", marks=pytest.mark.long),
]
IN_A_NAME = "<img src=x onerror=window.hurt=1> &lt;i> __LNK0__"
LINKS = "[[[Update|https://stranger.example]]] [Update](https://stranger.example) ![](https://stranger.example/a.png)"
HOSTILE = f"{IN_A_NAME} {LINKS} [Update][1]"
DEFINITION = "\n\n[1]: https://stranger.example\n\n"  # of a Markdown link
RUN, REFERENCE_FILE, DATA = "mine", f"hostile{SUFFIX}", "pets"
SAVE, APPLY, STATUS = "3", "5", "12"  # node ids

READY = "window.app && app.vueAppReady && app.graph && app.graph.nodes.length > 0"
WATCH = """() => { window.seen = { texts: new Set(), links: new Set(), tags: new Set() };
    for (const kind of ['execution_success', 'execution_error']) app.api.addEventListener(kind, e => { window.end = [kind, e.detail]; });
    const text = e => e.textContent.replaceAll('\\u200b', '');
    new MutationObserver(() => {
        for (const a of document.querySelectorAll('a[href*="stranger"]')) seen.links.add(`${text(a)} ${a.href}`);
        for (const e of document.querySelectorAll('[onerror], [src="x"], [src*="stranger"]')) seen.tags.add(e.outerHTML);
        for (const e of document.querySelectorAll('body *:not(script, style)'))
            if ([...e.childNodes].some(n => n.nodeType == 3 && n.data.includes('onerror'))) seen.texts.add(text(e));
    }).observe(document.body, { childList: true, subtree: true, characterData: true }); }"""
OPEN_REPORTS = """async () => { for (const node of app.graph.nodes) {
    node.widgets?.find(w => w.name == 'flexip_report')?.element.querySelector('button').click();
    await new Promise(done => setTimeout(done, 50)); } }"""
SEEN = "Object.fromEntries(Object.entries(seen).map(([name, found]) => [name, [...found]]))"


@pytest.fixture(scope="module", params=PAGES)
def server(
    request: pytest.FixtureRequest, comfyui_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    core, version = request.param
    if not version:
        server = request.getfixturevalue("comfy")
        put_training(server.base)
        put_reference(server)
        yield server
        return
    home = comfyui_tree.parent
    if not (home / "flexip-home").is_file():
        pytest.skip("other pages than an installation's own are tested in the environment of scripts/test.py")
    tree = environment.get_comfyui(home, Path(sys.executable), core) if core else comfyui_tree
    page = environment.get_page(home, Path(sys.executable), version)
    base = tmp_path_factory.mktemp("comfyui")
    mini.make_mini_models(base / "models")
    put_training(base)
    arguments = [*CPU_ARGUMENTS, "--front-end-root", str(page)]
    with ComfyServer(tree, base, packs={PACK: REPO}, arguments=arguments) as server:
        put_reference(server)
        yield server


def put_training(base: Path) -> None:
    """A run whose last words are hostile, and data with a picture whose name is and that cannot be read."""
    folder = base / "output" / "flexip_training" / RUN
    cfg = TrainConfig(steps=9, batch=1, seed=0, folder=str(folder))
    losses = {"step": 1, "loss": 1.0, "loss_by_kind": {f"variant {HOSTILE}{DEFINITION}": 1.0}, "seconds": 1.0}
    training_folders.put(
        folder,
        {
            background.CONFIG: json.dumps(cfg.to_dict()),
            background.OUTPUT: f"{HOSTILE}\n",
            background.LOG: json.dumps(losses) + "\n",
        },
    )
    training_folders.small_set(base / "input" / DATA)
    training_folders.put(base / "input" / DATA / "invariant", {f"{IN_A_NAME}.png": b"no picture"})


def put_reference(server: ComfyServer) -> None:
    """A reference file whose metadata is hostile."""
    server.run(prompt("good", only=("1", "2", "3")))
    [good] = (server.base / "output").glob(f"good*{SUFFIX}")
    with safe_open(good, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors, server.base / "input" / REFERENCE_FILE, {**metadata, ENCODERS_KEY: HOSTILE})


def prompt(prefix: str, only: tuple[str, ...] = ()) -> dict:
    sampling = {"seed": 1, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    nodes = {
        "1": ("FlexIPDemoModels", {"subject": 0}),
        "2": ("EncodeReference", {"adapters": ["1", 3], "image": ["1", 4], "crop": "center"}),
        SAVE: ("FlexIPSaveReference", {"reference": ["2", 0], "filename_prefix": prefix}),
        "4": ("FlexIPLoadReference", {"reference_file": REFERENCE_FILE}),
        APPLY: (
            "ApplyFlexIPGate",
            {
                **{"model": ["1", 0], "adapters": ["1", 3], "reference": ["4", 0]},
                **{"gate": 0.5, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0},
            },
        ),
        "6": ("CLIPTextEncode", {"clip": ["1", 1], "text": "a disc"}),
        "8": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "9": (
            "KSampler",
            {"model": [APPLY, 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["8", 0], **sampling},
        ),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["1", 2]}),
        "11": ("PreviewImage", {"images": ["10", 0]}),
        STATUS: ("FlexIPTrainingStatus", {"run": RUN, "action": "look"}),
    }
    return {
        node: {"class_type": kind, "inputs": inputs}
        for node, (kind, inputs) in nodes.items()
        if not only or node in only
    }


TRAIN = {
    **{
        "run": "hostile_words",
        "checkpoint": mini.MINI_BASE,
        "clip_vision": mini.MINI_CLIP_FILE,
        "dino": mini.MINI_DINO_FILE,
    },
    **{"data": DATA, "steps": 1, "batch": 1, "size": 64, "learning_rate": 1e-4, "seed": 0},
}


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def page(server: ComfyServer, chromium: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    settings = server.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "Comfy.VueNodes.Enabled": request.param}))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        page.evaluate(WATCH)
        yield page
        browser.close()
    settings.write_text(before)


def run(page: Page, prompt: dict) -> str:
    """The name of the event that ends the prompt, queued as the Run button does."""
    page.evaluate("prompt => { window.end = null; app.loadApiJson(prompt, 'stranger.json'); }", prompt)
    page.wait_for_function("number => app.graph.nodes.length == number", arg=len(prompt))
    page.evaluate("app.queuePrompt(0)")
    assert page.evaluate("Object.keys(app.lastNodeErrors ?? {})") == []
    page.wait_for_function("window.end", timeout=120_000)
    page.wait_for_timeout(500)
    return page.evaluate("window.end[0]")


def test_what_a_stranger_wrote_is_text(page: Page, server: ComfyServer) -> None:
    server.post("/free", {"free_memory": True})  # everything runs, and every node speaks
    assert run(page, prompt(IN_A_NAME)) == "execution_success"
    page.evaluate(OPEN_REPORTS)
    assert run(page, {"1": {"class_type": "FlexIPTrain", "inputs": TRAIN}}) == "execution_error"
    assert IN_A_NAME in page.evaluate("end")[1]["exception_message"]

    assert page.evaluate("window.hurt") is None
    seen = page.evaluate(SEEN)
    assert seen["tags"] == []
    # a bare address becomes a link to itself
    assert [link for link in seen["links"] if link.split(" ")[0].rstrip("/") != link.split(" ")[1].rstrip("/")] == []
    assert [url for url in page.requests if "stranger.example" in url] == []
    # it reads as it was written, but that Vue nodes take __words__ for bold
    texts = [text.replace("_", "") for text in seen["texts"]]
    for written in (f"output folder as {IN_A_NAME}", f"encoders: {HOSTILE}", f"variant {HOSTILE}"):
        assert any(written.replace("_", "") in text for text in texts), written
