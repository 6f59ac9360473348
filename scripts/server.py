"""A real ComfyUI server on loopback, for the demo and the tests. Runs in ComfyUI's environment (it uses aiohttp).

The server works in a base folder of its own (models, custom_nodes, input, output, user), so that nothing of the ComfyUI
installation is changed, and nothing but its code is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flexip_core.evaluation.client import ComfyClient, PromptError, ServerError, failure

# On few cores torch's spinning threads cost far more than they gain, and ComfyUI's default attention for CPUs is slow.
CPU_ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention")
CPU_THREADS = "1"
FOLDERS = (
    "models/checkpoints",
    "models/clip_vision",
    "models/flexip",
    "custom_nodes",
    "input",
    "output",
    "temp",
    "user/default/workflows",
    "user/default/subgraphs",
)
# Without these the frontend starts with a tour and asks for files that are not there.
USER_FILES = {
    "user/default/comfy.settings.json": json.dumps(
        {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Minimap.Visible": False}
    ),
    "user/default/comfy.templates.json": "[]",
    "user/default/user.css": "",
}
FINAL = ("execution_success", "execution_error", "execution_interrupted")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks")

__all__ = ["CPU_ARGUMENTS", "ComfyServer", "PromptError", "Run", "link_folder"]


@dataclass(frozen=True)
class Run:
    messages: list[dict[str, Any]]  # everything that came over the websocket, previews as {"type": "preview"}
    outputs: dict[str, dict[str, Any]]  # by node id


class ComfyServer(ComfyClient):
    def __init__(
        self,
        comfyui: str | Path,
        base: str | Path,
        python: str | Path = sys.executable,
        packs: Mapping[str, str | Path] | None = None,
        arguments: Sequence[str] = CPU_ARGUMENTS,
    ) -> None:
        """`packs` maps folder names in custom_nodes to the folders that are linked there."""
        self.comfyui, self.base, self.python = Path(comfyui), Path(base).resolve(), Path(python)
        self.arguments = list(arguments)
        self.log = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""  # once it runs
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, text in USER_FILES.items():
            (self.base / name).write_text(text)
        for name, folder in (packs or {}).items():
            link_folder(Path(folder).resolve(), self.base / "custom_nodes" / name)

    def start(self, timeout: float = 180) -> ComfyServer:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            self.python,
            "main.py",
            *self.arguments,
            "--listen",
            "127.0.0.1",
            "--port",
            port,
            "--base-directory",
            self.base,
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", CPU_THREADS)
        with self.log.open("wb") as log:
            # A group of its own: Ctrl-C reaches us, and we stop the server in an orderly way.
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.comfyui,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def run(
        self, prompt: dict[str, Any], on_message: Callable[[dict[str, Any]], None] | None = None, timeout: float = 600
    ) -> Run:
        """Queues an API prompt and waits for its end; `on_message` sees every websocket message as it comes."""
        start = time.monotonic()
        with self._websocket() as (client_id, received):
            try:
                messages = [received.get(timeout=60)]  # the server's greeting: from here on nothing is missed
            except queue.Empty:
                raise TimeoutError("The server's websocket did not answer.") from None
            if messages[0]["type"] == "closed":
                raise RuntimeError(f"The server's websocket cannot be reached. {self._log_end()}")
            prompt_id = self.queue(prompt, client_id)
            while not _ends(messages[-1], prompt_id):
                try:
                    messages.append(received.get(timeout=max(0.0, start + timeout - time.monotonic())))
                except queue.Empty:
                    raise TimeoutError(f"The workflow did not finish within {timeout:.0f} s.") from None
                if messages[-1]["type"] == "closed":
                    raise RuntimeError(f"The server went away. {self._log_end()}")
                if on_message:
                    on_message(messages[-1])
        end = messages[-1]
        if end["type"] != "execution_success":
            raise failure(end["data"])
        return Run(messages, self.wait(prompt_id, timeout=60))  # the history comes a moment after the last message

    @contextlib.contextmanager
    def _websocket(self) -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
        """A new client id, and the queue of what the server sends to it.

        In a thread, because the caller may live in an event loop of its own (the browser tests do).
        """
        client_id, received = uuid.uuid4().hex, queue.Queue()

        async def listen() -> None:
            with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                url = f"{self.url}/ws?clientId={client_id}"
                async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as websocket:
                    async for message in websocket:
                        is_text = message.type == aiohttp.WSMsgType.TEXT
                        received.put(json.loads(message.data) if is_text else {"type": "preview"})
            received.put({"type": "closed"})

        loop = asyncio.new_event_loop()
        task = loop.create_task(listen())
        thread = threading.Thread(target=loop.run_until_complete, args=(task,), daemon=True)
        thread.start()
        try:
            yield client_id, received
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            loop.close()

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with exit code {self.process.returncode}. {self._log_end()}")
            try:
                self.system_stats()
                return
            except ServerError:
                time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not answer in time. {self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join([f"The end of {self.log}:", *self.log_text().splitlines()[-30:]])


def _ends(message: dict[str, Any], prompt_id: str) -> bool:
    """ComfyUI tells everybody when it interrupts a prompt that was queued without a client."""
    return message["type"] in FINAL and message["data"]["prompt_id"] == prompt_id


def link_folder(source: Path, target: Path) -> None:
    """`target` becomes a link to `source`; a copy where links need special rights (Windows)."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        above = {
            str(parent) for parent in target.parents
        }  # the target may lie inside the source: never copy it into itself

        def ignore(folder: str, names: list[str]) -> set[str]:
            return {*NOT_COPIED(folder, names), *(name for name in names if str(Path(folder) / name) in above)}

        shutil.copytree(source, target, ignore=ignore)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
