"""What is read of a Hugging Face folder's tokenizer beside its vocabulary, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizer_families as families
from tokenizer_families import BYTE_FAMILIES, PIECE_FAMILIES, Json, added

from hotcold.formats.errors import FormatError, HotcoldError, UnsupportedError
from hotcold.formats.hf_tokenizer import tokenizer_fields
from hotcold.formats.tokenizer import load_tokenizer

BASE = families.byte_json(families.byte_family("gpt-2", families.bytes_part(), [*families.IM, added("<|eom_id|>")]))
N_VOCAB = len(BASE["model"]["vocab"])  # the three of IM and <|eom_id|> follow
SIZE = N_VOCAB + 4
GGML = "tokenizer.ggml."


def fields(folder: Path, data: Json | None = BASE, config: Json | None = None, **settings: Any) -> dict[str, Any]:
    families.write_folder(folder, data, settings)
    return tokenizer_fields(folder, SIZE, config or {})


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    families.write_folder(tmp_path, BASE, {})
    found = tokenizer_fields(tmp_path, SIZE + 3, {})
    assert found[GGML + "tokens"][-4:] == ["<|eom_id|>", *(f"[PAD{SIZE + i}]" for i in range(3))]
    assert found[GGML + "token_type"][-5:] == [3, 3, 5, 5, 5]
    data = copy.deepcopy(BASE)
    data["added_tokens"][-1]["content"] = f"[PAD{SIZE}]"
    families.write_folder(tmp_path, data, {})
    assert tokenizer_fields(tmp_path, SIZE + 1, {})[GGML + "tokens"][-2:] == [f"[PAD{SIZE}]", f"[[PAD{SIZE}]]"]


def test_added_tokens_past_the_embedding_are_left_out(tmp_path: Path) -> None:
    """As Gemma 3's image token in its text models."""
    found = fields(tmp_path, eos_token="<|im_end|>")
    families.write_folder(tmp_path, BASE, {"eos_token": "<|im_end|>"})
    shorter = tokenizer_fields(tmp_path, SIZE - 1, {})
    assert shorter[GGML + "tokens"] == found[GGML + "tokens"][:-1]
    with pytest.raises(FormatError, match=f"id {N_VOCAB - 1}, wanted ids below 100"):
        tokenizer_fields(tmp_path, 100, {})


