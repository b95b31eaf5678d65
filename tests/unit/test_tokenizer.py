"""Tokenizers against the libraries that they come from, on vocabularies trained here."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.formats.errors import FormatError, HotcoldError, ParameterError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.pre_tokenizers import PRE_TOKENIZERS
from hotcold.formats.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog while 12 boxing wizards don't stop; we're sure they'll see "
    "naïve café owners (and others) pay 3.50 for jumping, jumped, jumper! Straße übergrößen русский текст "
    "日本語 テキスト def main(args): return args[0] + 1 # comment {key: value} <|turn|> hello hello world"
)
CORPUS = [" ".join(random.Random(seed).sample(WORDS.split(), 30)) for seed in range(60)]
CONTROL = ["<|turn|>", "<|turn|>more", "<s>", "</s>", "<|im_end|>"]
USER_DEFINED = ["<tool>", "<tool>s", "   "]
TEXTS = [
    "", " ", "  ", "   ", "    ", " " * 17, "a", " a", "a ", "\n", "\n\n", " \n \t\r\n", "hello world",
    "Hello  World", "don't we'll THEY'RE 'tis rock'n'roll", "12 123 1234567890 3.14 1,000 x2 2x ٣ ²",
    "naïve café Straße", "русский", "日本語のテキスト", "🤗", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "e\u0301\u0302",
    "\u00a0\u2003\u3000\u200b\ufeff", "a\x00b\x1b[0m", "\U0010ffff\ue000", "def f(x):\n\treturn x  # ok\n",
    "!!! ??? ... -- && || <> {} [] ()", "<|turn|>", "<|turn|>more", "a<|turn|>b", "<|turn", "|turn|>",
    "<s>", "</s>", "<unk>", "<0x41>", "<|im_end|>", "<tool>", "<tool>s<tool>", " <tool> ", "x<tool>y",
    "▁", "a▁b",
]  # fmt: skip
TEXTS += ["".join(random.Random(i).choices(WORDS + "\n\t  '🤗é12", k=24)) for i in range(80)]
PLAIN = [text for text in TEXTS if not any(token in text for token in (*CONTROL, *USER_DEFINED))]

Keys = dict[str, Any]


def load(keys: Keys) -> Tokenizer:
    metadata = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return load_tokenizer(SimpleNamespace(metadata=metadata, path="test.gguf"))


@pytest.fixture(scope="module")
def bpe_source() -> Any:
    """A small byte-level BPE, trained by its library."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def bpe_keys(bpe_source: Any) -> Keys:
    """That BPE as a GGUF file describes it, with special tokens after its own."""
    import json

    model = json.loads(bpe_source.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER_DEFINED)
    tokens = [*tokens, *CONTROL, *USER_DEFINED]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": merges,
        "token_type": np.array(types, np.int32),
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }


@pytest.fixture(scope="module")
def spm_source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small SentencePiece BPE, trained by its library the way Llama's was."""
    import sentencepiece

    folder: Path = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tiny"),
        vocab_size=620,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|turn|>"],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))


@pytest.fixture(scope="module")
def spm_keys(spm_source: Any) -> Keys:
    """That model as a GGUF file describes it, with user-defined tokens after its own."""
    ids = range(spm_source.vocab_size())
    is_kinds = ((spm_source.is_unknown, 2), (spm_source.is_control, 3), (spm_source.is_byte, 6))
    types = [next((kind for is_kind, kind in is_kinds if is_kind(i)), 1) for i in ids]
    return {
        "model": "llama",
        "tokens": [spm_source.id_to_piece(i) for i in ids] + USER_DEFINED,
        "scores": np.array([spm_source.get_score(i) for i in ids] + [0.0] * len(USER_DEFINED), np.float32),
        "token_type": np.array([*types, *[4] * len(USER_DEFINED)], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def bpe(bpe_keys: Keys) -> Tokenizer:
    return load(bpe_keys)


@pytest.fixture(scope="module")
def spm(spm_keys: Keys) -> Tokenizer:
    return load(spm_keys)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*(decoder.push(id) for id in ids), decoder.finish()]


def test_bpe_equals_its_source(bpe: Tokenizer, bpe_source: Any) -> None:
    for text in (*PLAIN, *CORPUS):
        assert bpe.encode(text) == bpe_source.encode(text).ids, text
    assert len(PLAIN) > 90


def test_spm_equals_its_source(spm: Tokenizer, spm_source: Any) -> None:
    for text in (*PLAIN, *CORPUS):
        assert spm.encode(text, add_bos=False) == spm_source.encode(text), text
        assert spm.decode(spm.encode(text, add_bos=False)) == spm_source.decode(spm_source.encode(text)), text


def test_spm_without_space_prefix(spm_keys: Keys) -> None:
    tokenizer = load({**spm_keys, "add_space_prefix": False})
    assert tokenizer.token_text(tokenizer.encode("hello", add_bos=False)[0])[0] != "▁"
    for text in (" hello", "hello", "  hello"):
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids) == text and "".join(stream(tokenizer, ids)) == text


