"""Constrained answers: what they may say against independent readers, and sources that want too much."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from fakes import HEL, FakeTokenizer, make, saying
from pydantic import BaseModel, Field
from schemas import CHECKER, make_schema
from vocabularies import byte_level, sentencepiece

from hotcold.formats.errors import BusyError, HotcoldError, ParameterError, UnsupportedError
from hotcold.formats.tokenizer import Tokenizer
from hotcold.runtime import grammar
from hotcold.runtime.gbnf import gbnf_to_lark
from hotcold.runtime.grammar import Constraint, constraint

EVEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
N_SCHEMAS = {"byte_level": 200}  # else 60


@pytest.fixture(scope="module", params=["fake", "byte_level", "sentencepiece", "spaces"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    name = request.param
    return FakeTokenizer() if name == "fake" else byte_level() if name == "byte_level" else sentencepiece(name)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return byte_level()


def allowed(it: Constraint, n_vocab: int) -> set[int]:
    scores = np.zeros(n_vocab, np.float32)
    it.apply(scores)
    assert set(np.unique(scores)) <= {0.0, -np.inf}
    return set(np.flatnonzero(scores == 0).tolist())


def walk(it: Constraint, tokenizer: Any, seed: int, limit: int = 4000) -> str:
    """What a model of random opinions says."""
    rng = np.random.default_rng(seed)
    said = b""
    for _ in range(limit):
        scores = (rng.standard_normal(tokenizer.n_vocab) + rng.gumbel(size=tokenizer.n_vocab)).astype(np.float32)
        it.apply(scores)
        token = int(scores.argmax())
        it.accept(token)
        if token in tokenizer.stop_ids:
            return said.decode()
        said += tokenizer.token_bytes(token)
    raise AssertionError(f"no end after {said[:200]!r}")


def accepts(it: Constraint, tokenizer: Any, text: str) -> bool:
    """Whether the constraint takes a text, byte by byte, and may end there."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_vocab) if not tokenizer.is_control(i)}
    for byte in text.encode():
        token = single[bytes([byte])]
        if token not in allowed(it, tokenizer.n_vocab):
            return False
        it.accept(token)
    return bool(allowed(it, tokenizer.n_vocab) & tokenizer.stop_ids)


def check_json(schema: dict[str, Any], text: str) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))


def test_random_schemas_in_every_vocabulary(tokenizer: Any, request: pytest.FixtureRequest) -> None:
    for seed in range(N_SCHEMAS.get(request.node.callspec.params["tokenizer"], 60)):
        schema = make_schema(seed)
        jsonschema.Draft202012Validator.check_schema(schema)
        it = constraint(tokenizer, schema=schema)
        assert it is not None
        check_json(schema, walk(it, tokenizer, seed))


def test_random_schemas_through_a_reply() -> None:
    llm = make(n_ctx=4000)
    for seed in range(60):
        schema = make_schema(1000 + seed)
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
        reply = llm.create_chat_completion("Hi", response_format=form, seed=seed, **EVEN)
        assert reply["choices"][0]["finish_reason"] == "stop"
        check_json(schema, reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize("regex", ["[a-c ]{0,3}", "(the|The)? ?[0-9]*", "é|ü+", ".{0,2}", " x"])
def test_masks_are_exact_to_the_byte(tokenizer: Any, regex: str) -> None:
    """A token may come if some text that begins with its bytes fits: all such texts, of up to 3 characters, tried."""
    it = constraint(tokenizer, regex=regex)
    assert it is not None
    found = allowed(it, tokenizer.n_vocab)
    tokens = {i: tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab) if not tokenizer.is_control(i)}
    for i, data in tokens.items():
        assert (i in found) == (bool(data) and fits_beginning(regex, data)), (regex, data)
    others = found - set(tokens)
    assert others == (tokenizer.stop_ids if re.fullmatch(regex, "") else set())


# of every first byte, and of every beginning of two and three bytes, at least one
CHARACTERS = {chr(i): chr(i).encode() for i in (0xE9, 0xFC, *range(0x80, 0x110000, 32)) if not 0xD800 <= i < 0xE000}


def fits_beginning(regex: str, data: bytes) -> bool:
    for cut in range(4):  # a character may be unfinished
        whole, rest = data[: len(data) - cut], data[len(data) - cut :]
        try:
            text = whole.decode()
        except UnicodeDecodeError:
            continue
        if not rest:
            tails = ["", "a", "é", "e", "he", "The"[len(text) :], "x", "0"]
            return any(re.fullmatch(regex, text + tail) for tail in tails)
        return any(data.startswith(rest) and re.fullmatch(regex, text + char) for char, data in CHARACTERS.items())
    return False


