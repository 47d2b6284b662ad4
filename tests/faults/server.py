"""A hub on this machine: what it does with the weights of a model is what the model is called."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

from qexport.exporter.hub import connection, download

COMMIT, LATER = "1" * 40, "2" * 40
WEIGHTS = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(625))
CONFIG = b'{"model_type": "bert"}'
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "modules.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04.",
    "../outside.json": b"{}",
    "model.safetensors": WEIGHTS,
}
TAKEN = ("config.json", "model.safetensors", "tokenizer.json")
STALL, PIECE = 2.0, 4096


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    path: str
    host: str
    range: str | None
    token: str | None


@dataclass
class Model:
    """What the hub has."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    commit: str = COMMIT
    asked: list[Asked] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def ranges(self) -> list[str | None]:
        """The ranges of the requests for weights."""
        return [each.range for each in self.asked if each.path.endswith(".safetensors")]


class Server(ThreadingHTTPServer):
    """Models by name: ``ANYTHING/BEHAVIOUR``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, Model] = {}

    @property
    def address(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def model(self, name: str) -> Model:
        """The model of this name, made when it is asked for first."""
        return self.models.setdefault(name, Model())

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what this is about."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """The list of files, or one of them."""
        parts = self.path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        owner, behaviour = parts[2:4] if listing else parts[:2]
        model = self.server.model(f"{owner}/{behaviour}")
        told = self.headers.get
        model.asked.append(Asked(self.path, told("Host", ""), told("Range"), told("Authorization")))
        name = "list" if listing else parts[-1]
        model.counts[name] += 1
        act = BEHAVIOURS.get(behaviour, send)
        if listing:
            revision = parts[5].partition("?")[0]
            commit = revision if len(revision) == len(COMMIT) else model.commit
            content = json.dumps(listed(model, commit, git=behaviour == "git")).encode()
        else:
            content = model.files["/".join(parts[4:])]
        weights = name.endswith(".safetensors")
        (act if weights or (listing and act in OF_LISTS) else send)(self, content, model.counts[name])

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def listed(model: Model, commit: str, *, git: bool) -> dict[str, object]:
    """What the interface says of a model."""
    found: list[dict[str, object]] = []
    for name, content in model.files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        told: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(".safetensors") and not git:
            told["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        found.append(told)
    return {"sha": commit, "siblings": found, "private": False}


def send(ask: Handler, content: bytes, count: int, *, announced: int | None = None, ranges: bool = True) -> None:
    """As it should be: the whole, or from the place that was asked for."""
    start = int(ask.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
    if start and start >= len(content):
        ask.send_error(416)
        return
    ask.send_response(206 if start else 200)
    if start:
        ask.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    ask.send_header("Content-Length", str((announced or len(content)) - start))
    ask.end_headers()
    ask.wfile.write(content[start:])


def fail(code: int, times: int, headers: Mapping[str, str] = MappingProxyType({})) -> Callable[..., None]:
    """Answer with a code so many times."""

    def act(ask: Handler, content: bytes, count: int) -> None:
        if count > times:
            send(ask, content, count)
            return
        ask.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            ask.send_header(name, value)
        ask.end_headers()

    return act


def lead(to: Callable[[Handler], str]) -> Callable[[Handler, bytes, int], None]:
    """Redirect to what is made of the request."""

    def act(ask: Handler, content: bytes, count: int) -> None:
        if COMMIT not in ask.path:  # it was led here
            send(ask, content, count)
            return
        ask.send_response(302)
        ask.send_header("Location", to(ask))
        ask.send_header("Content-Length", "0")
        ask.end_headers()

    return act


def elsewhere(ask: Handler) -> str:
    """The same server, which has another name there."""
    return f"http://localhost:{ask.server.server_port}{ask.path.replace(COMMIT, 'other-place')}"


def cut(ask: Handler, content: bytes, count: int) -> None:
    """Ends at the first time in the middle."""
    send(ask, content[: 10_000 if count == 1 else None], count, announced=len(content))


def stall(ask: Handler, content: bytes, count: int) -> None:
    """Says nothing any more in the middle."""
    send(ask, content[:10_000], count, announced=len(content))
    ask.wfile.flush()
    time.sleep(4 * STALL)


def trickle(ask: Handler, content: bytes, count: int) -> None:
    """A byte now and then."""
    send(ask, b"x", count, announced=len(content))
    for _ in range(200):
        ask.wfile.write(b"x")
        ask.wfile.flush()
        time.sleep(STALL / 20)


def flipped(content: bytes) -> bytes:
    """One bit is another."""
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


BEHAVIOURS: dict[str, Callable[[Handler, bytes, int], None]] = {
    "cut": cut,
    "cut_no_ranges": lambda a, c, n: send(a, c[: 10_000 if n == 1 else None], n, announced=len(c), ranges=False),
    "cut_always": lambda a, c, n: send(a, b"", n, announced=len(c)),
    "short": lambda a, c, n: send(a, c[:-100], n),
    "long": lambda a, c, n: send(a, c + b"more", n),
    "stalled": stall,
    "trickle": trickle,
    "failing": fail(500, 2),
    "failing_always": fail(503, 99),
    "overloaded": fail(429, 2),
    "overloaded_shortly": fail(429, 1, {"Retry-After": "7"}),
    "overloaded_for_long": fail(429, 99, {"Retry-After": "300"}),
    "missing": fail(404, 99),
    "damaged": lambda a, c, n: send(a, flipped(c), n),
    "damaged_once": lambda a, c, n: send(a, flipped(c) if n == 1 else c, n),
    "elsewhere": lead(elsewhere),
    "to_http": lead(lambda ask: "http://hub.example/model.safetensors"),
    "to_file": lead(lambda ask: "file:///etc/passwd"),
    "to_ftp": lead(lambda ask: "ftp://hub.example/model.safetensors"),
    "to_itself": lead(lambda ask: ask.path),
    "no_list": lambda a, c, n: send(a, b"<!DOCTYPE html>", n),
    "no_model": fail(404, 99),
    "not_yours": fail(401, 99),
}
OF_LISTS = tuple(BEHAVIOURS[name] for name in ("no_list", "no_model", "not_yours"))


@cache
def hub() -> Server:
    """The server, which runs until the tests are over."""
    server = Server()
    atexit.register(server.server_close)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def hurry() -> None:
    """Short times and small pieces."""
    connection.STALL = STALL
    connection.PAUSES = download.PAUSES = (0.01, 0.01)
    download.PIECE = PIECE


def here(root: str) -> None:
    """The hook of the cases: this server is the hub."""
    os.environ["HF_ENDPOINT"] = Path(root, "inputs/hub").read_text("utf-8")
    hurry()