def test_control_tokens_in_text(tokenizer: Tokenizer) -> None:
    turn = tokenizer.encode("<|turn|>", add_bos=False, special=True)
    assert len(turn) == 1 and tokenizer.is_control(turn[0])
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert not any(map(tokenizer.is_control, ids)), text
        if not tokenizer.space_prefix:
            assert tokenizer.decode(ids) == text
        elif not any(token in text for token in USER_DEFINED):  # a prefix follows each of them, as in llama.cpp
            assert tokenizer.decode(ids) == text.replace("▁", " ")
    mixed = tokenizer.encode("a<|turn|>b<|turn|><|turn|>", add_bos=False, special=True)
    assert [id for id in mixed if tokenizer.is_control(id)] == turn * 3
    assert tokenizer.decode(mixed, special=True).replace(" ", "") == "a<|turn|>b<|turn|><|turn|>"
    assert tokenizer.decode(mixed).replace(" ", "") == "ab"


def test_longest_special_token_wins(bpe: Tokenizer) -> None:
    assert [bpe.token_text(i) for i in bpe.encode("<|turn|>more<|turn|>", special=True)] == [
        "<|turn|>more",
        "<|turn|>",
    ]
    assert [bpe.token_text(i) for i in bpe.encode("<tool>s<tool>")] == ["<tool>s", "<tool>"]
    assert [bpe.token_text(i) for i in bpe.encode(" " * 7)] == ["   ", "   ", "Ġ"]


def test_user_defined_tokens_are_always_parsed(tokenizer: Tokenizer) -> None:
    tool = tokenizer.encode("<tool>", add_bos=False)
    assert len(tool) == 1 and tokenizer.token_bytes(tool[0]) == b"<tool>" and not tokenizer.is_control(tool[0])
    assert tool[0] in tokenizer.encode("x<tool>y", add_bos=False)


def test_bos_and_eos(bpe_keys: Keys, bpe: Tokenizer, spm: Tokenizer) -> None:
    assert not bpe.add_bos and spm.add_bos
    hello = bpe.encode("hello")
    assert hello[0] != bpe.bos_id and bpe.encode("hello", add_bos=True) == [bpe.bos_id, *hello]
    with_bos = load({**bpe_keys, "add_bos_token": True, "add_eos_token": True})
    assert with_bos.encode("hello") == [bpe.bos_id, *hello, bpe.eos_id]
    assert with_bos.encode("hello", add_bos=False) == hello
    assert with_bos.encode("<s>hello", special=True) == [bpe.bos_id, *hello, bpe.eos_id]
    assert load({**bpe_keys, "pre": "llama-bpe"}).add_bos
    none = load({**bpe_keys, "bos_token_id": 2**32 - 1, "add_bos_token": True})
    assert none.bos_id is None and not none.add_bos and none.encode("hello", add_bos=True) == hello


def test_stop_ids(bpe_keys: Keys, bpe: Tokenizer, spm: Tokenizer) -> None:
    tokens = bpe_keys["tokens"]
    assert bpe.stop_ids == {tokens.index("</s>"), tokens.index("<|im_end|>")}
    assert spm.stop_ids == {spm.eos_id}
    assert tokens.index("<s>") in load({**bpe_keys, "eot_token_id": tokens.index("<s>")}).stop_ids
    untyped = load({key: value for key, value in bpe_keys.items() if key != "token_type"})
    assert untyped.stop_ids == bpe.stop_ids and untyped.is_control(tokens.index("<|im_end|>"))