def test_where_an_answer_may_end(tokenizer: Any) -> None:
    it = constraint(tokenizer, regex="ab?")
    assert it is not None
    n, stops = tokenizer.n_vocab, set(tokenizer.stop_ids)
    single = {tokenizer.token_bytes(i): i for i in range(n) if not tokenizer.is_control(i)}
    assert not allowed(it, n) & stops
    it.accept(single[b"a"])
    assert allowed(it, n) >= stops and allowed(it, n) > stops
    it.accept(single[b"b"])
    assert allowed(it, n) == stops
    it.accept(min(stops))


def test_control_tokens_are_no_text(tokenizer: Any) -> None:
    it = constraint(tokenizer, regex="(?s:.*)")
    assert it is not None
    controls = {i for i in range(tokenizer.n_vocab) if tokenizer.is_control(i)}
    assert allowed(it, tokenizer.n_vocab) & controls == set(tokenizer.stop_ids)


def test_scores_past_the_vocabulary_are_ruled_out(plain: Tokenizer) -> None:
    it = constraint(plain, regex="a*")
    assert it is not None
    assert max(allowed(it, plain.n_vocab + 50)) < plain.n_vocab


def test_two_answers_of_one_grammar_do_not_meet(plain: Tokenizer) -> None:
    first, second = (constraint(plain, regex="ab|cd") for _ in range(2))
    assert first is not None and second is not None
    assert accepts(first, plain, "ab") and accepts(second.copy(), plain, "cd") and not accepts(second, plain, "ad")


def test_a_wrong_token_is_an_error(plain: Tokenizer) -> None:
    it = constraint(plain, regex="a")
    assert it is not None
    with pytest.raises(ParameterError, match="^regex: "):
        it.accept(next(i for i in range(plain.n_vocab) if plain.token_bytes(i) == b"z"))


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    name: str = Field(max_length=8)


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=10)
    age: int = Field(ge=0, le=120)
    pets: list[Pet] = Field(max_length=2)
    boss: str | None = Field(None, max_length=5)


def test_pydantic_models() -> None:
    llm = make(n_ctx=4000)
    for seed in range(10):
        Person.model_validate_json(llm.chat("Who?", schema=Person, seed=seed, **EVEN))
    text = "".join(llm.stream("Who?", schema=json.dumps(Person.model_json_schema()), max_tokens=None, seed=1, **EVEN))
    Person.model_validate_json(text)


def test_json_is_written_without_loose_spaces(plain: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "required": ["a"]}

    def takes(text: str) -> bool:
        it = constraint(plain, schema=schema)
        assert it is not None
        return accepts(it, plain, text)

    assert takes('{"a": 1, "b": [1, "x", {}]}') and takes('{"a": -12}')
    assert not takes('{"a":1}') and not takes('{"a": 1 }') and not takes(' {"a": 1}') and not takes('{\n"a": 1}')
    assert not takes('{"a": 1, "c": 2}'), "properties that the schema does not list"


def test_recursion(plain: Tokenizer) -> None:
    either = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"next": either}, "required": ["next"]}
    it = constraint(plain, schema=node)
    assert it is not None and accepts(it, plain, '{"next": {"next": {"next": null}}}')


