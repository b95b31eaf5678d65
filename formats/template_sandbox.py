"""The sandbox that chat templates run in: Jinja's own, plus a budget of work, size and time.

Jinja's sandbox keeps a template from Python's internals. It does not keep it from nested loops, recursive
macros or strings that double: so turns and calls are counted, and sizes are charged before they are built.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS as FILTERS
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20  # characters of a template
MAX_STEPS = 1 << 19  # loop turns and calls
MAX_SIZE = 1 << 26  # characters and list elements that a rendering may build
MAX_SECONDS = 20.0
MAX_BITS = 1 << 14  # of an integer
_LONG_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)|:[^{}]*(\d{5}|\{)|\{[^{}]*\{")


class Budget:
    """What one rendering may still do; a SecurityError ends it."""

    def __init__(self, source_size: int) -> None:
        self.source_size = source_size
        self._steps, self._size, self._end = MAX_STEPS, MAX_SIZE, time.monotonic() + MAX_SECONDS

    def step(self, size: int = 0) -> None:
        """Count a loop turn, call or element, and `size` characters."""
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop turns and calls")
        self.charge(size)
        if not self._steps & 255:
            self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def charge(self, size: int) -> None:
        """Count characters or elements that are about to be built."""
        self._size -= size
        if size > 4096:
            self._check_time()
        if self._size < 0:
            raise SecurityError(f"it builds more than {MAX_SIZE} characters")

    def charge_text(self, value: object) -> None:
        """Count the text of a value; containers by element, for they may hold one another many times."""
        if isinstance(value, (str, bytes)):
            self.charge(len(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.step(8)
                self.charge_text(key)
                self.charge_text(item)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.step(4)
                self.charge_text(item)
        elif isinstance(value, int):
            self.charge(value.bit_length() // 3 + 1)
        else:
            self.charge(32)


_current: ContextVar[Budget] = ContextVar("_current")


def render(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    """Render within a budget; raises what the template raises, SecurityError when the budget is spent."""
    token = _current.set(budget)
    try:
        return template.render(variables)
    finally:
        _current.reset(token)


def compile_template(source: str, budget: Budget) -> jinja2.Template:
    """Compile with loops, concatenations and slices routed through the budget."""
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it has {len(source)} characters of source, more than {MAX_SOURCE}")
    token = _current.set(budget)  # constant expressions are evaluated here
    try:
        tree = _Meter().visit(ENVIRONMENT.parse(source))
        tree.set_environment(ENVIRONMENT)
        code = ENVIRONMENT.compile(tree)
        return ENVIRONMENT.template_class.from_code(ENVIRONMENT, code, ENVIRONMENT.make_globals(None))
    finally:
        _current.reset(token)


class _Meter(NodeTransformer):
    """Puts the metering filters into a template's tree; no template can spell their names."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        fixed = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "meter turns", nodes.Const(fixed))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "meter concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "meter slice") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _turns(items: Iterable[Any], fixed: int) -> Iterator[Any]:
    budget = _current.get()
    for item in items:
        budget.step(fixed)
        yield item


def _concat(parts: list[Any]) -> str:
    for part in parts:
        _current.get().charge_text(part)
    return "".join(map(str, parts))


def _sized(value: Any) -> Any:
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _current.get().charge(len(value))
    return value


