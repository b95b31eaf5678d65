"""Tools: what a request says about them, the calls in an answer's text as it streams, and grammars that force calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ParameterError, UnsupportedError
from ..formats.tokenizer import Tokenizer
from .fields import LONGEST_NAME, MOST_TOOLS
from .grammar import Constraint, byte_tokens, check_source, compiled, json_rule
from .json_scan import ObjectScanner

_CHARS = "a-z A-Z 0-9 _ . : / -"
_MOST_CALLS = 16  # that a forced answer may hold
_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{LONGEST_NAME}}}")


@dataclass(frozen=True)
class Format:
    """How a family of models writes calls: text before and after them, the arguments' key, one by one or as a list."""

    begin: str
    end: str
    key: str = "arguments"
    as_list: bool = False


HERMES = Format("<tool_call>\n", "\n</tool_call>")  # Hermes, Qwen, and what models without a format are told
MISTRAL = Format("[TOOL_CALLS]", "", as_list=True)
LLAMA3 = Format("", "", "parameters")
GRANITE = Format("<|tool_call|>", "", as_list=True)
# what a template says -> the format of its model; the first that fits
_TEMPLATES = (
    ("[TOOL_CALLS]", MISTRAL), ("<|tool_call|>", GRANITE), ("<tool_call>", HERMES), ("<|python_tag|>", LLAMA3),
    ('"parameters": dictionary', LLAMA3),
)  # fmt: skip
# The parser knows them all, whatever the model: begin -> end. A call may also stand bare at the start of an answer.
_MARKS = {"<tool_call>": "</tool_call>", "<|tool_call|>": "<|/tool_call|>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}


def format_of(template_source: str) -> Format:
    """The format in which a model with this chat template writes calls."""
    return next((form for mark, form in _TEMPLATES if mark in template_source), HERMES)


@dataclass(frozen=True)
class ToolUse:
    """A request's tools, checked: those that may be called, and whether one must be, and only one."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    forced: bool = False
    several: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions that may be called."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def check_tools(tools: object, tool_choice: object, parallel: object) -> ToolUse:
    """OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`; ParameterError naming the one that is wrong."""
    found = [_checked_tool(i, tool) for i, tool in enumerate(_list(tools))]
    names = [tool["function"]["name"] for tool in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ParameterError(f"tools: got two functions named {twice!r}, wanted different names")
    if parallel is not None and not isinstance(parallel, bool):
        raise ParameterError(f"parallel_tool_calls: got {parallel!r:.60}, wanted true or false")
    several = parallel is not False
    if tool_choice in (None, "auto", "none") if isinstance(tool_choice, (str, type(None))) else False:
        return ToolUse([] if tool_choice == "none" else found, False, several)
    if not found:
        raise ParameterError(f"tool_choice: got {tool_choice!r:.60} without tools, wanted tools with it")
    if tool_choice == "required":
        return ToolUse(found, True, several)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type") != "function" or not isinstance(name, str):
        wanted = "auto, none, required or {'type': 'function', 'function': {'name': ...}}"
        raise ParameterError(f"tool_choice: got {tool_choice!r:.60}, wanted {wanted}")
    if name not in names:
        raise ParameterError(f"tool_choice: got the function {name!r:.60}, wanted one of tools ({', '.join(names)})")
    return ToolUse([tool for tool in found if tool["function"]["name"] == name], True, False)


def _list(tools: object) -> list[object]:
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        raise ParameterError(f"tools: got {type(tools).__name__}, wanted a list of tools")
    if len(tools) > MOST_TOOLS:
        raise ParameterError(f"tools: got {len(tools)}, wanted at most {MOST_TOOLS}")
    return list(tools)


def _checked_tool(i: int, tool: object) -> dict[str, Any]:
    where = f"tools[{i}]"
    if not isinstance(tool, Mapping):
        raise ParameterError(f"{where}: got {type(tool).__name__}, wanted a dict with type and function")
    if tool.get("type", "function") != "function":
        raise UnsupportedError(f"{where}.type: got {tool.get('type')!r:.60}, supported is function")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise ParameterError(f"{where}.function: got {type(function).__name__}, wanted a dict with a name")
    name, description, strict = (function.get(key) for key in ("name", "description", "strict"))
    parameters = function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ParameterError(f"{where}.function.name: got {name!r:.60}, wanted up to {LONGEST_NAME} of {_CHARS}")
    if description is not None and not isinstance(description, str):
        raise ParameterError(f"{where}.function.description: got {type(description).__name__}, wanted a text")
    if strict is not None and not isinstance(strict, bool):
        raise ParameterError(f"{where}.function.strict: got {strict!r:.60}, wanted true or false")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise ParameterError(f"{where}.function.parameters: got {type(parameters).__name__}, wanted a JSON schema")
    try:
        check_source(where, json.dumps(function, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"{where}.function: got no JSON ({error}), wanted JSON values") from None
    # templates differ in what they read, so what OpenAI leaves out is there
    function = {**function, "description": description or "", "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def force_calls(
    tokenizer: Tokenizer, use: ToolUse, form: Format, or_schema: Any = None, opened: bool = False
) -> Constraint:
    """A constraint to calls with valid arguments; with `or_schema`, or else to JSON of that schema.

    opened: what opens the first call was said, and only the arguments of strict functions need fit their schema.
    """
    rules = []
    for i, tool in enumerate(use.tools):
        name = json.dumps(tool["function"]["name"])
        before = json.dumps(f'{{"name": {name}, "{form.key}": ')
        free = opened and not tool["function"].get("strict")
        parameters = {"type": "object"} if free else tool["function"]["parameters"]
        schema = json_rule(parameters, f"tools[{i}].function.parameters")
        rules.append(f'call{i}: {before} {schema} "}}"')
    one = "call: " + " | ".join(f"call{i}" for i in range(len(use.tools)))
    begin, end = _quoted(tokenizer, form.begin), json.dumps(form.end) if form.end else ""
    more = _MOST_CALLS - 1 if use.several else 0
    first = '(" " | "\\n")?' if opened else begin
    if form.as_list:
        calls = f'calls: {first} "[" call' + (f' (", " call){{0,{more}}}' if more else "") + f' "]" {end}'
    elif form.end and more:
        calls = f'calls: {first} call {end} ("\\n" {begin} call {end}){{0,{more}}}'
    else:
        calls = f"calls: {first} call {end}"
    start = "start: calls" if or_schema is None else "start: calls | " + json_rule(or_schema, "response_format")
    source = check_source("tools", "\n".join([start, calls, one, *rules]) + "\n")
    return compiled(tokenizer, source, "tools", is_json=True)


class OpenedCalls:
    """No constraint until the answer opens a call, as its model's format has it; from there on `force_calls`."""

    def __init__(self, tokenizer: Tokenizer, mark: str, calls: Constraint) -> None:
        self._tokenizer, self._mark, self._calls = tokenizer, mark, calls
        ids = tokenizer.encode(mark, add_bos=False, special=True)
        self._control = ids[0] if len(ids) == 1 and tokenizer.is_control(ids[0]) else None
        self._single = byte_tokens(tokenizer)
        self._said = b""  # last bytes, which may begin the mark
        self._open = False

    def apply(self, scores: NDArray[np.float32]) -> None:
        """As Constraint.apply, in a call."""
        if self._open:
            self._calls.apply(scores)

    def accept(self, token: int) -> None:
        """Go on after a token."""
        if self._open:
            self._calls.accept(token)
        elif self._tokenizer.is_control(token):
            self._open, self._said = token == self._control, b""
        else:
            mark = self._mark.encode()
            self._said += self._tokenizer.token_bytes(token)
            _, found, behind = self._said.partition(mark)
            self._said = behind if found else self._said[-len(mark) :]
            self._open = bool(found) and self._goes_on(behind)

    def copy(self) -> OpenedCalls:
        """Another one, for another answer that has not begun."""
        return OpenedCalls(self._tokenizer, self._mark, self._calls.copy())

    def _goes_on(self, behind: bytes) -> bool:
        """Whether a call can begin with these bytes, which came in one token with the mark; then they are taken."""
        calls = self._calls.copy()
        try:
            for i in range(len(behind)):
                calls.accept(self._single[behind[i : i + 1]])
        except (KeyError, ParameterError):
            return False  # the mark was part of a text
        self._calls = calls
        return True


def strict_calls(tokenizer: Tokenizer, use: ToolUse, form: Format) -> OpenedCalls | None:
    """The constraint of an answer that need not call; None without strict functions, or where nothing opens a call."""
    mark = form.begin.rstrip()
    if not mark or not any(tool["function"].get("strict") for tool in use.tools):
        return None
    return OpenedCalls(tokenizer, mark, force_calls(tokenizer, use, form, opened=True))


def _quoted(tokenizer: Tokenizer, text: str) -> str:
    """A text in a Lark rule; where it is a control token of this model, that token."""
    if not text:
        return ""
    ids = tokenizer.encode(text, add_bos=False, special=True)
    control = len(ids) == 1 and tokenizer.is_control(ids[0])
    return f"<[{ids[0]}]>" if control else json.dumps(text)


@dataclass(frozen=True)
class Said:
    """A part of an answer: text, or (call is its number) a call that begins with a name, or a part of its arguments."""

    text: str
    call: int | None = None
    name: str = ""
    id: str = ""


class ToolParser:
    """Finds calls of the named functions in text that streams; text that cannot become one goes through at once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._end = ""  # what closes the calls being read
        self._scanner: ObjectScanner | None = None
        self._raw = ""  # of the value being scanned, with its mark: given as text if it is no call
        self._begun = False  # something other than white space came
        self._list = False  # in a list of calls
        self._after = False  # behind a call: separators and the closing mark are dropped
        self.n_calls = 0
        self.complete = 0  # calls that have ended

    def push(self, text: str) -> list[Said]:
        """What a new piece of text makes certain."""
        self._held += text
        found: list[Said] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[Said]:
        """What is left at the end of the answer: the start of something that became no call."""
        held, self._held = self._held, ""
        scanner, self._scanner = self._scanner, None
        if scanner is not None and scanner.emitted:
            return []
        text = self._raw + held if scanner is not None else held
        return [Said(text)] if text.strip() or (text and not self._after) else []

    def _step(self, found: list[Said]) -> bool:
        """One transition; False when more text is needed."""
        if self._scanner is not None:
            return self._scan(found)
        if self._after:
            return self._between(found)
        held = self._held
        if not self._begun:
            stripped = held.lstrip()
            if not stripped:
                return False
            if stripped[0] in "{[" and not any(mark.startswith(stripped[: len(mark)]) for mark in _MARKS):
                self._open("", held[: len(held) - len(stripped)], stripped)
                return True
        hits = [(at, mark) for mark in _MARKS if (at := held.find(mark)) >= 0]
        # white space before a call belongs to it
        if hits:
            at, mark = min(hits)
            space = len(held[:at].rstrip())
            self._say(found, held[:space])
            self._held = held[space:]
            rest = held[at + len(mark) :].lstrip()
            if not rest:
                return False
            if rest[0] in "{[":
                self._open(_MARKS[mark], held[space : len(held) - len(rest)], rest)
            else:
                self._say(found, held[space : at + len(mark)])
                self._held = held[at + len(mark) :]
            return True
        safe = len(held[: len(held) - max(_overlap(held, mark) for mark in _MARKS)].rstrip())
        self._say(found, held[:safe])
        self._held = held[safe:]
        return False

    def _say(self, found: list[Said], text: str) -> None:
        if text:
            self._begun = self._begun or bool(text.strip())
            found.append(Said(text))

    def _open(self, end: str, raw: str, rest: str) -> None:
        self._end, self._begun = end, True
        if rest[0] == "[":
            self._list, self._raw, self._held = True, raw + "[", rest[1:]
            stripped = self._held.lstrip()
            if stripped:
                self._raw += self._held[: len(self._held) - len(stripped)]
                self._held = stripped
        else:
            self._list, self._raw, self._held = False, raw, rest
        self._scanner = ObjectScanner(self._names)

    def _scan(self, found: list[Said]) -> bool:
        scanner = self._scanner
        assert scanner is not None
        if not scanner.begun:
            space = len(self._held) - len(self._held.lstrip())
            self._raw, self._held = self._raw + self._held[:space], self._held[space:]
        text, self._held = self._held, ""
        used, events = scanner.push(text)
        self._raw += text[:used]
        self._held = text[used:]
        for kind, value in events:
            if kind == "name":
                found.append(Said("", self.n_calls, value, f"call_{secrets.token_hex(12)}"))
                self.n_calls += 1
            else:
                found.append(Said(value, self.n_calls - 1))
        if scanner.failed:
            self._scanner, self._list = None, False
            text, self._held = self._raw + self._held, ""
            # the text is given as it is; a call may begin further on in it
            self._raw = ""
            start = len(text) - len(text.lstrip())
            mark = next((mark for mark in _MARKS if text.startswith(mark, start)), text[start : start + 1])
            self._say(found, text[: start + len(mark)])
            self._held = text[start + len(mark) :]
            return True
        if scanner.done:
            self._scanner, self._raw, self._after = None, "", True
            self.complete += 1
            return True
        return False

    def _between(self, found: list[Said]) -> bool:
        rest = self._held.lstrip(" \t\r\n,;")
        if not rest:
            return False
        if self._list and rest[0] == "]":
            self._list, self._held = False, rest[1:]
            return True
        if self._end and (rest.startswith(self._end) or self._end.startswith(rest)):
            if len(rest) < len(self._end):
                return False
            self._end, self._held = "", rest[len(self._end) :]
            return True
        if rest[0] == "{" and (self._list or not self._end):
            self._held, self._raw, self._scanner, self._after = rest, "", ObjectScanner(self._names), False
            return True
        self._held, self._after, self._list = rest, False, False
        return True


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of text that is a beginning of mark."""
    return next((n for n in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:n])), 0)
