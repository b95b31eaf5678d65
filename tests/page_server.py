"""A server for the page's tests that says what a test tells it to: texts, delays, errors, broken streams."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass
class Reply:
    """What to answer: pieces of text (a callable among them is called, to wait for something), or an error."""

    pieces: list[str | Callable[[], object]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    finish: str | None = "stop"
    ends: bool = True  # with usage and [DONE]; otherwise the connection just closes
    error: str = ""  # sent within the stream, after the pieces


@dataclass
class PageServer:
    """Its address, what was asked, and what it will answer: `script(body, key)` names the reply."""

    url: str = ""
    models: list[str] = field(default_factory=lambda: ["smollm2"])
    script: Callable[[dict[str, Any], str], Reply] = lambda body, key: Reply(["Hello"])
    key: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client went away in the midst of an answer


def handler(server: PageServer, folder: Path, policy: str) -> type[BaseHTTPRequestHandler]:
    """The request handler of a server."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def send(self, status: int, kind: str, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send(status, "application/json", json.dumps(value).encode(), headers)

        def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
            self.send_json({"error": {"message": message, "type": "t", "param": None, "code": None}}, status, headers)

        def authorised(self) -> bool:
            return not server.key or self.headers.get("Authorization") == f"Bearer {server.key}"

        def do_GET(self) -> None:
            name = self.path.split("?")[0].lstrip("/") or "index.html"
            if name == "v1/models":
                if not self.authorised():
                    return self.refuse(401, "wrong key")
                return self.send_json({"object": "list", "data": [{"id": id} for id in server.models]})
            path = folder / name
            if "/" in name or not path.is_file():
                return self.refuse(404, "no such path")
            extra = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
            self.send(200, TYPES[path.suffix], path.read_bytes(), extra)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.authorised():
                return self.refuse(401, "wrong key")
            server.asked.append(body)
            reply = server.script(body, self.headers.get("Authorization", ""))
            if reply.status != 200:
                return self.refuse(reply.status, reply.message, reply.headers)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.stream(reply)
            except OSError:
                server.left.set()

        def stream(self, reply: Reply) -> None:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
            count = 0
            for piece in reply.pieces:
                if callable(piece):
                    piece()
                    continue
                count += 1
                self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if reply.error:
                self.event({"error": {"message": reply.error}})
            elif reply.ends:
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish}]})
                self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
                self.wfile.write(b"data: [DONE]\n\n")

        def event(self, value: Any) -> None:
            self.wfile.write(b": a comment\r\ndata: " + json.dumps(value).encode() + b"\r\n\r\n")

    return Handler


@contextmanager
def serve(folder: Path, policy: str) -> Iterator[PageServer]:
    """A server on a free port of this machine, that ends with the block."""
    state = PageServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(state, folder, policy))
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_address[1]}/"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
