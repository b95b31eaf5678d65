"""The tokens of a Hugging Face folder: out of tokenizer.json, tokenizer.model, or vocab.json and merges.txt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import FormatError, UnsupportedError
from .pre_tokenizers import PRE_TOKENIZERS, name_of
from .vocabulary import BYTE, NORMAL, OWN_IGNORE_MERGES, OWN_NFC, OWN_SPACE_PREFIX, UNKNOWN, USER_DEFINED

_LONGEST = 4096  # characters of a token: looking for its merges takes their square
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Slow tokenizers without a tokenizer.json cut in their class's code (transformers' convert_slow_tokenizer.py).
_BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
_QWEN2 = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS["qwen2"].steps[0]}, "behavior": "Isolated"}
_SLOW = {
    "GPT2Tokenizer": (_BYTE_LEVEL, False),
    "Qwen2Tokenizer": ({"type": "Sequence", "pretokenizers": [_QWEN2, _BYTE_LEVEL | {"use_regex": False}]}, True),
}


@dataclass
class HFVocabulary:
    """What a folder says of its tokens, before added tokens and padding.

    model: tokenizer.ggml.model. scores: of the "llama" model. keys: further GGUF keys that follow from the files.
    """

    path: Path
    model: str
    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)
    begins: tuple[str, ...] | None = None  # special tokens that the post-processor puts around a text
    ends: tuple[str, ...] | None = None


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """A JSON file whose top is a `kind`; FormatError for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair, which no file can hold as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(path, "JSON", " ".join(str(error).split()) or "too deep", "a readable JSON file") from None
    if not isinstance(value, kind):
        raise FormatError(path, "JSON", f"a {type(value).__name__}", f"a {kind.__name__} at the top")
    return value


def read_vocabulary(folder: Path, settings: Mapping[str, Any], model_type: str) -> HFVocabulary:
    """The tokens of a folder; `settings` is its tokenizer_config.json.

    FormatError for missing or broken files, UnsupportedError for a kind of tokenizer that a GGUF file cannot hold.
    """
    fast, sentencepiece = folder / "tokenizer.json", folder / "tokenizer.model"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if fast.is_file():
        found = _fast(fast, model_type)
        if found.model == "llama" and sentencepiece.is_file():
            pieces = _pieces(sentencepiece)
            found.tokens, found.types, found.scores = pieces.tokens, pieces.types, pieces.scores
        return found
    if sentencepiece.is_file():
        return _pieces(sentencepiece)
    if vocab.is_file() and merges.is_file():
        return _slow(vocab, merges, settings, model_type)
    wanted = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
    present = next((name for name in ("tekken.json", "vocab.txt", "spiece.model") if (folder / name).is_file()), "none")
    raise FormatError(folder, "tokenizer", present, wanted)


def _fast(path: Path, model_type: str) -> HFVocabulary:
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict):
        raise FormatError(path, "model", f"a {type(model).__name__}", "an object")
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedError(f"{path}: model.type: got {str(kind)[:80]!r}, supported is 'BPE'")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"{path}: model.{key}: got {str(model[key])[:80]!r}, supported is none")
    tokens = _by_id(path, model.get("vocab"))
    pairs = _pairs(path, model.get("merges"), set(model["vocab"]))
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise FormatError(path, "added_tokens", "something else", "an array of objects")
    found = HFVocabulary(path, "", tokens, dict.fromkeys(tokens, NORMAL), added=added)
    found.begins, found.ends = _around(data.get("post_processor"))
    if "ByteLevel" in _kinds(data.get("pre_tokenizer")) | _kinds(data.get("normalizer")):
        _byte_level(found, data, pairs, bool(model.get("ignore_merges")), model_type)
    elif model.get("byte_fallback"):
        _sentencepiece_like(found, data, pairs)
    else:
        got = sorted(_kinds(data.get("pre_tokenizer"))) or "none"
        wanted = "supported are ByteLevel, and SentencePiece's cut with byte_fallback"
        raise UnsupportedError(f"{path}: pre_tokenizer: got {got}, {wanted}")
    return found


