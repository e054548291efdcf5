"""Checkpoints, and a hub: a real HTTP server that speaks what downloads need, and `locate` in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from zimage.testing import build_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in float32, one file per component. Not to be changed."""
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@dataclass
class Hub:
    """Serves the folder `files` as the repository `org/model`, at `main` and `COMMIT`; `requests` is what was asked."""

    files: Path
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    error: tuple[int, str] | None = None
    """Status and X-Error-Code that every request gets."""
    fail_after: int | None = None
    """How many requests are answered before the rest get 503."""
    endpoint: str = ""
    commit: str = COMMIT

    def asked(self, method: str | None = None) -> list[str]:
        return [path for made, path in self.requests if method in (None, made)]


@contextmanager
def serving(files: Path) -> Iterator[Hub]:
    """A hub with `files` that answers at its `endpoint` until the block ends."""
    state = Hub(files=files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Outcome:
    """What `locate` did in a process of its own."""

    folder: Path | None
    hub_id: str | None
    revision: str | None
    error: str | None
    cause: str | None
    torch_was_loaded: bool
    transformer: str | None = None
    transformer_name: str | None = None
    text_encoder: str | None = None
    text_encoder_name: str | None = None
    vae: str | None = None
    vae_name: str | None = None


_LOCATE = """
import json, sys
from zimage.checkpoint.locate import locate
from zimage.errors import CheckpointError
source, options, patient = json.loads(sys.argv[1])
if not patient:
    import time
    time.sleep = lambda seconds: None
out = dict(folder=None, hub_id=None, revision=None, error=None, cause=None)
try:
    found = locate(source, **options)
    out.update(folder=str(found.folder), hub_id=found.hub_id, revision=found.revision)
    for part, file in found.files.items():
        out.update({part: str(file), part + "_name": found.names.get(part)})
except CheckpointError as error:
    out.update(error=str(error), cause=type(error.__cause__).__name__)
print(json.dumps(out | dict(torch_was_loaded="torch" in sys.modules)))
"""


class Locator:
    """Calls `locate` in a new process, because huggingface_hub reads its environment once."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self._hub = hub
        self._home = home

    def __call__(
        self, source: str = "org/model", env: dict[str, str] | None = None, *, patient: bool = True, **options: Any
    ) -> Outcome:
        """`patient` waits between the attempts to reach a hub that is not there."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": self._hub.endpoint, "HF_HOME": str(self._home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", _LOCATE, json.dumps([source, options, patient])],
            env={**inherited, **settings, **(env or {}), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        result = json.loads(process.stdout)
        folder = result.pop("folder")
        return Outcome(folder=Path(folder) if folder else None, **result)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_file = len(parts) > 4 and parts[:3] == ["org", "model", "resolve"]
        name = "/".join(parts[4:]) if is_file else self.path
        self.hub.requests.append((self.command, name))
        self.hub.tokens.add(self.headers.get("authorization"))
        if self.hub.fail_after is not None and len(self.hub.requests) > self.hub.fail_after:
            return self._send(503)
        if self.hub.error:
            return self._send(self.hub.error[0], {"X-Error-Code": self.hub.error[1]})
        if not is_file:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if parts[3] not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        path = self.hub.files / name
        if not path.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, headers, content, with_body)

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", with_body: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    with serving(tiny) as state:
        yield state


@pytest.fixture
def locate_anew(hub: Hub, tmp_path: Path) -> Locator:
    return Locator(hub, tmp_path / "home")
