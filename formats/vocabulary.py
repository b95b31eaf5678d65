"""What a file says about its tokens: typed access to the tokenizer keys, and the checked table of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import FormatError

# tokenizer.ggml.token_type; the numbers are those of SentencePiece's ModelProto.SentencePiece.Type
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

# Tokens that end an answer. Files often name one of them as EOS and leave the others to their readers.
STOP_TEXTS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>",
    "<|return|>", "<|call|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
    "<end_of_turn>", "<end_of_utterance>", "</s>", "<EOT>", "<eos>",
)  # fmt: skip
# Keys of our own, for what the common ones cannot say; other readers ignore them.
OWN_NFC, OWN_IGNORE_MERGES = "hotcold.tokenizer.nfc", "hotcold.tokenizer.ignore_merges"
# where add_space_prefix puts its space: before "each" piece of text (the default), or else "... unless there" is one
OWN_SPACE_PREFIX, SPACE_PREFIXES = "hotcold.tokenizer.space_prefix", ("each", "each unless there", "first unless there")
OWN_STRIP_LEFT, OWN_STRIP_RIGHT = "hotcold.tokenizer.strip_left_ids", "hotcold.tokenizer.strip_right_ids"
_NO_TOKEN = (-1, 2**32 - 1)  # how files say "this model has none"


class Metadata:
    """The tokenizer keys of a file, typed; a value of the wrong kind is a FormatError naming its key.

    `file` is anything with a `metadata` mapping (string arrays as lists, numeric ones as numpy arrays).
    """

    def __init__(self, file: Any) -> None:
        self.path: object = getattr(file, "path", "metadata")
        self._values: Mapping[str, Any] = file.metadata

    def error(self, key: str, got: object, wanted: object) -> FormatError:
        """A FormatError about a tokenizer key; what the file said is cut to a line."""
        text = " ".join(str(got).split())
        shown = text if len(text) < 120 else text[:119] + "…"
        return FormatError(self.path, _full(key), shown, wanted)

    def _get(self, key: str) -> Any:
        return self._values.get(_full(key))

    def text(self, key: str, default: str | None = None) -> str:
        """A string value, or `default`; FormatError where there is neither."""
        value = self._get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, _kind(value), "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean value, or `default`."""
        value = self._get(key)
        value = default if value is None else value
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(key, _kind(value), "a boolean")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._get(key)
        if isinstance(value, np.ndarray) and value.size == 0:
            value = []  # an empty array has no element that would tell its type
        if not isinstance(value, list) or not {str}.issuperset(map(type, value)):
            raise self.error(key, _kind(value), "an array of strings")
        return value

    def numbers(self, key: str, count: int, kinds: str) -> np.ndarray | None:
        """A 1-D array of `count` values whose numpy kind is in `kinds`; None where the key is missing."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, (np.ndarray, list)) or np.ndim(value) != 1:
            raise self.error(key, _kind(value), "an array of numbers")
        array = np.asarray(value)
        if array.size != count:
            raise self.error(key, f"{array.size} values", f"{count}, one for each token")
        if array.dtype.kind not in kinds:
            raise self.error(key, f"an array of {array.dtype}", "an array of numbers")
        return array

    def ids(self, key: str, n_vocab: int) -> frozenset[int]:
        """An array of token ids as a set; empty where the key is missing."""
        value = self._get(key)
        array = np.asarray([] if value is None else value)
        if array.size == 0:
            return frozenset()
        if array.ndim != 1 or array.dtype.kind not in "iu" or not (0 <= array.min() and array.max() < n_vocab):
            raise self.error(key, value, f"token ids below {n_vocab}")
        return frozenset(array.tolist())

    def token_id(self, name: str, n_vocab: int) -> int | None:
        """The id under `{name}_token_id`, within the vocabulary; None where the file names none."""
        key, value = f"{name}_token_id", self._get(f"{name}_token_id")
        if value is None:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.error(key, _kind(value), "a token id")
        if value in _NO_TOKEN:
            return None
        if not 0 <= value < n_vocab:
            raise self.error(key, value, f"a token id below {n_vocab}")
        return int(value)


class Vocabulary:
    """The tokens of a file: `tokens[id]` as written there, `ids[token]`, `types[id]` (the constants above).

    FormatError on duplicates, counts that disagree or unknown types.
    """

    def __init__(self, metadata: Metadata) -> None:
        tokens = metadata.strings("tokens")
        if not tokens:
            raise metadata.error("tokens", "an empty array", "at least one token")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            i = next(i for i, token in enumerate(tokens) if ids[token] != i)
            raise metadata.error("tokens", f"{tokens[i]!r} as ids {i} and {ids[tokens[i]]}", "unique tokens")
        types = metadata.numbers("token_type", len(tokens), "iu")
        self.metadata, self.tokens, self.ids = metadata, tokens, ids
        self.typed = types is not None  # without types, all tokens count as ordinary ones
        if types is not None and not (0 <= types.min() and types.max() <= BYTE):
            i = int(np.flatnonzero((types < 0) | (types > BYTE))[0])
            raise metadata.error("token_type", f"{types[i]} for token {i}", f"0 to {BYTE}")
        self.types: list[int] = [NORMAL] * len(tokens) if types is None else types.tolist()
        for text in STOP_TEXTS:
            id = ids.get(text)
            # Fine-tunes leave end-of-turn tokens typed as text, which would let a user's text end a turn.
            if id is not None and (
                self.types[id] == USER_DEFINED or (self.types[id] == NORMAL and text[:2] in ("<|", "<｜"))
            ):
                self.types[id] = CONTROL
        kinds = np.array(self.types)
        self._special = np.flatnonzero(np.isin(kinds, (CONTROL, UNKNOWN, USER_DEFINED))).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def special(self, *kinds: int) -> dict[str, int]:
        """Token -> id of the tokens of these kinds (of control, unknown and user-defined)."""
        return {self.tokens[id]: id for id in self._special if self.types[id] in kinds}

    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: those that the file names, and well-known control tokens."""
        control = self.special(CONTROL, UNKNOWN)
        texts = {text for text in STOP_TEXTS if text in control}
        if {"<|return|>", "<|call|>"} <= texts:
            texts.discard("<|end|>")  # the Harmony format ends a message with it, not the answer
        named = (self.metadata.token_id(name, len(self)) for name in ("eos", "eot", "eom"))
        return frozenset(id for id in (*named, *map(control.get, texts)) if id is not None)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _full(key: str) -> str:
    return key if "." in key else f"tokenizer.ggml.{key}"
