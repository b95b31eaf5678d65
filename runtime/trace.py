"""A timeline of what ran where, in Chrome's trace format (open it in chrome://tracing or Perfetto)."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

from ..formats.errors import StorageError

_ROWS = {"cpu": 1, "gpu": 2}  # numbers that the format wants of threads


class Trace:
    """Spans of time by unit; seconds are those of time.perf_counter."""

    def __init__(self) -> None:
        self._began = perf_counter()
        self._events: list[dict[str, object]] = []

    def add(self, unit: str, name: str, start: float, end: float) -> None:
        """A span of a unit."""
        microseconds = {"ts": (start - self._began) * 1e6, "dur": (end - start) * 1e6}
        self._events.append({"name": name, "ph": "X", "pid": 1, "tid": _ROWS[unit], **microseconds})

    def spans(self, unit: str) -> list[tuple[float, float]]:
        """(start, end) of a unit's spans, in microseconds since the trace began."""
        events = [event for event in self._events if event["tid"] == _ROWS[unit]]
        return [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]  # type: ignore[arg-type]

    def write(self, path: str | Path) -> None:
        """Write the file; StorageError if that fails."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": unit.upper()}}
            for unit, row in _ROWS.items()
        ]
        try:
            Path(path).write_text(json.dumps({"traceEvents": [*names, *self._events]}), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
