"""A running ComfyUI over HTTP, with the standard library alone.

ServerError: nothing answers, or not as ComfyUI does. PromptError: it answers, and the prompt is at fault.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import mimetypes
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any

ANSWER_SECONDS = 60.0  # a server that loads a model may be silent for a while
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5  # between two looks at a prompt that runs
QUEUE_SECONDS = 2.0  # between two looks at whether the server still has the prompt at all

_through_proxy = urllib.request.build_opener()
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server cannot be reached, went away, or does not answer as ComfyUI does. One sentence."""


class PromptError(RuntimeError):
    """The server refused a prompt or a node failed. `details` is what it answered."""

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class ComfyClient:
    def __init__(self, url: str) -> None:
        """`url` as people write it: http://127.0.0.1:8188/, or 127.0.0.1:8188."""
        text = url.strip()
        text = text if "://" in text else f"http://{text}"
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server; write it as http://127.0.0.1:8188.")
        self.url = text.rstrip("/")

    def get(self, path: str) -> Any:
        return self._json(self.get_bytes(path), path)

    def get_bytes(self, path: str) -> bytes:
        status, data = self._send(path)
        if status != 200:
            raise ServerError(f"ComfyUI at {self.url} answered {path} with the HTTP status {status}.")
        return data

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """HTTP status and answer; an error status is an answer, too."""
        status, data = self._send(path, json.dumps(body).encode(), "application/json")
        return status, self._json(data, path) if data else None

    def system_stats(self) -> dict[str, Any]:
        return self.get("/system_stats")

    def object_info(self) -> dict[str, Any]:
        """Every node class of the server, with its inputs."""
        return self.get("/object_info")

    def view(self, image: Mapping[str, str]) -> bytes:
        """The file of one entry in a node's `images` output."""
        return self.get_bytes("/view?" + urllib.parse.urlencode(image))

    def upload(self, data: bytes, name: str, subfolder: str = "") -> str:
        """Puts a picture into the input folder, in place of one with that name; returns what LoadImage calls it."""
        boundary = uuid.uuid4().hex
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        fields = {"type": "input", "overwrite": "true", "subfolder": subfolder}
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        body = b"".join([*parts, head.encode(), data, f"\r\n--{boundary}--\r\n".encode()])
        status, answer = self._send("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        if status != 200:
            raise ServerError(f"ComfyUI at {self.url} did not take the picture {name} (HTTP status {status}).")
        stored = self._json(answer, "/upload/image")
        return "/".join(filter(None, (stored["subfolder"], stored["name"])))

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queues an API prompt and returns its id. PromptError, one line per node, if the server refuses any of it."""
        body = {"prompt": prompt, **({"client_id": client_id} if client_id else {})}
        status, answer = self.post("/prompt", body)
        if not isinstance(answer, dict) or not {"prompt_id", "error"} & answer.keys():
            raise ServerError(f"{self.url} answered a prompt with the HTTP status {status}; is it ComfyUI?")
        if status == 200 and not answer["node_errors"]:
            return answer["prompt_id"]
        if status == 200:  # a part of it would run
            self.interrupt(answer["prompt_id"])
        raise PromptError(refusal(answer), answer)

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What became of a prompt; None while it waits or runs."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """The outputs of a prompt by node id, once it has run. PromptError if a node failed, ServerError if the server lost it."""
        start = looked = time.monotonic()
        pause = FIRST_PAUSE
        while (entry := self.history(prompt_id)) is None:
            now = time.monotonic()
            if timeout is not None and now - start > timeout:
                raise TimeoutError(f"The prompt did not finish within {timeout:.0f} s.")
            if now - looked > QUEUE_SECONDS:
                looked = now
                # it moves from the queue into the history in one step, so look there once more
                if not self.is_queued(prompt_id) and self.history(prompt_id) is None:
                    raise ServerError(
                        f"ComfyUI at {self.url} lost a prompt: it was started again, or its queue was cleared."
                    )
            time.sleep(pause)
            pause = min(1.3 * pause, LONGEST_PAUSE)
        for kind, data in (entry.get("status") or {}).get("messages", []):
            if kind in ("execution_error", "execution_interrupted"):
                raise failure(data)
        return entry["outputs"]

    def is_queued(self, prompt_id: str) -> bool:
        """Whether it waits or runs."""
        queue = self.get("/queue")
        return any(item[1] == prompt_id for item in [*queue["queue_running"], *queue["queue_pending"]])

    def interrupt(self, prompt_id: str) -> None:
        """Takes a prompt out of the queue, or stops it if it runs. If it ends at this very moment, ComfyUI may stop the next one."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def _send(self, path: str, body: bytes | None = None, kind: str | None = None) -> tuple[int, bytes]:
        """HTTP status and body of the answer; ServerError if there is none."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} if kind else {})
        try:
            with _opener(self.url).open(request, timeout=ANSWER_SECONDS) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise ServerError(
                f"ComfyUI at {self.url} does not answer ({reason}). Start it, or check the address."
            ) from None

    def _json(self, data: bytes, path: str) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url} answered {path} with something other than JSON; is it ComfyUI?") from None


def failure(data: Mapping[str, Any]) -> PromptError:
    """Of a node: `data` of execution_error or execution_interrupted."""
    text = data.get("exception_message", "interrupted").strip()
    return PromptError(f"{data.get('node_type')} failed: {text}", data)


def refusal(answer: Mapping[str, Any]) -> str:
    """What is wrong with a prompt, in one line per node; `answer` is the body of the 400."""
    lines = []
    for node_id, node in (answer.get("node_errors") or {}).items():
        errors = "; ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        lines.append(f"{node['class_type']} ({node_id}): {errors}")
    return "\n".join(lines) or f"{answer['error']['message']} {answer['error'].get('details', '')}"


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Loopback never goes through a proxy."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return _direct if is_loopback else _through_proxy