def _byte_level(
    found: HFVocabulary, data: dict[str, Any], pairs: list[tuple[str, str]], ignore_merges: bool, model_type: str
) -> None:
    """Complete `found` as the "gpt2" model."""
    normalizers = _parts(data.get("normalizer"), "normalizers")
    if any(part != {"type": "NFC"} for part in normalizers):
        shown = repr(data["normalizer"])[:160]
        raise UnsupportedError(f"{found.path}: normalizer: got {shown}, supported with ByteLevel are none and NFC")
    nfc = bool(normalizers)
    try:
        name = name_of(data.get("pre_tokenizer"), ignore_merges, nfc, model_type)
    except UnsupportedError as error:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(f"{found.path}: pre_tokenizer: {error}, supported are those of {known}") from None
    if any(" " in part for pair in pairs for part in pair):
        raise FormatError(found.path, "model.merges", "a token with a space", "byte-level tokens")
    found.model = "gpt2"
    found.keys = {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs]}
    if PRE_TOKENIZERS[name].ignore_merges != ignore_merges:
        found.keys[OWN_IGNORE_MERGES] = ignore_merges
    if PRE_TOKENIZERS[name].nfc != nfc:
        found.keys[OWN_NFC] = nfc


def _sentencepiece_like(found: HFVocabulary, data: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    """Complete `found` as the "llama" model: SentencePiece's, written as merges."""
    prefix, escapes = "never", False
    for part in _parts(data.get("normalizer"), "normalizers"):
        replaces = part.get("type") == "Replace" and part.get("pattern") == {"String": " "}
        if part.get("type") == "Prepend" and part.get("prepend") == "▁":
            prefix = "each"
        elif replaces and part.get("content") == "▁":
            escapes = True
        else:
            raise UnsupportedError(f"{found.path}: normalizer: got {part!r:.160}, supported is SentencePiece's")
    for part in _parts(data.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace" and part.get("replacement") == "▁" and part.get("split") is False:
            scheme = str(part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never"))
            # Metaspace puts no space before a text that begins with one
            prefix, escapes = {"always": "each unless there", "first": "first unless there"}.get(scheme, "never"), True
        elif part.get("type") != "Split" or part.get("pattern") != {"String": " "}:  # Gemma's, which cuts nothing
            raise UnsupportedError(f"{found.path}: pre_tokenizer: got {part!r:.160}, supported is SentencePiece's")
    if not escapes:
        raise UnsupportedError(f"{found.path}: normalizer: got none that writes spaces as '▁'")
    unknown = data["model"].get("unk_token")
    for id, token in found.tokens.items():
        if _BYTE_TOKEN.fullmatch(token):
            found.types[id] = BYTE
        elif token == unknown:
            found.types[id] = UNKNOWN
    found.model = "llama"
    found.keys = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix != "never"}
    if prefix not in ("each", "never"):
        found.keys[OWN_SPACE_PREFIX] = prefix
    if not (found.path.parent / "tokenizer.model").is_file():
        found.scores = _scores(found, pairs)


def _scores(found: HFVocabulary, pairs: list[tuple[str, str]]) -> dict[int, float]:
    """Scores that make SentencePiece merge in the order of `pairs`; UnsupportedError where none can.

    SentencePiece joins whatever two neighbours make a token, best token first, so the merges must hold every such
    pair, and those of one token together (as in files converted from a SentencePiece model).
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank)
        last["".join(pair)] = rank
    order = sorted(first, key=first.__getitem__)
    known = set(pairs)
    special = {str(token.get("content")) for token in found.added}
    plain = {token for id, token in found.tokens.items() if found.types[id] == NORMAL} - special
    if plain and (longest := max(map(len, plain))) > _LONGEST:
        raise FormatError(found.path, "vocab", f"a token of {longest} characters", f"at most {_LONGEST}")
    splits = ((token[:i], token[i:]) for token in plain for i in range(1, len(token)))
    missing = next((pair for pair in splits if pair[0] in plain and pair[1] in plain and pair not in known), None)
    if missing or any(last[a] > first[b] for a, b in pairwise(order)):
        shown = f"no merge of {missing[0]!r} and {missing[1]!r}" if missing else "merges of one token far apart"
        wanted = "those of a SentencePiece model; add its tokenizer.model"
        raise UnsupportedError(f"{found.path}: model.merges: got {shown}, wanted {wanted}")
    ranks = {token: -float(i) for i, token in enumerate(order)}
    return {id: ranks.get(token, -float(len(order))) for id, token in found.tokens.items()}


def _pieces(path: Path) -> HFVocabulary:
    """A SentencePiece model file, read without running it."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto: Any = vars(schema)["ModelProto"]()
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise FormatError(path, "model", " ".join(str(error).split()), "a SentencePiece model (ModelProto)") from None
    if not proto.pieces:
        raise FormatError(path, "pieces", "none (or another format, such as tiktoken's)", "a SentencePiece model")
    normalizer, kind = proto.normalizer_spec, proto.trainer_spec.model_type
    if kind != proto.trainer_spec.BPE:
        name = proto.trainer_spec.ModelType.Name(kind).lower()
        raise UnsupportedError(f"{path}: model_type: got {name}, supported is bpe")
    # A tokenizer.json beside the model says what really happens to spaces and characters.
    alone = not (path.parent / "tokenizer.json").is_file()
    if alone and normalizer.precompiled_charsmap:
        raise UnsupportedError(f"{path}: normalizer: got {normalizer.name[:80]!r}, supported is 'identity'")
    pieces = list(enumerate(proto.pieces))
    types = {id: piece.type for id, piece in pieces}
    try:
        texts = {id: piece.piece for id, piece in pieces}
    except ValueError:  # not UTF-8; protobuf's faster half gives bytes instead
        texts = {0: b""}
    if not all(isinstance(text, str) for text in texts.values()):
        raise FormatError(path, "pieces", "text that is not UTF-8", "a SentencePiece model in UTF-8")
    # User-defined pieces are looked for in the text itself, where spaces are spaces.
    tokens = {id: text.replace("▁", " ") if types[id] == USER_DEFINED else text for id, text in texts.items()}
    keys: dict[str, Any] = {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": bool(normalizer.add_dummy_prefix),
    }
    if alone and normalizer.remove_extra_whitespaces:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = True
    return HFVocabulary(path, "llama", tokens, types, {id: piece.score for id, piece in pieces}, keys)


def _slow(vocab: Path, merges: Path, settings: Mapping[str, Any], model_type: str) -> HFVocabulary:
    """The two files of GPT-2's time; how they cut is in the code of the class that tokenizer_config.json names."""
    name = str(settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in _SLOW:
        wanted = f"a tokenizer.json, or one of {', '.join(_SLOW)}"
        raise UnsupportedError(f"{vocab.parent}: tokenizer_class: got {name[:80]!r} with vocab.json, wanted {wanted}")
    table = read_json(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise FormatError(merges, "text", " ".join(str(error).split()), "a readable UTF-8 file") from None
    lines = [line.removesuffix("\r") for line in lines[lines[0].startswith("#version") :]]
    found = HFVocabulary(vocab, "gpt2", _by_id(vocab, table), dict.fromkeys(table.values(), NORMAL))
    structure, nfc = _SLOW[name]
    data = {"pre_tokenizer": structure, "normalizer": {"type": "NFC"} if nfc else None}
    _byte_level(found, data, _pairs(merges, [line for line in lines if line], set(table)), False, model_type)
    return found


def _by_id(path: Path, vocab: Any) -> dict[int, str]:
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(path, "vocab", f"a {type(vocab).__name__}", "an object of tokens and ids")
    tokens: dict[int, str] = {}
    for token, id in vocab.items():
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise FormatError(path, "vocab", f"{token[:80]!r} with id {id!r:.80}", "ids from 0")
        if id in tokens:
            raise FormatError(path, "vocab", f"{tokens[id][:80]!r} and {token[:80]!r} as id {id}", "one token an id")
        tokens[id] = token
    return tokens


def _pairs(path: Path, merges: Any, vocab: set[str]) -> list[tuple[str, str]]:
    """Merges in either form, "a b" or ["a", "b"], each of two tokens that make a third."""
    if not isinstance(merges, list):
        raise FormatError(path, "merges", f"a {type(merges).__name__}", "an array of pairs")
    pairs = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise FormatError(path, "merges", f"{merge!r:.80} at {i}", "two tokens")
        pair = parts[0], parts[1]
        name = next((name for name in (*pair, "".join(pair)) if name not in vocab), None)
        if name is not None:
            raise FormatError(path, "merges", f"{name[:80]!r} at {i}", "tokens of the vocabulary")
        pairs.append(pair)
    return pairs


def _parts(structure: Any, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, sequences flattened."""
    if not isinstance(structure, dict):
        return []
    inner = structure.get(key)
    if structure.get("type") == "Sequence" and isinstance(inner, list):
        return [part for child in inner for part in _parts(child, key)]
    return [structure]


def _kinds(structure: Any) -> set[str]:
    parts: Iterable[dict[str, Any]] = (*_parts(structure, "pretokenizers"), *_parts(structure, "normalizers"))
    return {str(part.get("type")) for part in parts} - {"Sequence"}


def _around(post: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Special tokens before and after a text, out of the post-processor; None where it does not say."""
    for part in _parts(post, "processors"):
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list):
            names = [_name(item) for item in single]
            middle = names.index(None) if None in names else len(names)
            before, after = names[:middle], names[middle + 1 :]
            return tuple(name for name in before if name), tuple(name for name in after if name)
    return None, None


def _name(item: Any) -> str | None:
    token = item.get("SpecialToken") if isinstance(item, dict) else None
    return str(token.get("id")) if isinstance(token, dict) else None