def test_end_of_turn_typed_as_text_is_control(bpe_keys: Keys) -> None:
    types = bpe_keys["token_type"].copy()
    end = bpe_keys["tokens"].index("<|im_end|>")
    types[end] = 4
    tokenizer = load({**bpe_keys, "token_type": types})
    assert end in tokenizer.stop_ids and end not in tokenizer.encode("a<|im_end|>b")


def test_special_token_that_merges_could_make(bpe_keys: Keys, bpe: Tokenizer) -> None:
    word = bpe.encode(" hello")
    assert len(word) == 1  # made by a merge
    types = bpe_keys["token_type"].copy()
    types[word[0]] = 3
    for pre in ("smollm", "llama-bpe"):
        tokenizer = load({**bpe_keys, "token_type": types, "pre": pre})
        assert word[0] not in tokenizer.encode(" hello") and tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_ignore_merges(bpe_keys: Keys) -> None:
    tokens = [*bpe_keys["tokens"], "zqxj"]
    keys = {**bpe_keys, "tokens": tokens, "token_type": np.append(bpe_keys["token_type"], 1)}
    assert load({**keys, "pre": "llama-bpe"}).encode("zqxj", add_bos=False) == [len(tokens) - 1]
    assert len(load({**keys, "pre": "qwen2"}).encode("zqxj")) > 1


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_pre_tokenizers_lose_nothing(pre: str, bpe_keys: Keys) -> None:
    tokenizer = load({**bpe_keys, "pre": pre})
    for text in TEXTS:
        wanted = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text)) == wanted


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'LL we'll 1234  x", "I|'|LL| we|'ll| 1234| | x"),
        ("smollm", "a 1234\n\nx", "a| |1|2|3|4|\n|\n|x"),
        ("llama-bpe", "I'LL 12345  x\n\ny!\n", "I|'LL| |123|45| | x|\n\n|y|!\n"),
        ("qwen2", "I'LL 123  x", "I|'LL| |1|2|3| | x"),
        ("tekken", "camelCase HTTPServer 12", "camel|Case| HTTPServer| |1|2"),
        ("gpt-4o", "camelCase's 1234/\n", "camel|Case's| |123|4|/\n"),
        ("deepseek-coder", "a b\n12", "a| b|\n|1|2"),
        ("deepseek-llm", "ab, 123\nжы", "ab|,| |123|\n|жы"),
        ("deepseek-v3", "x=1234 日本", "x|=|123|4| |日本"),
        ("falcon", "a==b 12345", "a|==|b| |123|45"),
        ("default", "a==b 12345", "a|==|b| |123|45"),
        ("bloom", "a b,c", "a| b|,|c"),
    ],
)
def test_pre_tokenizer_splits(pre: str, text: str, pieces: str) -> None:
    """Each way to cut, as pieces of the bytes' stand-ins."""
    found = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    stand_ins = str.maketrans({" ": "Ġ", "\n": "Ċ"}) | {ord(c): "".join(_stand_ins(c)) for c in "жы日本"}
    pieces = pieces.translate(stand_ins)
    assert "|".join(piece for piece, _ in found) == pieces


def _stand_ins(char: str) -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)]


@settings(max_examples=300)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and "".join(stream(bpe, ids)) == text
    assert b"".join(map(bpe.token_bytes, ids)) == text.encode()
    ids = spm.encode(text, add_bos=False)
    assert spm.decode(ids) == "".join(stream(spm, ids)) == text.replace("▁", " ")


@settings(max_examples=300)
@given(st.lists(st.integers(0, 622)), st.booleans(), st.booleans())
def test_decode_is_the_stream_joined(bpe: Tokenizer, spm: Tokenizer, ids: list[int], special: bool, more: bool) -> None:
    for tokenizer in (bpe, spm):
        ids = [id % tokenizer.n_vocab for id in ids]
        pieces = stream(tokenizer, ids, special=special, continues=more)
        assert "".join(pieces) == tokenizer.decode(ids, special=special, continues=more)
        assert all(len(piece.encode()) <= 4 * 64 for piece in pieces)