def test_special_ids_by_name_then_by_number(tmp_path: Path) -> None:
    found = fields(tmp_path, bos_token={"content": "<|im_start|>", "lstrip": False}, eos_token="<|im_end|>")
    assert found[GGML + "bos_token_id"] == N_VOCAB + 1 and found[GGML + "eos_token_id"] == N_VOCAB + 2
    config = {"bos_token_id": N_VOCAB, "eos_token_id": [N_VOCAB + 2], "pad_token_id": -1}
    found = fields(tmp_path, config=config, bos_token=None, add_bos_token=False)  # as Qwen's
    assert found[GGML + "bos_token_id"] == N_VOCAB and found[GGML + "eos_token_id"] == N_VOCAB + 2
    assert found[GGML + "add_bos_token"] is False and GGML + "padding_token_id" not in found
    put(tmp_path, "special_tokens_map.json", {"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    found = fields(tmp_path, config={"bos_token_id": 5})
    assert found[GGML + "bos_token_id"] == found[GGML + "unknown_token_id"] == N_VOCAB


def test_more_than_one_end(tmp_path: Path) -> None:
    put(tmp_path, "generation_config.json", {"eos_token_id": [7, N_VOCAB, N_VOCAB + 2, N_VOCAB + 3]})
    found = fields(tmp_path, eos_token="<|endoftext|>")
    assert [found[GGML + f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [
        N_VOCAB, N_VOCAB + 2, N_VOCAB + 3,
    ]  # fmt: skip
    stops = load_tokenizer(SimpleNamespace(metadata=found, path="x")).stop_ids
    assert {N_VOCAB, N_VOCAB + 2, N_VOCAB + 3} <= stops
    assert found[GGML + "token_type"][7] == 1  # an ordinary token stays one


def test_begin_and_end_of_a_text(tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    data["post_processor"] = families.template("<|im_start|>", N_VOCAB + 1)
    found = fields(tmp_path, data)
    assert found[GGML + "bos_token_id"] == N_VOCAB + 1 and found[GGML + "add_bos_token"] is True
    assert found[GGML + "add_eos_token"] is False
    found = fields(tmp_path, data, add_bos_token=False, add_eos_token=True, eos_token="<|im_end|>")
    assert found[GGML + "add_bos_token"] is False and found[GGML + "add_eos_token"] is True
    data["post_processor"]["single"].append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    found = fields(tmp_path, data)
    assert found[GGML + "eos_token_id"] == N_VOCAB + 2 and found[GGML + "add_eos_token"] is True
    assert fields(tmp_path, add_bos_token=True)[GGML + "add_bos_token"] is False  # there is none to add


def test_kinds_of_added_tokens(tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    names = [("<tool>", False), ("<|fim_prefix|>", False), ("  ", False), ("<x>", True)]
    data["added_tokens"] = [added(name, special) | {"id": N_VOCAB + i} for i, (name, special) in enumerate(names)]
    assert fields(tmp_path, data)[GGML + "token_type"][N_VOCAB:] == [4, 3, 4, 3]
    data["added_tokens"][3]["rstrip"] = data["added_tokens"][0]["lstrip"] = True
    found = fields(tmp_path, data)
    assert found["hotcold.tokenizer.strip_left_ids"] == [N_VOCAB]
    assert found["hotcold.tokenizer.strip_right_ids"] == [N_VOCAB + 3]
    tokenizer = load_tokenizer(SimpleNamespace(metadata=found, path="x"))
    assert tokenizer.encode("\u3000\n <tool>", special=False) == [N_VOCAB]
    assert (
        tokenizer.encode("<x>\x1c", special=True)[0] == N_VOCAB + 3
        and len(tokenizer.encode("<x>\x1c", special=True)) == 2
    )
    for bad in ([-1], [SIZE], ["a"], 3.5, [[1]]):
        with pytest.raises(FormatError, match="hotcold.tokenizer.strip_left_ids"):
            load_tokenizer(SimpleNamespace(metadata=found | {"hotcold.tokenizer.strip_left_ids": bad}, path="x"))


@pytest.mark.parametrize("pairs", [False, True])
def test_both_forms_of_merges(pairs: bool, tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    if pairs:
        data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    assert fields(tmp_path, data)[GGML + "merges"] == BASE["model"]["merges"]


def test_gpt2s_two_files(tmp_path: Path) -> None:
    """OPT: vocab.json and merges.txt, special tokens within, </s> in front of each text."""
    vocab = {token: i + 3 for token, i in BASE["model"]["vocab"].items()} | {"<s>": 0, "<pad>": 1, "</s>": 2}
    put(tmp_path, "vocab.json", vocab)
    put(tmp_path, "merges.txt", "#version: 0.2\n" + "\n".join(BASE["model"]["merges"]) + "\n")
    settings = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    found = fields(tmp_path, None, **settings, add_bos_token=True, tokenizer_class="GPT2Tokenizer")
    assert found[GGML + "pre"] == "gpt-2" and found[GGML + "merges"] == BASE["model"]["merges"]
    assert found[GGML + "bos_token_id"] == found[GGML + "eos_token_id"] == 2
    assert found[GGML + "token_type"][:4] == [1, 3, 3, 1]
    from tokenizers import Tokenizer

    ours = load_tokenizer(SimpleNamespace(metadata=found, path="x"))
    plain = Tokenizer.from_str(json.dumps(BASE))
    for text in ("I'll pay 1234.5 ", "naïve\n\n  x", "日本 🤗"):
        assert ours.encode(text) == [2, *(id + 3 for id in plain.encode(text).ids)]
    qwen = fields(tmp_path, None, tokenizer_class="Qwen2TokenizerFast")
    assert qwen[GGML + "pre"] == "qwen2" and load_tokenizer(SimpleNamespace(metadata=qwen, path="x")).encode("e\u0301")
    with pytest.raises(UnsupportedError, match="tokenizer_class: got 'CodeGenTokenizer' with vocab.json"):
        fields(tmp_path, None, tokenizer_class="CodeGenTokenizer")


@pytest.mark.parametrize("source", ["added_tokens.json", "added_tokens_decoder"])
def test_slow_sentencepiece_with_added_tokens(source: str, tmp_path: Path) -> None:
    tokens = {"<|assistant|>": 1000, "<tool>": 1001}
    settings: Json = {"bos_token": "<s>", "eos_token": "</s>"}
    if source == "added_tokens.json":
        put(tmp_path, source, tokens)
    else:
        settings[source] = {str(id): added(name, name[1] == "|", rstrip=True) for name, id in tokens.items()}
    families.write_folder(tmp_path, None, settings, "sentencepiece")
    found = tokenizer_fields(tmp_path, 1003, {})
    assert found[GGML + "model"] == "llama" and found[GGML + "tokens"][1000:] == [*tokens, "[PAD1002]"]
    assert found[GGML + "token_type"][:4] == [2, 3, 3, 6] and found[GGML + "token_type"][1000:] == [3, 4, 5]
    assert len(found[GGML + "scores"]) == 1003 and found[GGML + "add_bos_token"] is True
    tokenizer = load_tokenizer(SimpleNamespace(metadata=found, path="x"))
    stripped = tokenizer.encode("a<tool>  ", add_bos=False)
    assert (stripped[-1] == 1001) is (source != "added_tokens.json")


def test_add_prefix_space_can_be_taken_back(tmp_path: Path) -> None:
    families.write_folder(tmp_path, None, {"add_prefix_space": False}, "sentencepiece")
    assert tokenizer_fields(tmp_path, 1000, {})[GGML + "add_space_prefix"] is False


def test_chat_templates(tmp_path: Path) -> None:
    key = "tokenizer.chat_template"
    assert key not in fields(tmp_path)
    assert fields(tmp_path, chat_template="{{ a }}")[key] == "{{ a }}"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = fields(tmp_path, chat_template=named)
    assert found[key] == "d" and found[key + ".tool_use"] == "t" and found[key + "s"] == ["tool_use"]
    put(tmp_path, "chat_template.json", {"chat_template": "j"})
    assert fields(tmp_path)[key] == "j"
    put(tmp_path, "chat_template.jinja", "own file: é")
    put(tmp_path, "additional_chat_templates/rag.jinja", "r")
    found = fields(tmp_path, chat_template="{{ a }}")
    assert found[key] == "own file: é" and found[key + ".rag"] == "r"
    for bad in (3, ["a"], [{"name": "default", "template": 3}]):
        with pytest.raises(FormatError, match="chat_template: got"):
            fields(tmp_path, chat_template=bad)


Edit = Callable[[Json], Any]
BROKEN: dict[str, tuple[Edit, str]] = {
    "no model": (lambda data: data.pop("model"), "model: got a NoneType"),
    "vocab is a list": (lambda data: data["model"].update(vocab=["a"]), "vocab: got a list"),
    "empty vocab": (lambda data: data["model"].update(vocab={}), "vocab: got a dict"),
    "two tokens of one id": (lambda data: data["model"]["vocab"].update(zzz=3), "'zzz' as id 3, wanted one token"),
    "negative id": (lambda data: data["model"]["vocab"].update(zzz=-3), "'zzz' with id -3"),
    "id is text": (lambda data: data["model"]["vocab"].update(zzz="3"), "'zzz' with id '3'"),
    "id is true": (lambda data: data["model"]["vocab"].update(zzz=True), "'zzz' with id True"),
    "id past the embedding": (lambda data: data["model"]["vocab"].update(zzz=10**9), "with id 1000000000, wanted"),
    "no merges": (lambda data: data["model"].pop("merges"), "merges: got a NoneType"),
    "merge of three": (lambda data: data["model"]["merges"].append("a b c"), "'a b c' at .*, wanted two tokens"),
    "merge of one": (lambda data: data["model"]["merges"].append(["a"]), "wanted two tokens"),
    "merge of numbers": (lambda data: data["model"]["merges"].append([1, 2]), "wanted two tokens"),
    "merge of nothing": (lambda data: data["model"]["merges"].append(" "), "wanted two tokens"),
    "merge of an unknown": (lambda data: data["model"]["merges"].append("zq xj"), "'zq' at .*, wanted tokens of"),
    "added tokens are a dict": (lambda data: data.update(added_tokens={"a": 1}), "added_tokens: got something else"),
    "added token without text": (lambda data: data["added_tokens"].append({"id": SIZE}), "added tokens: got None"),
    "added token without id": (lambda data: data["added_tokens"].append({"content": "x"}), "got id None"),
    "two added tokens of one id": (
        lambda data: data["added_tokens"].append(added("<x>") | {"id": N_VOCAB}), "'<x>' as id .*, wanted one token",
    ),
    "added token at a word's id": (lambda data: data["added_tokens"].append(added("<x>") | {"id": 5}), "'<x>' as id 5"),
    "one text twice": (
        lambda data: data["added_tokens"].append(added("<|im_end|>") | {"id": N_VOCAB + 3, "content": "a"}) or
        data["added_tokens"].pop(-2), "'a' as ids .*, wanted unique tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_json(case: str, tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    edit, message = BROKEN[case]
    edit(data)
    with pytest.raises(FormatError, match=message) as caught:
        fields(tmp_path, data)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "wordpiece": (lambda data: data.update(model={"type": "WordPiece", "vocab": {"a": 0}}), "type: got 'WordPiece'"),
    "unigram": (lambda data: data.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "type: got 'Unigram'"),
    "end of word": (lambda data: data["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix: got '</w>'"),
    "lower case": (lambda data: data.update(normalizer={"type": "Lowercase"}), "normalizer: got .*Lowercase"),
    "no pre-tokenizer": (lambda data: data.update(pre_tokenizer=None), "pre_tokenizer: got none, supported"),
    "whitespace": (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), r"got \['Whitespace'\]"),
    "space in front": (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space.*gpt-2"),
    "novel pattern": (
        lambda data: data.update(pre_tokenizer=families.sequence(families.split("[a-z]+"), families.bytes_part(False))),
        r"pre_tokenizer: got '\[a-z\]\+', supported are those of .*llama-bpe",
    ),
    "text thrown away": (
        lambda data: data.update(
            pre_tokenizer=families.sequence(families.split("x", "Removed"), families.bytes_part(False))
        ),
        "got .*Removed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_tokenizer_json(case: str, tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    edit, message = UNSUPPORTED[case]
    edit(data)
    with pytest.raises(UnsupportedError, match=message) as caught:
        fields(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer.json: ") and "\n" not in str(caught.value)


def two_ways(merges: list[list[str]]) -> int:
    """Index of a merge whose token another merge makes as well."""
    made = ["".join(merge) for merge in merges]
    return next(i for i, token in enumerate(made) if made.count(token) > 1)


PIECES: dict[str, tuple[Edit, str]] = {
    "merges as a trainer leaves them": (
        lambda data: data["model"]["merges"].pop(40), "model.merges: got no merge of .* add its tokenizer.model",
    ),
    "merges out of order": (
        lambda data: data["model"]["merges"].append(data["model"]["merges"].pop(two_ways(data["model"]["merges"]))),
        "merges of one token far apart",
    ),
    "NFKC": (lambda data: data.update(normalizer={"type": "NFKC"}), "normalizer: got .*NFKC"),
    "spaces stay spaces": (lambda data: data.update(normalizer=None), "none that writes spaces"),
    "cut at words": (lambda data: data.update(pre_tokenizer={"type": "WhitespaceSplit"}), "got .*WhitespaceS"),
    "metaspace that cuts": (
        lambda data: data.update(pre_tokenizer=families.metaspace("first") | {"split": True}), "got .*Metaspace",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PIECES)
def test_unsupported_sentencepiece_like_json(case: str, tmp_path: Path) -> None:
    data = families.piece_json(PIECE_FAMILIES["llama2"])
    edit, message = PIECES[case]
    edit(data)
    families.write_folder(tmp_path, data, {})
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_fields(tmp_path, 1000, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\nIw== 2\n", "a SentencePiece model"),  # tiktoken's, as in Llama 3's original folder
        (b"", "pieces: got none"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "SentencePiece"),  # a pickle
        (b"\x0a\x05\x0a\x03\xff\xfe\xfd\x12\x02\x18\x02\x1a\x02\x20\0", "model in UTF-8"),
    ],
)  # fmt: skip
def test_broken_tokenizer_model(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        tokenizer_fields(tmp_path, 1000, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "model_type: got unigram, supported is bpe"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x"), "normalizer: got 'identity'"),
    ],
)
def test_unsupported_tokenizer_model(change: Edit, message: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = vars(schema)["ModelProto"]()
    proto.ParseFromString((families.DATA / "sentencepiece.model").read_bytes())
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_fields(tmp_path, 1000, {})


def test_spaces_that_sentencepiece_removes(tmp_path: Path) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = vars(schema)["ModelProto"]()
    proto.ParseFromString((families.DATA / "sentencepiece.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    found = tokenizer_fields(tmp_path, 1000, {})
    assert found[GGML + "remove_extra_whitespaces"] is True
    ours = load_tokenizer(SimpleNamespace(metadata=found, path="x"))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("  a  b ", "a b", "   ", "x\n \ty"):
        assert ours.encode(text, add_bos=False) == oracle.encode(text)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tokenizer: got none, wanted tokenizer.json, tokenizer.model"):
        tokenizer_fields(tmp_path, 10, {})
    put(tmp_path, "tekken.json", {})
    with pytest.raises(FormatError, match="got tekken.json"):
        tokenizer_fields(tmp_path, 10, {})
    for text in ("{", "[1]", "\x00", "[" * 100_000, '{"model": NaN', "", "3"):
        put(tmp_path, "tokenizer.json", text)
        with pytest.raises(FormatError, match="JSON: got") as caught:
            tokenizer_fields(tmp_path, 10, {})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FormatError, match="JSON: got"):
        tokenizer_fields(tmp_path, 10, {})


def test_odd_values_load_or_are_refused(tmp_path: Path) -> None:
    """Every value of the files replaced by every odd one: a HotcoldError or keys, never another error."""
    odd: list[Any] = [None, True, 10**30, "x", ["a"], {"a": 1}]
    data = copy.deepcopy(BASE)
    data["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    data["added_tokens"] = [added("<x>") | {"id": 3}]
    data["post_processor"] = families.template("<x>", 3)
    data["pre_tokenizer"] = families.DIGITS
    pieces = families.piece_json(PIECE_FAMILIES["mistral-v3"])
    pieces["model"] |= {"vocab": {"<unk>": 0, "a": 1, "▁": 2, "▁a": 3}, "merges": [["▁", "a"]]}
    pieces["added_tokens"] = [added("<unk>") | {"id": 0}]
    settings = {
        "bos_token": {"content": "<x>"},
        "chat_template": [{"name": "a", "template": "b"}],
        "add_bos_token": True,
    }
    config = {"eos_token_id": [0], "bos_token_id": 0, "model_type": "llama"}
    tried = 0
    del data["decoder"], pieces["decoder"]  # not read
    for original in (data, pieces):
        for top in ({"config": config}, {"tokenizer": original}, {"settings": settings}):
            families.write_folder(tmp_path, original, settings)
            for path in paths(top):
                for value in odd:
                    changed = copy.deepcopy({"tokenizer": original, "settings": settings, "config": config})
                    spot: Any = changed
                    for key in path[:-1]:
                        spot = spot[key]
                    spot[path[-1]] = value
                    if len(path) > 1:
                        tried += 1
                        if path[0] == "tokenizer":
                            put(tmp_path, "tokenizer.json", changed["tokenizer"])
                        elif path[0] == "settings":
                            put(tmp_path, "tokenizer_config.json", changed["settings"])
                        try:
                            found = tokenizer_fields(tmp_path, 6, changed["config"])
                        except HotcoldError as error:
                            assert "\n" not in str(error) and len(str(error)) < 2000
                            continue
                        assert len(found[GGML + "tokens"]) == len(found[GGML + "token_type"]) == 6
    assert tried > 600


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*before, key), *paths(inner, (*before, key)))]


def test_bad_space_prefix_is_refused(tmp_path: Path) -> None:
    families.write_folder(tmp_path, None, {}, "sentencepiece")
    found = tokenizer_fields(tmp_path, 1000, {}) | {"hotcold.tokenizer.space_prefix": "last"}
    found[GGML + "scores"] = np.array(found[GGML + "scores"], np.float32)
    with pytest.raises(FormatError, match="hotcold.tokenizer.space_prefix: got last, wanted each or"):
        load_tokenizer(SimpleNamespace(metadata=found, path="x"))


def test_all_families_are_here() -> None:
    """Each family that the tokenizer table names is tested with its own structure."""
    wanted = {
        "gpt-2",
        "olmo",
        "smollm",
        "starcoder",
        "refact",
        "falcon",
        "llama-bpe",
        "dbrx",
        "qwen2",
        "stablelm2",
        "tekken",
    }
    assert wanted <= {family["pre"] for family in BYTE_FAMILIES.values()}