def test_numbers_come_to_an_end(tokenizer: Any) -> None:
    """A model that loves digits more than all else writes 20 of them, or as many as the schema wants."""

    def greedy(schema: dict[str, Any]) -> Any:
        it, said = constraint(tokenizer, schema=schema), b""
        assert it is not None
        ends = [tokenizer.token_bytes(i)[-1:] for i in range(tokenizer.n_vocab)]
        fond = np.array([end.isdigit() + (end == b"9") for end in ends], np.float32)
        for _ in range(1000):
            scores = fond - np.arange(tokenizer.n_vocab, dtype=np.float32) * np.float32(1e-5)
            it.apply(scores)
            token = int(scores.argmax())
            it.accept(token)
            if token in tokenizer.stop_ids:
                return json.loads(said)
            said += tokenizer.token_bytes(token)
        raise AssertionError(said)

    found = greedy({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert 10**19 <= abs(found["a"]) < 10**22
    moment = {"type": "string", "format": "time"}
    found = greedy({"type": "object", "properties": {"a": moment}, "required": ["a"]})
    assert len(found["a"]) < 60
    assert isinstance(greedy({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}), list)
    assert len(greedy({"type": "array", "prefixItems": [{"const": "1" * 50}], "minItems": 1, "maxItems": 1})[0]) == 50
    long = 10**40
    assert greedy({"enum": [[long]]}) == [long]


def test_tokenizers_are_let_go() -> None:
    llm = make()
    llm.generate("a", regex="b")
    kept = weakref.ref(llm.tokenizer)
    llm.close()
    del llm
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "change, takes_more",
    [
        ({}, False),
        ({"additionalProperties": True}, True),
        ({"additionalProperties": {"type": "null"}}, True),
        ({"required": ["a", "z"]}, True),
    ],
)
def test_which_objects_are_closed(plain: Tokenizer, change: dict[str, Any], takes_more: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], **change}
    for around in (lambda s: s, lambda s: {"$ref": "#/$defs/x", "$defs": {"x": s}}, lambda s: {"anyOf": [s, s]}):
        it = constraint(plain, schema=around(schema))
        assert it is not None and accepts(it, plain, '{"a": 1, "z": null}') == takes_more


def test_joined_objects_stay_open(plain: Tokenizer) -> None:
    parts = [{"type": "object", "properties": {name: {"const": 1}}, "required": [name]} for name in "ab"]
    it = constraint(plain, schema={"allOf": parts})
    assert it is not None and accepts(it, plain, '{"a": 1, "b": 1}')


GBNF = [
    ('root ::= "yes" | "no"', ["yes", "no"], ["y", "yesno", ""]),
    # a longer terminal would swallow the x
    ('root ::= word "x"\nword ::= [a-z]+', ["ax", "xxx", "abcx"], ["x", "ab"]),
    ('root ::= "ab" | [a-z] "bc"', ["ab", "abc"], ["a", "abcd"]),
    ('root  ::= ( "a" "b"? ){2,3} # twice or more\n', ["aa", "aba", "ababab"], ["a", "aaaa"]),
    ('root ::= "a"{2} "b"{,}'.replace("{,}", "{0,}"), ["aa", "aab", "aabbb"], ["a", "aaa"]),
    ("root ::= [^a-c\\n]*", ["", "xyz é", "-"], ["a", "x\n"]),
    ('root ::= "\\x41\\u00e9\\U0001F600" [\\]\\[\\\\-]', ["Aé😀]", "Aé😀-", "Aé😀\\"], ["Aé😀", "Aé😀^"]),
    ('root ::= sum\nsum ::= one ("+" one)*\none ::= "(" sum ")" | [0-9]', ["1", "(1+2)+3", "((1))"], ["1+", "()"]),
    ('root ::= "a"\n  # a comment\n\nother-rule ::= "b"', ["a"], ["b"]),
    ("root ::= .", ["x", "\n", "é"], ["", "xy"]),
    ('root ::=\n  "a" |\n  "b" (\n "c"\n | "d" )', ["a", "bc", "bd"], ["b"]),
    ("root ::= item*\nitem ::= [a-b]?", ["", "ab", "bbb"], ["c"]),
    ('root ::= "" | "/" [a-z/]+', ["", "/a/b"], ["/"]),
]


@pytest.mark.parametrize("source, good, bad", GBNF)
def test_gbnf(plain: Tokenizer, source: str, good: list[str], bad: list[str]) -> None:
    for text in (*good, *bad):
        it = constraint(plain, grammar=source)
        assert it is not None and accepts(it, plain, text) == (text in good), text