def test_stream_never_breaks_a_character(tokenizer: Tokenizer) -> None:
    text = "aé日🤗"
    pieces = stream(tokenizer, tokenizer.encode(text, add_bos=False))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and pieces[-1] == ""
    ids = tokenizer.encode("🤗", add_bos=False)
    assert len(ids) > 2
    cut = stream(tokenizer, ids[:-1])
    assert "".join(cut[:-1]) == "" and cut[-1] == "\ufffd"


def test_leading_space(spm: Tokenizer) -> None:
    ids = spm.encode("hello")
    assert ids[0] == spm.bos_id
    assert spm.decode(ids) == "hello" and spm.decode(ids, special=True) == "<s> hello"
    assert spm.decode(ids[1:], continues=True) == " hello"
    assert spm.decode(spm.encode("  hello")) == "  hello"
    assert spm.decode(spm.encode("   ")) == "   "  # one user-defined token, which has no space in front


def test_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udcffb", add_bos=False)) == "a\ufffdb"


def test_ids_out_of_range(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(np.int32(5)) == tokenizer.token_bytes(5)
    for id in (-1, tokenizer.n_vocab, 2**40, 1.0, "a", None):
        for use in (
            tokenizer.token_bytes,
            tokenizer.token_text,
            tokenizer.is_control,
            StreamDecoder(tokenizer).push,
        ):
            with pytest.raises(ParameterError):
                use(id)  # type: ignore[arg-type]
        with pytest.raises(ParameterError):
            tokenizer.decode([id])  # type: ignore[list-item]
    with pytest.raises(ParameterError):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none", ""])
def test_other_models_are_named(model: str, bpe_keys: Keys) -> None:
    with pytest.raises(UnsupportedError, match=f"'{model}'.*gpt2.*llama"):
        load({**bpe_keys, "model": model})


def test_unknown_pre_tokenizer_is_named(bpe_keys: Keys) -> None:
    with pytest.raises(UnsupportedError, match="'novel'.*llama-bpe.*smollm"):
        load({**bpe_keys, "pre": "novel"})


def replaced(values: Any, index: int, value: Any) -> Any:
    values = values.copy()
    values[index] = value
    return values


def broken(keys: Keys) -> dict[str, Keys]:
    """What a hostile file could say instead: case -> changed keys (None removes one)."""
    tokens, count = keys["tokens"], len(keys["tokens"])
    own = "merges" if keys["model"] == "gpt2" else "scores"
    cases: dict[str, Keys] = {
        "no model": {"model": None},
        "model is a number": {"model": 3},
        "no tokens": {"tokens": None},
        "empty tokens": {"tokens": []},
        "empty numeric tokens": {"tokens": np.array([], np.int32)},
        "tokens are numbers": {"tokens": np.arange(count)},
        "tokens are a string": {"tokens": "abc"},
        "mixed tokens": {"tokens": replaced(tokens, 3, 7)},
        "duplicate tokens": {"tokens": replaced(tokens, 300, tokens[299])},
        "short token_type": {"token_type": keys["token_type"][:-1]},
        "long token_type": {"token_type": np.append(keys["token_type"], 1)},
        "wild token_type": {"token_type": replaced(keys["token_type"], 5, 77)},
        "negative token_type": {"token_type": replaced(keys["token_type"], 5, -1)},
        "float token_type": {"token_type": keys["token_type"].astype(np.float32)},
        "token_type is strings": {"token_type": ["1"] * count},
        "token_type is a number": {"token_type": 1},
        "bos past the end": {"bos_token_id": count},
        "negative eos": {"eos_token_id": -5},
        "eos is a string": {"eos_token_id": "</s>"},
        "eot past the end": {"eot_token_id": 10**9},
        "eom is a float": {"eom_token_id": 1.0},
        "add_bos is a number": {"add_bos_token": 1},
        f"no {own}": {own: None},
        f"{own} is a string": {own: "a b"},
    }
    if own == "merges":
        merges = keys["merges"]
        cases |= {
            "merge of an unknown token": {"merges": [*merges, "nosuch token"]},
            "merge into an unknown token": {"merges": [*merges, "Ġ Ġzz"]},
            "merge of one": {"merges": ["a", *merges]},
            "merge of three": {"merges": ["a b c", *merges]},
            "empty merge": {"merges": ["", *merges]},
            "merge of nothing": {"merges": [" ", *merges]},
            "merges are numbers": {"merges": np.arange(4)},
            "pre is a number": {"pre": 1},
        }
    else:
        byte = tokens.index("<0x41>")
        cases |= {
            "no token_type": {"token_type": None},
            "short scores": {"scores": keys["scores"][1:]},
            "nan score": {"scores": replaced(keys["scores"], 300, np.nan)},
            "infinite score": {"scores": replaced(keys["scores"], 300, np.inf)},
            "scores are booleans": {"scores": np.zeros(count, bool)},
            "missing byte": {"token_type": replaced(keys["token_type"], byte, 1)},
            "odd byte": {"tokens": replaced(tokens, byte, "<0xZZ>")},
            "extra byte": {"token_type": replaced(keys["token_type"], 400, 6)},
            "unknown past the end": {"unknown_token_id": count},
            "add_space_prefix is a string": {"add_space_prefix": "yes"},
        }
    return cases


@pytest.mark.parametrize("kind", ["bpe_keys", "spm_keys"])
def test_broken_metadata(kind: str, request: pytest.FixtureRequest) -> None:
    keys: Keys = request.getfixturevalue(kind)
    cases = broken(keys)
    for case, change in cases.items():
        changed = {key: value for key, value in {**keys, **change}.items() if value is not None}
        try:
            load(changed)
        except FormatError as error:
            assert "test.gguf: tokenizer.ggml." in str(error) and "\n" not in str(error), case
            assert len(str(error)) < 400, case
        else:
            pytest.fail(f"{case}: loaded")
    assert len(cases) > 30


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.integers(-9, 9), max_size=5),
    st.just(np.zeros((2, 2))),
)


