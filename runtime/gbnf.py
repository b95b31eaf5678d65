"""GBNF, llama.cpp's grammar notation, rewritten as the Lark notation that llguidance reads.

Every character becomes a terminal of its own. Longer terminals would be matched as far as they go, which changes
what a grammar accepts: after `word ::= [a-z]+` no `"x"` could follow.
"""

from __future__ import annotations

import re

from ..formats.errors import ParameterError

_DEEPEST = 64  # nested groups
_NAME = re.compile(r"[\w-]+")
_SPACE, _SPACE_LINES = (re.compile(rf"(?:[{chars}]|#[^\r\n]*)*") for chars in (r" \t", r" \t\r\n"))
_REPEAT = re.compile(r"\{\s*(\d{1,6})\s*(,?)\s*(\d{0,6})\s*\}")
_ESCAPES = {"n": 10, "r": 13, "t": 9, "\\": 92, '"': 34, "[": 91, "]": 93}
_HEX = {"x": 2, "u": 4, "U": 8}
_STARS = {"*": "*", "+": "+", "?": "?"}


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in GBNF (rules are written `name ::= ...`) and not in Lark's notation."""
    return re.search(r"(?m)^\s*[\w-]+[ \t]*::=", text) is not None


def gbnf_to_lark(text: str) -> str:
    """The Lark grammar of a GBNF one, whose `root` becomes `start`; ParameterError naming line and problem."""
    return _Reader(text).grammar()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.names: dict[str, str] = {"root": "start"}  # a rule's name -> its name in Lark
        self.terminals: dict[str, str] = {}  # a regular expression for one character -> its name

    def grammar(self) -> str:
        rules: dict[str, str] = {}
        self.space(lines=True)
        while self.at < len(self.text):
            name = self.name("the name of a rule")
            self.space()
            if not self.text.startswith("::=", self.at):
                raise self.error("::=")
            self.at += 3
            self.space(lines=True)
            if name in rules:
                raise ParameterError(f"grammar: got the rule {name!r} twice, wanted it once")
            rules[name] = self.alternatives()
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self.error("the end of the rule")
            self.space(lines=True)
        missing = [name for name in self.names if name not in rules]
        if missing:
            raise ParameterError(f"grammar: got no rule {missing[0]!r}, wanted one (GBNF starts at root)")
        lines = [f"{self.names[name]}: {body}" for name, body in rules.items() if name in self.names]
        return "\n".join([*lines, *(f"{name}: /{chars}/" for chars, name in self.terminals.items())]) + "\n"

    def alternatives(self, nested: bool = False) -> str:
        found = [self.sequence(nested)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            self.space(lines=True)
            found.append(self.sequence(nested))
        return " | ".join(found)

    def sequence(self, nested: bool) -> str:
        items = []
        while (item := self.item()) is not None:
            self.space(nested)
            repeat = self.repeat()
            # a repeated item is a group: a literal of several characters, an empty text
            items.append(f"({item}){repeat}" if repeat else item)
            self.space(nested)
        return " ".join(items) or '""'

    def item(self) -> str | None:
        char = self.text[self.at : self.at + 1]
        if char == '"':
            self.at += 1
            codes = []
            while self.text[self.at : self.at + 1] != '"':
                codes.append(self.char("the closing quote"))
            self.at += 1
            return " ".join(self.terminal(f"[{_code(code)}]") for code in codes) or '""'
        if char == "[":
            return self.terminal(self.char_class())
        if char == ".":
            self.at += 1
            return self.terminal("(?s:.)")
        if char == "(":
            self.at += 1
            self.depth += 1
            if self.depth > _DEEPEST:
                raise ParameterError(f"grammar: got groups nested over {_DEEPEST} deep, wanted fewer")
            self.space(lines=True)
            inner = self.alternatives(nested=True)
            if self.text[self.at : self.at + 1] != ")":
                raise self.error(")")
            self.at, self.depth = self.at + 1, self.depth - 1
            return f"({inner})"
        if _NAME.match(self.text, self.at):
            return self.rule(self.name("a name"))
        return None

    def repeat(self) -> str:
        char = self.text[self.at : self.at + 1]
        if char in _STARS:
            self.at += 1
            return _STARS[char]
        if char != "{":
            return ""
        match = _REPEAT.match(self.text, self.at)
        if not match:
            raise self.error("{n}, {n,} or {n,m}")
        self.at = match.end()
        low, comma, high = match.groups()
        return f"{{{low},{high if comma else low}}}"

    def char_class(self) -> str:
        self.at += 1
        negated = self.text[self.at : self.at + 1] == "^"
        self.at += negated
        ranges = []
        while self.text[self.at : self.at + 1] != "]":
            low = high = self.char("the closing ]")
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                high = self.char("the end of the range")
            if high < low:
                raise self.error("a range in ascending order")
            ranges.append(_code(low) if low == high else f"{_code(low)}-{_code(high)}")
        self.at += 1
        if not ranges:
            if negated:
                return "(?s:.)"
            raise self.error("characters between [ and ]")
        return f"[{'^' * negated}{''.join(ranges)}]"

    def char(self, wanted: str) -> int:
        """The code point here, escapes undone."""
        if self.at >= len(self.text):
            raise self.error(wanted)
        char = self.text[self.at]
        self.at += 1
        if char != "\\":
            return ord(char)
        kind = self.text[self.at : self.at + 1]
        self.at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = self.text[self.at : self.at + _HEX.get(kind, 0)]
        self.at += len(digits)
        if not digits or len(digits) < _HEX[kind] or not re.fullmatch("[0-9a-fA-F]+", digits):
            raise self.error('an escape: \\n \\r \\t \\\\ \\" \\[ \\] \\xHH \\uHHHH or \\UHHHHHHHH')
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self.error("a character of Unicode")
        return code

    def terminal(self, chars: str) -> str:
        return self.terminals.setdefault(chars, f"C{len(self.terminals)}")

    def rule(self, name: str) -> str:
        return self.names.setdefault(name, f"r{len(self.names)}")

    def name(self, wanted: str) -> str:
        match = _NAME.match(self.text, self.at)
        if not match:
            raise self.error(wanted)
        self.at = match.end()
        return match[0]

    def space(self, lines: bool = False) -> None:
        match = (_SPACE_LINES if lines else _SPACE).match(self.text, self.at)
        self.at = match.end() if match else self.at

    def error(self, wanted: str) -> ParameterError:
        line = self.text.count("\n", 0, self.at) + 1
        got = self.text[self.at : self.at + 20].split("\n")[0]
        return ParameterError(f"grammar: line {line}: got {got!r}, wanted {wanted}")


def _code(code: int) -> str:
    return f"\\x{{{code:x}}}"
