"""Constrained answers: a JSON schema, a regular expression or a grammar as a mask over the next token (llguidance)."""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import BusyError, ParameterError, UnsupportedError
from ..formats.tokenizer import Tokenizer
from .digit_limit import DigitLimit
from .gbnf import gbnf_to_lark, is_gbnf
from .json_schema import MOST_NULLABLE, check_pattern, nullable, prepared

# What a hostile source may cost. llguidance counts its own work, but what it counts may cost more in a larger grammar;
# it recurses along chains of rules, up to 4 KB a rule.
_LONGEST = 128 << 10  # characters of a source
_MOST_RULES = 4000
_MOST_WAYS = 250_000  # uses of rules (repeats are some) times alternatives
_ITEMS = 5000, 30_000  # for a token; JSON in GBNF needs 5000 with a vocabulary of 50,000, more with more
_STACK = 128 << 20
_LIMITS = {
    "max_lexer_states": 20_000, "max_items_in_row": 5000, "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000, "max_grammar_size": 200_000, "verbose_errors": False,
}  # fmt: skip
_STEP_S = 0.25  # of one token's mask, in which every other answer waits
_COMPILE_S = 5.0  # for which a request waits; what takes longer is left to itself
_WAIT_S = 1.0  # for one of these:
_slots = threading.BoundedSemaphore(3)  # compilations at a time, those left to themselves too
_TERMINAL = re.compile(r"\b_?[A-Z][A-Z0-9_]*\b")
_KEPT = 16  # compiled grammars kept for each model
# Fixed separators, as Python's json.dumps writes them: where any white space may come, small models write it forever.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_HEADER = '%llguidance {"no_forcing": true}\n'
T = TypeVar("T")


class Constraint:
    """What one answer may say next; made by `constraint`, used by one answer."""

    def __init__(self, matcher: Any, name: str, stop_ids: frozenset[int], digits: DigitLimit | None = None) -> None:
        self._matcher, self._name, self._stop_ids, self._digits = matcher, name, stop_ids, digits

    def apply(self, scores: NDArray[np.float32]) -> None:
        """Set the scores (n_vocab,) of tokens that may not come now to -inf, in place.

        Tokens that end the answer stay exactly where it may end; where it must, nothing else does. ParameterError
        where the grammar asks too much, or for what no token of the vocabulary says.
        """
        mask = np.frombuffer(self._bounded(self._matcher.compute_bitmask), np.uint8)
        allowed = np.unpackbits(mask, count=min(len(scores), 8 * len(mask)), bitorder="little").view(bool)
        if not allowed.any():
            raise ParameterError(f"{self._name}: no token of this model can come next; loosen it")
        if self._digits is not None:
            self._digits.apply(allowed)
        np.copyto(scores[: len(allowed)], -np.inf, where=~allowed)
        scores[len(allowed) :] = -np.inf

    def accept(self, token: int) -> None:
        """Note that this token came; ParameterError for one that might not."""
        if token not in self._stop_ids:
            self._bounded(lambda: self._matcher.consume_token(token))
            if self._digits is not None:
                self._digits.accept(token)

    def copy(self) -> Constraint:
        """Another one in the same state, for another answer."""
        digits = self._digits and self._digits.copy()
        return Constraint(self._matcher.deep_copy(), self._name, self._stop_ids, digits)

    def _bounded(self, work: Callable[[], T]) -> T:
        """What `work` returns; ParameterError where it fails, and where it took this thread long."""
        start = time.thread_time()
        found = work()
        self._check()
        if time.thread_time() - start > _STEP_S:
            raise ParameterError(f"{self._name}: got one that takes over {_STEP_S:g} s for a token; make it simpler")
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ParameterError(f"{self._name}: {_first_line(self._matcher.get_error())}")


def constraint(
    tokenizer: Tokenizer,
    *,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    json_object: bool = False,
    name: str = "",
) -> Constraint | None:
    """A constraint of what an answer says, None where nothing is asked; at most one of the four may be.

    schema: a JSON schema (dict or JSON text) or a pydantic model class. regex: in Rust's notation, for the whole
    answer. grammar: Lark's or llama.cpp's (GBNF) notation. json_object: any JSON object. name: what errors call it.
    ParameterError for a source that is broken or asks too much, UnsupportedError where llguidance is not installed.
    """
    given = [key for key, value in (("schema", schema), ("regex", regex), ("grammar", grammar)) if value is not None]
    given += ["json_object"] * bool(json_object)
    if len(given) > 1:
        raise ParameterError(f"{given[0]}: got {' and '.join(given)}, wanted one of them")
    if not given:
        return None
    name = name or given[0]
    if given[0] == "regex":
        source = _regex(check_source(name, regex))
    elif given[0] == "grammar":
        source = _lark(check_source(name, grammar))
    else:
        source = "start: " + json_rule({"type": "object"} if json_object else schema, name) + "\n"
    return compiled(tokenizer, source, name, is_json=given[0] in ("schema", "json_object"))