@pytest.mark.parametrize(
    "source, problem",
    [
        ("root ::= other", "no rule 'other'"),
        ('rule ::= "a"', "no rule 'root'"),
        ('root ::= "a"\nroot ::= "b"', "'root' twice"),
        ('root ::= ("a"', "wanted \\)"),
        ('root ::= "a', "closing quote"),
        ("root ::= [a", "closing \\]"),
        ("root ::= [z-a]", "ascending"),
        ("root ::= []", "between \\[ and \\]"),
        ('root ::= "\\q"', "an escape"),
        ('root ::= "\\x4"', "an escape"),
        ('root ::= "\\ud800"', "character of Unicode"),
        ('root ::= "a"{x}', "{n}"),
        ('root ::= "a" ]', "end of the rule"),
        ('root ::= "a"\n"b" ::= root', "name of a rule"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    ],
)
def test_broken_gbnf(source: str, problem: str) -> None:
    with pytest.raises(ParameterError, match=f"^grammar: .*{problem}"):
        gbnf_to_lark(source)


def test_lark(plain: Tokenizer) -> None:
    source = 'start: greeting " " NAME "!"?\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]+/'
    for text, good in (("hi Bob", True), ("hello Bob!", True), ("hi bob", False), ("hi Bob!!", False)):
        it = constraint(plain, grammar=source)
        assert it is not None and accepts(it, plain, text) == good
    it = constraint(plain, grammar='start: "x = " %json {"type": "object", "properties": {"a": {"const": 1}}}')
    assert it is not None and accepts(it, plain, 'x = {"a":1}')


@pytest.mark.parametrize("regex, good, bad", [("^a$", "a", "^a$"), ("a\\$", "a$", "a"), ("a/b\nc", "a/b\nc", "a/bc")])
def test_regex_notation(plain: Tokenizer, regex: str, good: str, bad: str) -> None:
    for text in (good, bad):
        it = constraint(plain, regex=regex)
        assert it is not None and accepts(it, plain, text) == (text == good)


def nested(key: str, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}} if key == "properties" else {key: [schema] if key == "anyOf" else schema}
    return schema


def chain(n: int) -> dict[str, Any]:
    refs = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**refs, f"a{n}": {"type": "integer"}}}