@pytest.mark.parametrize("kind", ["bpe_keys", "spm_keys"])
@settings(max_examples=150)
@given(data=st.data())
def test_odd_metadata_loads_or_is_refused(kind: str, bpe_keys: Keys, spm_keys: Keys, data: st.DataObject) -> None:
    keys = dict(bpe_keys if kind == "bpe_keys" else spm_keys)
    for key in data.draw(st.lists(st.sampled_from([*keys, "add_bos_token", "eot_token_id", "pre"]), max_size=2)):
        keys[key] = data.draw(ODD)
    field = data.draw(st.sampled_from(["tokens", "merges", "scores", "token_type"]))
    if isinstance(keys.get(field), (list, np.ndarray)) and len(keys[field]) > 300:
        value = data.draw(st.integers(-1, 7) if field in ("scores", "token_type") else st.text(max_size=6))
        keys[field] = replaced(keys[field], data.draw(st.integers(0, 300)), value)
    try:
        tokenizer = load(keys)
    except HotcoldError:
        return
    for text in ("hello world 12 é", "<s><tool>", " \n"):
        ids = tokenizer.encode(text, special=data.draw(st.booleans()))
        assert all(0 <= id < tokenizer.n_vocab for id in ids)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_empty_tokens_are_given_names(bpe_keys: Keys) -> None:
    tokens = [*bpe_keys["tokens"], "", ""]
    types = np.append(bpe_keys["token_type"], [1, 1])
    tokenizer = load({**bpe_keys, "tokens": tokens, "token_type": types})
    assert tokenizer.token_text(len(tokens) - 1) == f"[EMPTY_{len(tokens) - 1}]"
    assert tokenizer.encode("hello") == load(bpe_keys).encode("hello")


def test_libraries_load_late() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from hotcold.formats import tokenizer, chat_template; "
        "print([m for m in ('tokenizers', 'sentencepiece', 'google.protobuf', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_text_is_longer_than_its_tokens_may_be(tiny_model: Callable[..., Path]) -> None:
    for kind in ("gpt2", "llama"):
        with GGUFFile(tiny_model(tokenizer=kind)) as file:
            tokenizer = load_tokenizer(file)
        texts = ("the hello world " * 500, "hello" * 700, "\u4e16\U0001f600" * 900, " " * 3000, "<|im_end|>" * 300)
        for text in texts:
            for special in (False, True):
                ids = tokenizer.encode(text, add_bos=False, special=special)
                most = tokenizer.most_characters(len(ids))
                assert most is not None and len(text) <= most
                assert tokenizer.decode(ids, special=True) == text  # long texts take another way
