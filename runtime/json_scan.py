"""A call, {"name": ..., "arguments": {...}}, read while it is written."""

from __future__ import annotations

import json

_KEYS = {"name", "arguments", "parameters", "type", "id", "function"}
_ARGUMENTS = ("arguments", "parameters")


class ObjectScanner:
    """Takes the characters of one JSON object and gives the name of a call, then its arguments as they come.

    Events are ("name", name) once, then ("arguments", text) any number of times. `failed`: it is no call of a known
    function, and no event was given. `done`: the object has ended.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._text = ""
        self._at = 0  # characters of it that were looked at
        self._depth = 0
        self._string = self._escaped = False
        self._opened = 0  # where the string or value began
        self._key: str | None = None
        self._last = ""  # the string that ended last, at the object's own level
        self._value: int | None = None  # where the value of the key began
        self._name = ""
        self._sent: int | None = None  # arguments up to here were given
        self._waiting = ""  # arguments that came before the name
        self._given = False  # any arguments
        self.begun = self.failed = self.done = self.emitted = False

    def push(self, text: str) -> tuple[int, list[tuple[str, str]]]:
        """How many of the characters belong to the object, and what they say."""
        start = len(self._text)
        self._text += text
        events: list[tuple[str, str]] = []
        while self._at < len(self._text) and not (self.failed or self.done):
            self._look(self._text[self._at], events)
            self._at += 1
        if self._sent is not None and not self.done:
            self._give(events, self._text[self._sent : self._at])
            self._sent = self._at
        return self._at - start, events

    def _look(self, char: str, events: list[tuple[str, str]]) -> None:
        if not self.begun:
            self.begun = True
            if char != "{":
                self.failed = True
            self._depth = 1
            return
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
                if self._depth == 1 and self._key is None:
                    self._last = self._text[self._opened : self._at + 1]
            return
        if char == '"':
            self._string = True
            if self._depth == 1 and self._key is None:
                self._opened = self._at
        if self._depth == 1 and self._key is not None and self._value is None and not char.isspace():
            self._value = self._at
            if char == "{" and self._key in _ARGUMENTS and self._name:
                self._sent = self._at
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._ended(events)
                self._finish(events)
                return
            if self._depth == 1 and self._sent is not None:
                self._give(events, self._text[self._sent : self._at + 1])
                self._sent = None
        elif char == ":" and self._depth == 1 and self._key is None:
            self._key = str(_read(self._last))
            if self._key not in _KEYS and not self.emitted:
                self.failed = True
        elif char == "," and self._depth == 1:
            self._ended(events)

    def _ended(self, events: list[tuple[str, str]]) -> None:
        """A value at the object's own level has ended."""
        key, start = self._key, self._value
        self._key = self._value = None
        if key is None or start is None:
            return
        value = self._text[start : self._at].strip()
        if key == "name" and not self.emitted:
            name = _read(value)
            if not isinstance(name, str) or name not in self._names:
                self.failed = True
                return
            self._name, self.emitted = name, True
            events.append(("name", name))
            if self._waiting:
                self._give(events, self._waiting)
        elif key in _ARGUMENTS:
            if value.startswith("{"):
                if not self.emitted:
                    self._waiting = value
                return
            read = _read(value)  # a text that holds JSON, as some models write it
            text = read if isinstance(read, str) else "{}" if read is None else value
            if self.emitted:
                self._give(events, text)
            else:
                self._waiting = text
        elif key == "function" and not self.emitted and value.startswith("{"):
            inner = ObjectScanner(self._names)
            _, found = inner.push(value)
            if inner.done and inner.emitted:
                self.emitted, self._given = True, True
                events.extend(found)

    def _give(self, events: list[tuple[str, str]], text: str) -> None:
        if text:
            self._given = True
            events.append(("arguments", text))

    def _finish(self, events: list[tuple[str, str]]) -> None:
        if self.failed:
            return
        if not self.emitted:
            self.failed = True
            return
        if not self._given:
            events.append(("arguments", "{}"))
        self.done = True


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
