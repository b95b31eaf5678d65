"""A running `hotcold serve` as a person starts it: a process of its own, found by the line it prints when ready."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

COMMAND = [sys.executable, "-c", "from hotcold.tools.cli import main; main()"]
KEY = "sk-of-the-tests"
_ADDRESS = re.compile(r"https?://[^\s/:]+:(\d+)")


@dataclass(frozen=True)
class Figures:
    """What /metrics tells of one moment; blocks: those of the KV cache in use by answers."""

    running: float
    waiting: float
    blocks: float
    tokens: float


class Served:
    """`with Served(model, "--parallel", "4") as server:` a ready server on a free port, stopped at the end."""

    def __init__(
        self,
        *arguments: str | Path,
        key: str | None = KEY,
        command: list[str] | None = None,
        health: str = "/health",
        port_option: tuple[str, ...] = ("--port", "0"),
        env: dict[str, str] | None = None,
    ) -> None:
        self.key = key
        self.log: list[str] = []
        self._health = health
        self.process = subprocess.Popen(
            [
                *(command or [*COMMAND, "serve"]),
                *map(str, arguments),
                *port_option,
                *(("--api-key", key) if key else ()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self.pid = self.process.pid
        self._address = threading.Event()
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
            found = _ADDRESS.search(line)
            if found and not self._address.is_set():
                self.port = int(found[1])
                self._address.set()

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self.port}"

    def wait(self, seconds: float = 300.0) -> None:
        """Until it answers; RuntimeError with its output where it never does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if self._address.wait(0.05):
                try:
                    status, _ = self.get(self._health)
                except OSError:
                    status = 0
                if status == 200:
                    return
                time.sleep(0.02)
        raise RuntimeError("the server did not start:\n" + "\n".join(self.log[-30:]))

    def get(self, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
        """(status, parsed JSON or text) of a GET, or of a POST of `body` as JSON."""
        request = Request(self.url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urlopen(request, timeout=timeout) as reply:
                status, kind, data = reply.status, reply.headers.get_content_type(), reply.read()
        except HTTPError as error:
            with error:
                status, kind, data = error.code, error.headers.get_content_type(), error.read()
        return status, json.loads(data) if kind == "application/json" else data.decode()

    def model(self) -> str:
        """The id of the first model."""
        _, models = self.get("/v1/models")
        return str(models["data"][0]["id"])

    def metrics(self) -> dict[str, float]:
        """/metrics, each name's samples summed over its labels."""
        status, text = self.get("/metrics")
        assert status == 200, text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    @staticmethod
    def figures(metrics: dict[str, float]) -> Figures:
        """The figures among all metrics."""
        return Figures(
            metrics["hotcold_running"],
            metrics["hotcold_waiting"],
            metrics["hotcold_kv_blocks_used"],
            metrics.get("hotcold_generated_tokens_total", 0.0),
        )

    def settled(self, seconds: float = 60.0) -> Figures:
        """The figures when nothing runs and waits and all blocks are back, or after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            found = self.figures(self.metrics())
            if found.running == found.waiting == found.blocks == 0 or time.monotonic() > end:
                return found
            time.sleep(0.02)

    def statuses(self) -> dict[str, int]:
        """How many replies had which status."""
        _, text = self.get("/metrics")
        found: dict[str, int] = {}
        for status, n in re.findall(r'hotcold_requests_total\{[^}]*status="(\d+)"[^}]*\} (\S+)', text):
            found[status] = found.get(status, 0) + int(float(n))
        return found

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the process, and those of them that are no file's."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        sizes = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
        }
        return sizes["VmRSS"], sizes["RssAnon"]

    def rss(self) -> int:
        """Resident bytes of the process."""
        return self.memory()[0]

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM, then its exit code; killed past the timeout, which raises."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reader.join(5)
        return code

    def __enter__(self) -> Served:
        try:
            self.wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        finally:
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()