def compiled(tokenizer: Tokenizer, source: str, name: str, is_json: bool) -> Constraint:
    """The constraint of a Lark grammar that was checked; compiled once for each model. is_json: numbers shall end."""
    return _grammars_of(tokenizer).constraint(source, name, is_json)


def byte_tokens(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Single bytes -> the tokens that say them."""
    return _grammars_of(tokenizer).single


def json_rule(schema: Any, name: str) -> str:
    """What stands in a Lark rule for the JSON texts of a schema (dict, JSON text, pydantic model class)."""
    make = getattr(schema, "model_json_schema", None)
    try:
        if isinstance(schema, type) and callable(make):
            schema = make()
        elif isinstance(schema, str):
            schema = json.loads(check_source(name, schema))
        if not isinstance(schema, Mapping):
            wanted = "a JSON schema (an object) or a pydantic model class"
            raise ParameterError(f"{name}: got {type(schema).__name__}, wanted {wanted}")
        # as JSON first, which no hostile Mapping can change again
        schema = json.loads(check_source(name, json.dumps({**schema, "x-guidance": _JSON_STYLE}, allow_nan=False)))
        text = json.dumps(prepared(schema, name))
    except ParameterError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"{name}: got no JSON ({_first_line(str(error))}), wanted a JSON schema") from None
    return "%json " + text


def check_source(name: str, text: object) -> str:
    """A source of reasonable size; ParameterError for anything else."""
    if not isinstance(text, str):
        raise ParameterError(f"{name}: got {type(text).__name__}, wanted a text")
    if len(text) > _LONGEST:
        raise ParameterError(f"{name}: got {len(text)} characters, wanted at most {_LONGEST}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ParameterError(f"{name}: got half of a surrogate pair, wanted whole characters")
    return text


class _Compiled:
    """A grammar that is compiled, or will be by the first who asks; who asks for another does not wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matcher: Any = None
        self._error = ""

    def matcher(self, compile: Callable[[], Any], name: str) -> Any:
        if not self._lock.acquire(timeout=_COMPILE_S):
            raise BusyError(f"{name}: it is being compiled; ask again later")
        try:
            if self._error:
                raise ParameterError(self._error)
            if self._matcher is None:
                try:
                    self._matcher = _on_large_stack(compile, name)
                except ParameterError as error:
                    self._error = str(error)
                    raise
            return self._matcher.deep_copy()
        finally:
            self._lock.release()


class _Grammars:
    """The grammars compiled for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._stop_ids = tokenizer.stop_ids
        if not self._stop_ids:
            raise UnsupportedError("this model has no token that ends an answer, which schema, regex and grammar need")
        # nothing here may hold the tokenizer itself, the key under which this is kept
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.single = {data: i for i, data in enumerate(tokens) if len(data) == 1 and not tokenizer.is_control(i)}
        self._tokenizer, self._digits = _tokenizer(tokenizer, tokens, self.single), DigitLimit(tokens)

    def constraint(self, source: str, name: str, is_json: bool) -> Constraint:
        with self._lock:
            found = self._found.setdefault((source, name), _Compiled())
            self._found.move_to_end((source, name))
            if len(self._found) > _KEPT:
                self._found.popitem(last=False)
        matcher = found.matcher(lambda: self._compile(source, name), name)
        return Constraint(matcher, name, self._stop_ids, self._digits.copy() if is_json else None)

    def _compile(self, source: str, name: str) -> Any:
        llguidance = _library()
        items = min(max(_ITEMS[0], self._tokenizer.vocab_size // 6), _ITEMS[1])
        limits = llguidance.LLParserLimits(**_LIMITS, step_max_items=items)
        text = source if "%llguidance" in source else _HEADER + source
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        Constraint(matcher, name, self._stop_ids)._check()
        trial = Constraint(matcher.deep_copy(), name, self._stop_ids)
        trial.apply(np.zeros(self._tokenizer.vocab_size, np.float32))
        return matcher


_lock = threading.Lock()
_grammars: weakref.WeakKeyDictionary[Tokenizer, _Grammars] = weakref.WeakKeyDictionary()


def _grammars_of(tokenizer: Tokenizer) -> _Grammars:
    with _lock:
        grammars = _grammars.get(tokenizer)
        if grammars is None:
            grammars = _grammars[tokenizer] = _Grammars(tokenizer)
    return grammars


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        message = "schema, regex, grammar, strict and forced tools need llguidance: pip install 'hotcold[schema]'"
        raise UnsupportedError(message) from None
    return llguidance


def _tokenizer(tokenizer: Tokenizer, tokens: list[bytes], single: dict[bytes, int]) -> Any:
    """llguidance's view of a vocabulary: the bytes of every token, and which are no text."""
    llguidance = _library()

    class Vocabulary:
        eos_token_id, bos_token_id = min(tokenizer.stop_ids), tokenizer.bos_id
        special_token_ids = [i for i in range(len(tokens)) if tokenizer.is_control(i)]

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: bytes | str) -> list[int]:
            # for forced texts, which no_forcing turns off: byte by byte, as far as the vocabulary has them
            data = text.encode() if isinstance(text, str) else text
            return [single[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in single]

    wrapped = llguidance.TokenizerWrapper(Vocabulary())
    return llguidance.LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=sorted(tokenizer.stop_ids))