LONG = "x" * 200_000
HOSTILE: list[tuple[str, Any, str]] = [
    ("schema", nested("properties", 200), "nested over"),
    ("schema", nested("items", 5000), "nested|recursion|JSON"),
    ("schema", "[" * 100_000, "no JSON"),
    ("schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("schema", {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(20)]}, "wanted at most 6"),
    ("schema", {"type": "integer", "multipleOf": 99_999_999}, "multipleOf"),
    ("schema", {"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}, "multipleOf"),
    ("schema", {"multipleOf": 0}, "multipleOf"),
    ("schema", {"multipleOf": "x"}, "multipleOf"),
    ("schema", {"multipleOf": float("inf")}, "no JSON"),
    ("schema", {"$ref": "http://example.com/x"}, "example.com"),
    ("schema", {"$ref": "#/nowhere"}, ""),
    ("schema", {"$ref": "#"}, "no text fits"),
    ("schema", {"not": {}}, "not"),
    ("schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("schema", {"type": "foo"}, "foo"),
    ("schema", {"type": 3, "properties": 5}, ""),
    ("schema", {"enum": []}, ""),
    ("schema", {"type": "integer", "minimum": 10**30}, ""),
    ("schema", {"const": LONG}, "characters"),
    ("schema", {"a": {1, 2}}, "no JSON"),
    ("schema", {1: 2, "b": object()}, "no JSON"),
    ("schema", {"const": "\ud800"}, ""),
    ("schema", "\ud800", "surrogate"),
    ("schema", [], "list"),
    ("schema", 5, "int"),
    ("schema", "5", "int"),
    ("schema", int, "type"),
    ("regex", LONG, "characters"),
    ("regex", "(" * 50_000, ""),
    ("regex", "(a", "unclosed"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"[^\s\S]", "no text fits"),
    ("regex", 5, "int"),
    ("regex", b"a", "bytes"),
    ("grammar", "", "start"),
    ("grammar", "hello", ""),
    ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    ("grammar", "start: A\nA: /a/ & /b/", "&"),
    ("grammar", "start: A\nA: ~/.*b.{25}/", "~"),
    ("grammar", "%llguidance {}\nstart: /a/", "%llguidance"),
    ("grammar", 'start: %json {"multipleOf": 1000003}', "multipleOf"),
    ("grammar", "start: %json {", "%json"),
    ("grammar", "start: a\n" * 10_000, "lines"),
    ("grammar", {"a": 1}, "dict"),
    ("regex", ".?" * 5000, "5000 optional parts"),
    ("schema", {"type": "string", "pattern": ".?" * 5000}, "5000 optional parts"),
    ("schema", {"patternProperties": {"a*" * 1001: {}}}, "1001 optional parts"),
    ("grammar", "start: A\nA: " + "B " * 5000 + "\nB: /.?/", "over 1000 parts"),
    ("grammar", "start: A\n" + "".join(f"{a}: {f'{b} ' * 16}\n" for a, b in ("AB", "BC", "CD")) + "D: /.?/", "over"),
    ("grammar", "start: A\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(500)) + "A500: /a?/", "over 1000"),
]


@pytest.mark.parametrize("name, value, problem", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_refused(plain: Tokenizer, name: str, value: Any, problem: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: (?s:.)*({problem})") as caught:
        constraint(plain, **{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


EXPENSIVE: list[tuple[str, Any]] = [
    ("schema", chain(2000)),
    ("schema", {"type": "string", "maxLength": 10**9}),
    ("schema", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    ("schema", {"enum": [f"value {i * i}" for i in range(5000)]}),
    ("schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
    ("regex", "(a{1000}){1000}"),
    ("regex", "((a{1,100}){1,100}){1,100}"),
    ("regex", "(a|b)*a(a|b){200}"),
    ("regex", "(a+)+b"),
    ("regex", "(.*a){20}"),
    ("regex", "|".join(f"x{i}" for i in range(10_000))),
    ("grammar", "start: r0\n" + "".join(f'r{i}: r{i + 1} "a"\n' for i in range(3000)) + 'r3000: "b"\n'),
    ("grammar", "start: R0\n" + "".join(f'R{i}: R{i + 1} "a"\n' for i in range(900)) + 'R900: "b"\n'),
    ("grammar", "start: r\nr: s s | [^x]\ns: r r | [^y]\n".replace("[", "/[").replace("]", "]/")),
    ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "b"?\n'),
    ("grammar", 'start: a{1,1000}\na: b{1,1000}\nb: "x"?\n'),
    ("grammar", 'root ::= root root | "a" | ""'),
]


@pytest.mark.parametrize("name, value", EXPENSIVE, ids=range(len(EXPENSIVE)))
def test_what_looks_expensive_comes_to_an_end(plain: Tokenizer, name: str, value: Any) -> None:
    """Compiling and some steps, on a thread with a small stack: an error is fine, a crash or a hang is not."""
    steps: list[int] = []

    def run() -> None:
        rng = np.random.default_rng(0)
        try:
            it = constraint(plain, **{name: value})
            assert it is not None
            for _ in range(20):
                token = int(rng.choice(sorted(allowed(it, plain.n_vocab))))
                if token in plain.stop_ids:
                    break
                it.accept(token)
        except HotcoldError:
            pass
        steps.append(1)

    before = threading.stack_size(512 << 10)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert steps


def test_arguments_of_calls() -> None:
    llm = make(saying(HEL))
    with pytest.raises(ParameterError, match="^schema: got schema and regex, wanted one"):
        llm.generate("a?", schema={}, regex="a")
    with pytest.raises(ParameterError, match="shema: unknown argument; did you mean schema"):
        llm.chat("a?", shema={})
    form = {"type": "json_schema", "json_schema": {"schema": {"const": ["a long text"]}}}
    cut = llm.create_chat_completion("a?", response_format=form, max_tokens=5)["choices"][0]
    assert cut["finish_reason"] == "length" and '["a long text"]'.startswith(cut["message"]["content"])
    # nothing is asked: everything may come
    assert llm.generate("a?", schema=None, regex=None) == "Hel"
    assert constraint(FakeTokenizer()) is None  # type: ignore[arg-type]


def test_models_that_cannot_end(plain: Tokenizer) -> None:
    endless: Any = FakeTokenizer()
    endless.stop_ids = frozenset()
    with pytest.raises(UnsupportedError, match="no token that ends an answer"):
        constraint(endless, regex="a")


def test_what_no_token_can_say() -> None:
    class Letters(FakeTokenizer):
        """No token for digits."""

        def is_control(self, id: int) -> bool:
            return super().is_control(id) or chr(id).isdigit()

    tokenizer: Any = Letters()
    with pytest.raises(ParameterError, match="^regex: no text fits it"):
        constraint(tokenizer, regex="[0-9]")


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = make(saying(HEL))
    with pytest.raises(UnsupportedError, match=r"need llguidance: pip install 'hotcold\[schema\]'"):
        llm.generate("a?", regex="a")
    assert llm.generate("a?") == "Hel"


def test_who_asks_for_nothing_loads_nothing() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from fakes import make, saying; "
        "llm = make(saying(65)); assert llm.generate('a?') == 'A'; llm.create_chat_completion('a?'); "
        "found = {'llguidance', 'pydantic', 'jsonschema'} & set(sys.modules); assert not found, found"
    )
    root: Callable[[], str] = lambda: str(__import__("pathlib").Path(__file__).parents[2])  # noqa: E731
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root())


def ambiguous(n: int, letters: str = "a-z ") -> str:
    """n rules, each of which reads what the others read."""
    lines = [f"b{i}: /[{letters}]{{1,{i % 7 + 1}}}/ a?" for i in range(n)]
    return "\n".join(["start: a*", "a: " + " | ".join(f"b{i}" for i in range(n)), *lines]) + "\n"


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("grammar", ambiguous(1500), "6004 uses of rules and 3001 alternatives"),
        ("grammar", ambiguous(4000), "4002 lines"),
        ("grammar", "start: a\na: " + " | ".join(f"/[a-z]{{{i}}}/ a" for i in range(2000)), "2003 uses"),
        ("schema", {"$defs": {"r": {"anyOf": [{"$ref": "#/$defs/r"}] * 600}}, "$ref": "#/$defs/r"}, "602 references"),
    ],
    ids=range(4),
)
def test_too_many_ways_to_read_one_text(plain: Tokenizer, name: str, value: Any, problem: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got {problem}.* wanted at most"):
        constraint(plain, **{name: value})


def test_many_plain_alternatives_are_no_such_thing(plain: Tokenizer) -> None:
    words = [f"w{i}" for i in range(2000)]
    gbnf = 'root ::= "(" word ")"\nword ::= ' + " | ".join(f'"{word}"' for word in words)
    lark = 'start: "(" WORD ")"\nWORD: ' + "\n | ".join(f'"{word}"' for word in words)
    for source in (gbnf, lark, "start: " + '%json {"enum": ["' + '", "'.join(words) + '"]}'):
        it = constraint(plain, grammar=source)
        assert it is not None and accepts(it, plain, '"w1999"' if "%json" in source else "(w1999)")


def test_a_token_that_takes_long_ends_the_answer(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    it = constraint(plain, regex="a+")
    assert it is not None
    clock = iter([0.0, 0.2, 1.0, 1.3])
    monkeypatch.setattr(grammar.time, "thread_time", lambda: next(clock))
    allowed(it, plain.n_vocab)
    with pytest.raises(ParameterError, match="^regex: got one that takes over 0.25 s for a token"):
        allowed(it, plain.n_vocab)


def test_a_compilation_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to itself; others are compiled meanwhile, as long as there are threads for them."""
    plain, go, real = byte_level(), threading.Event(), grammar._Grammars._compile
    threads: list[threading.Thread] = []

    def compile(self: Any, source: str, name: str) -> Any:
        if "slow" in source:
            threads.append(threading.current_thread())
            assert go.wait(60)
        return real(self, source, name)

    monkeypatch.setattr(grammar._Grammars, "_compile", compile)
    assert constraint(plain, regex="known") is not None
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "_COMPILE_S", 0.05)
        patch.setattr(grammar, "_WAIT_S", 0.05)
        for i in range(3):
            with pytest.raises(ParameterError, match="^regex: got one that takes over 0.05 s to compile"):
                constraint(plain, regex=f"slow{i}")
        assert len(threads) == 3 and all(thread.daemon for thread in threads)
        with pytest.raises(ParameterError, match="to compile"):  # it is not tried again
            constraint(plain, regex="slow0")
        with pytest.raises(BusyError, match="^regex: too many others"):
            constraint(plain, regex="other")
        assert constraint(plain, regex="known") is not None and len(threads) == 3
    go.set()
    for thread in threads:
        thread.join()
    assert constraint(plain, regex="other") is not None


def test_compilations_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun, go, real = byte_level(), threading.Event(), threading.Event(), grammar._Grammars._compile
    compiled: list[str] = []

    def compile(self: Any, source: str, name: str) -> Any:
        compiled.append(source)
        if "slow" in source:
            begun.set()
            assert go.wait(60)
        return real(self, source, name)

    monkeypatch.setattr(grammar._Grammars, "_compile", compile)
    monkeypatch.setattr(grammar, "_COMPILE_S", 60.0)
    found: list[Constraint | None] = []
    threads = [threading.Thread(target=lambda: found.append(constraint(plain, regex="slow"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    quick = constraint(plain, regex="quick")
    assert quick is not None and accepts(quick, plain, "quick") and found == []
    go.set()
    for thread in threads:
        thread.join()
    assert len(compiled) == 2 and all(it is not None and accepts(it, plain, "slow") for it in found) and len(found) == 3