def _finalize(value: Any) -> Any:
    _current.get().charge_text(value)
    return value


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once; Jinja would print nothing and go on."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Charge what an operator is about to build."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError("it builds an integer too large")
        elif operator == "%" and isinstance(left, str):
            _charge_format(left, right)
        elif operator == "*":
            sized, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(sized, (str, bytes, list, tuple)):
                _current.get().charge(len(sized) * max(times, 0))
        elif operator == "+":
            _sized(left)
            _sized(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count every call, and charge those that could build much."""
        budget = _current.get()
        budget.step(budget.source_size if isinstance(__obj, Macro) else 0)
        if isinstance(__obj, LoopContext) and args:  # a recursive loop's loop(children)
            args = (_turns(args[0], budget.source_size), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes)):
            _charge_method(owner, method.__name__, args, kwargs)
        return _sized(super().call(__context, __obj, *args, **kwargs))


def _charge_method(text: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge a string method for its result, before it builds it."""
    budget = _current.get()
    budget.charge(len(text) // 8)  # looking through it takes time
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        widths = [a for a in (*args, *kwargs.values()) if isinstance(a, int)]
        budget.charge((len(text) if name == "expandtabs" else 1) * max(widths, default=8))
    elif name == "replace":
        _charge_replace(text, *args[:2])
    elif name == "join" and args:
        budget.charge(len(text) * _charge_items(args[0]))
    elif name in ("format", "format_map") and isinstance(text, str):
        _charge_format(text, (args, kwargs))
    elif name == "translate":
        raise SecurityError("str.translate is not available to templates")


def _charge_replace(text: Any, old: Any = "", new: Any = "") -> None:
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        _current.get().charge(len(text) + text.count(old) * len(new))


def _charge_items(items: Any) -> int:
    """Charge the texts of what is joined; returns how many there are."""
    if not isinstance(items, (str, list, tuple, Mapping)):
        raise SecurityError(f"it joins a {type(items).__name__}, not a list")
    _current.get().charge_text(items)
    return len(items)


def _charge_format(text: str, values: object) -> None:
    if _LONG_WIDTH.search(text):
        raise SecurityError("it formats with a width of more than 9999, or one that is computed")
    _current.get().charge(len(text))
    _current.get().charge_text(values)


def _join(value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    if not isinstance(value, (str, list, tuple)):
        value = list(value)
    if attribute is not None:
        value = list(map(make_attrgetter(ENVIRONMENT, attribute), value))
    separator = str(d)
    _current.get().charge(len(separator) * _charge_items(value))
    return separator.join(map(str, value))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    _current.get().charge_text(value)
    text, old, new = str(value), str(old), str(new)
    _charge_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, margin = str(value), width if isinstance(width, str) else " " * min(width, 9999)
    _current.get().charge((text.count("\n") + 1) * len(margin))
    return str(FILTERS["indent"](text, margin, first, blank))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _charge_format(str(value), (args, kwargs))
    return str(value) % (kwargs or args)


def _sum(value: Any, attribute: str | int | None = None, start: int | float = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise SecurityError("sum is for numbers")
    return FILTERS["sum"](ENVIRONMENT, value, attribute, start)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if isinstance(indent, int) and indent > 64:
        raise SecurityError("it indents JSON by more than 64")
    _current.get().charge_text(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"\d{3}", pattern):
        raise SecurityError("it formats the time with a long pattern")
    return datetime.now().strftime(pattern)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks for training, which change nothing in the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# Filters that make text out of their value, and those whose numbers are sizes
_TEXT = {"capitalize", "center", "e", "escape", "lower", "safe", "string", "striptags", "title", "trim"}
_TEXT |= {"truncate", "upper", "urlencode", "wordcount", "wordwrap"}
_SIZES = {"batch", "center", "round", "slice", "truncate", "wordwrap"}


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, charged for its value's text and its result."""
    position = 0 if getattr(function, "jinja_pass_arg", None) is None else 1
    text, sizes = name in _TEXT, name in _SIZES

    @wraps(function)  # keeps Jinja's mark of what it passes first
    def metered(*args: Any, **kwargs: Any) -> Any:
        options = (*args[position + 1 :], *kwargs.values())
        if sizes and any(isinstance(option, int) and abs(option) > 9999 for option in options):
            raise SecurityError(f"it gives {name} a number of more than 9999")
        if text:
            _current.get().charge_text(args[position])
        return _sized(function(*args, **kwargs))

    return metered


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing is computed outside a rendering's budget
        finalize=_finalize,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    refused = {"forceescape", "pprint", "urlize", "xmlattr"}
    own = {"join": _join, "replace": _replace, "indent": _indent, "format": _format, "sum": _sum}
    meters = {"meter turns": _turns, "meter concat": _concat, "meter slice": _sized}
    filters = {name: f for name, f in environment.filters.items() if name not in refused}
    filters |= own | {"tojson": _tojson}
    environment.filters = {name: _metered(name, f) for name, f in filters.items()} | meters
    environment.globals.pop("lipsum")
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


ENVIRONMENT = _environment()