def _on_large_stack(work: Callable[[], T], name: str) -> T:
    """Run in a thread whose stack survives the recursion that the longest source can cause.

    ParameterError where it takes too long, BusyError where others have taken all threads.
    """
    done: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            _slots.release()

    if not _slots.acquire(timeout=_WAIT_S):
        raise BusyError(f"{name}: too many others are being compiled; ask again later")
    try:
        with _lock:
            before = threading.stack_size(_STACK)
            try:
                thread = threading.Thread(target=run, name="hotcold-grammar", daemon=True)
                thread.start()
            finally:
                threading.stack_size(before)
    except BaseException:
        _slots.release()
        raise
    thread.join(_COMPILE_S)
    if errors:
        raise errors[0]
    if not done:
        raise ParameterError(f"{name}: got one that takes over {_COMPILE_S:g} s to compile; make it simpler")
    return done[0]


def _regex(regex: str) -> str:
    check_pattern(regex, "regex")
    # the whole answer is meant anyway, and llguidance has no anchors
    regex = regex.removeprefix("^")
    if regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2:
        regex = regex[:-1]
    return f"start: /{_library().regex_to_lark(regex, 'd')}/\n" if regex else 'start: ""\n'


def _lark(text: str) -> str:
    if is_gbnf(text):
        text = gbnf_to_lark(text)
    else:
        plain = _without_literals(text)
        if re.search(r"[&~]", plain):
            raise ParameterError("grammar: got & or ~ between terminals, which can cost any time; write it without")
        if re.search("%(llguidance|regex|lark|import)", plain):
            raise ParameterError("grammar: got %llguidance, %regex, %lark or %import, wanted rules and %json alone")
        for match in re.finditer(r"%json\s*", text):
            try:
                schema, _ = json.JSONDecoder().raw_decode(text, match.end())
            except (ValueError, RecursionError) as error:
                raise ParameterError(f"grammar: %json: {error}") from None
            if isinstance(schema, Mapping):
                prepared(schema, "grammar")
        _check_terminals(text)
    if text.count("\n") > _MOST_RULES:
        raise ParameterError(f"grammar: got {text.count(chr(10))} lines, wanted at most {_MOST_RULES}")
    _check_ways(text)
    return text


def _check_ways(text: str) -> None:
    """ParameterError for a grammar in which one text may be read in very many ways: time grows with their square."""
    plain = re.sub(r"(?m)^[ \t]*_?[A-Z][^\n]*(?:\n[ \t]*\|[^\n]*)*", "", _without_literals(text))  # no terminals
    repeats = len(re.findall(r"[?*+]|\{\s*\d", plain))  # each is a rule with alternatives, too
    uses = len(re.findall(r"\b[a-z_]\w*", plain)) + repeats
    alternatives = plain.count("|") + repeats + 1
    if uses * alternatives > _MOST_WAYS:
        wanted = f"at most {_MOST_WAYS} of them multiplied"
        raise ParameterError(f"grammar: got {uses} uses of rules and {alternatives} alternatives, wanted {wanted}")


def _without_literals(text: str) -> str:
    return re.sub(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*', " ", text)


def _check_terminals(text: str) -> None:
    """ParameterError for a terminal that is large when the terminals in it are put in."""
    bodies: dict[str, str] = {}
    for match in re.finditer(r"^[ \t]*(_?[A-Z][A-Z0-9_]*)[^:\n]*:((?:[^\n]|\n[ \t]*(?=\|))*)", text, re.MULTILINE):
        bodies[match[1]] = match[2]
    parts = {name: _TERMINAL.findall(body) for name, body in bodies.items()}
    sizes: dict[str, int] = {}
    begun: set[str] = set()
    todo = list(bodies)
    while todo:  # each after those in it; of a circle, which llguidance refuses, one is counted as nothing
        name = todo[-1]
        if name not in begun:
            begun.add(name)
            todo += [item for item in parts[name] if item in bodies and item not in begun]
            continue
        todo.pop()
        sizes[name] = nullable(bodies[name]) + sum(sizes.get(item, 1) for item in parts[name])
        if sizes[name] > MOST_NULLABLE:
            raise ParameterError(f"grammar: got a terminal of over {MOST_NULLABLE} parts, wanted fewer; make it a rule")


def _first_line(text: str) -> str:
    """llguidance's message without its place in our wrapping and its dump of the source."""
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", text.strip())
    text = text.removeprefix("failed to compile JSON schema: ")
    if text.startswith("NoExtension"):
        return "no text fits it"
    lines = text.split("\n")
    # a regular expression's error says what is wrong in its last line
    shown = next((line for line in lines if line.startswith("error: ")), lines[0])
    return shown if len(shown) < 200 else shown[:199] + "…"
