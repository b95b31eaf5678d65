"""Text to token ids and back: what all tokenizers share (special tokens, BOS/EOS, streaming)."""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import FormatError, ParameterError, UnsupportedError

# tokenizer.ggml.token_type; the numbers are those of SentencePiece's ModelProto.SentencePiece.Type
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

# Tokens that end an answer. Files often name one of them as EOS and leave the others to their readers.
STOP_TEXTS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>",
    "<|return|>", "<|call|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
    "<end_of_turn>", "<end_of_utterance>", "</s>", "<EOT>", "<eos>",
)  # fmt: skip
SUPPORTED = ("gpt2", "llama")
_NO_TOKEN = (-1, 2**32 - 1)  # how files say "this model has none"


class Metadata:
    """Typed access to the tokenizer keys of a file; a value of the wrong kind is a FormatError naming its key.

    `file` is anything with a `metadata` mapping (string arrays as lists, numeric ones as numpy arrays).
    """

    def __init__(self, file: Any) -> None:
        self.path: object = getattr(file, "path", "metadata")
        self._values: Mapping[str, Any] = file.metadata

    def error(self, key: str, got: object, wanted: object) -> FormatError:
        """A FormatError about a tokenizer key; long values are cut."""
        shown = str(got)
        return FormatError(self.path, f"tokenizer.ggml.{key}", shown[:80] if len(shown) > 80 else shown, wanted)

    def text(self, key: str, default: str | None = None) -> str:
        """A string value, or `default`; FormatError where there is neither."""
        value = self._values.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise self.error(key, "nothing", "a string")
        if not isinstance(value, str):
            raise self.error(key, f"a {type(value).__name__}", "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean value, or `default`."""
        value = self._values.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(key, f"a {type(value).__name__}", "a boolean")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if isinstance(value, np.ndarray) and value.size == 0:
            value = []  # an empty array may not keep its element type
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "nothing" if value is None else f"a {type(value).__name__}", "an array of strings")
        return list(value)

    def numbers(self, key: str, count: int, kinds: str) -> np.ndarray | None:
        """A 1-D numeric array of `count` values whose numpy kind is in `kinds`; None where the key is missing."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, (list, tuple, np.ndarray)) else None
        if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            raise self.error(key, f"a {type(value).__name__}", "an array of numbers")
        if array.size != count:
            raise self.error(key, f"{array.size} values", f"{count}, one for each token")
        return array

    def token_id(self, key: str, n_vocab: int) -> int | None:
        """A token id within the vocabulary, or None where the file names none."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.error(key, f"a {type(value).__name__}", "a token id")
        if int(value) in _NO_TOKEN:
            return None
        if not 0 <= int(value) < n_vocab:
            raise self.error(key, int(value), f"a token id below {n_vocab}")
        return int(value)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file: `tokens[id]` as written there, `types[id]` one of the constants above."""

    metadata: Metadata
    tokens: list[str]
    types: list[int]
    typed: bool  # False: the file has no token_type, so every type is a guess

    @classmethod
    def read(cls, metadata: Metadata) -> Vocabulary:
        """Read and check tokens and types; FormatError on duplicates, wrong counts or unknown types."""
        tokens = metadata.strings("tokens")
        if not tokens:
            raise metadata.error("tokens", "an empty array", "at least one token")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if len(set(tokens)) != len(tokens):
            seen: dict[str, int] = {}
            i = next(i for i, token in enumerate(tokens) if seen.setdefault(token, i) != i)
            raise metadata.error("tokens", f"{tokens[i]!r} twice (ids {seen[tokens[i]]} and {i})", "unique tokens")
        array = metadata.numbers("token_type", len(tokens), "iu")
        types = [NORMAL] * len(tokens) if array is None else array.tolist()
        if array is not None and not (0 <= int(array.min()) and int(array.max()) <= BYTE):
            i = next(i for i, kind in enumerate(types) if not 0 <= kind <= BYTE)
            raise metadata.error("token_type", f"{types[i]} for token {i}", f"0 to {BYTE}")
        for text in STOP_TEXTS:
            i = tokens.index(text) if text in tokens else -1
            # Fine-tunes often leave end-of-turn tokens typed as text, which would let a user's text end a turn.
            if i >= 0 and (types[i] == USER_DEFINED or (types[i] == NORMAL and text[:2] in ("<|", "<｜"))):
                types[i] = CONTROL
        return cls(metadata, tokens, types, array is not None)

    def of_type(self, *kinds: int) -> dict[str, int]:
        """Token text -> id for the tokens of these types."""
        wanted = frozenset(kinds)
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in wanted}


class Codec(Protocol):
    """What a kind of tokenizer adds: plain text to ids, and the bytes of its ordinary tokens."""

    add_bos: bool  # used when the file does not say
    space_prefix: bool  # a space is put before each piece of text, to be taken off again when decoding

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes that a token (not control, unknown or user-defined) stands for."""


class Tokenizer:
    """Token ids of texts for one model; made by `load_tokenizer`."""

    def __init__(self, vocabulary: Vocabulary, codec: Codec) -> None:
        metadata, self.n_vocab = vocabulary.metadata, len(vocabulary.tokens)
        self._vocabulary, self._codec = vocabulary, codec
        self.bos_id = metadata.token_id("bos_token_id", self.n_vocab)
        self.eos_id = metadata.token_id("eos_token_id", self.n_vocab)
        self.add_bos = metadata.flag("add_bos_token", codec.add_bos) and self.bos_id is not None
        self.add_eos = metadata.flag("add_eos_token", False) and self.eos_id is not None
        named = [metadata.token_id(f"{name}_token_id", self.n_vocab) for name in ("eot", "eom")]
        special = vocabulary.of_type(CONTROL, UNKNOWN)
        stops = [self.eos_id, *named, *(special.get(text) for text in STOP_TEXTS)]
        self.stop_ids = frozenset(i for i in stops if i is not None)
        user_defined = vocabulary.of_type(USER_DEFINED)
        self._plain = _Splitter(user_defined)
        self._special = _Splitter({**user_defined, **special})
        self._bytes: list[bytes | None] = [None] * self.n_vocab

    @property
    def space_prefix(self) -> bool:
        """Whether a text gets a space in front before it is split (SentencePiece's dummy prefix)."""
        return self._codec.space_prefix

    def encode(self, text: str, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of `text`.

        add_bos: None = as the model wants (and no second BOS where the text brings its own). special: parse
        control tokens in the text; without it they are text like any other, user-defined tokens are always parsed.
        """
        if not isinstance(text, str):
            raise ParameterError(f"text: got a {type(text).__name__}, wanted a string")
        if not text.isascii():
            text = _SURROGATE.sub("\ufffd", text)
        ids: list[int] = []
        for part in (self._special if special else self._plain).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._codec.encode(part))
        if self.bos_id is not None:
            if add_bos or (add_bos is None and self.add_bos and ids[:1] != [self.bos_id]):
                ids.insert(0, self.bos_id)
        if self.eos_id is not None and self.add_eos and add_bos is not False:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False, continues: bool = False) -> str:
        """Text of `ids`: exactly what a StreamDecoder with the same flags gives, joined."""
        decoder = StreamDecoder(self, special, continues)
        return decoder.push_bytes(b"".join(map(decoder.visible_bytes, ids))) + decoder.finish()

    def token_bytes(self, id: int) -> bytes:
        """Bytes that a token stands for (its name, for control tokens); ParameterError for an id out of range."""
        i = self._index(id)
        found = self._bytes[i]
        if found is None:
            token, kind = self._vocabulary.tokens[i], self._vocabulary.types[i]
            raw = kind in (CONTROL, UNKNOWN, USER_DEFINED)
            found = token.encode("utf-8", "replace") if raw else self._codec.token_bytes(token, kind)
            self._bytes[i] = found
        return found

    def token_text(self, id: int) -> str:
        """The token as the file writes it; ParameterError for an id out of range."""
        return self._vocabulary.tokens[self._index(id)]

    def is_control(self, id: int) -> bool:
        """Whether a token is no part of the text: control, unknown or unused."""
        return self._vocabulary.types[self._index(id)] in (CONTROL, UNKNOWN, UNUSED)

    def _index(self, id: int) -> int:
        try:
            i = operator.index(id)
        except TypeError:
            raise ParameterError(f"token id: got a {type(id).__name__}, wanted an integer") from None
        if not 0 <= i < self.n_vocab:
            raise ParameterError(f"token id: got {i}, wanted 0 to {self.n_vocab - 1}")
        return i


_SURROGATE = re.compile("[\ud800-\udfff]")


class _Splitter:
    """Cuts a text at special tokens: leftmost first, the longest at one place."""

    def __init__(self, ids: dict[str, int]) -> None:
        lengths: dict[str, set[int]] = {}
        for token in ids:
            lengths.setdefault(token[0], set()).add(len(token))
        self._ids = ids
        self._lengths = {char: sorted(found, reverse=True) for char, found in lengths.items()}
        self._start = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield pieces of plain text and ids of special tokens, in order."""
        done = at = 0
        while self._start is not None and (match := self._start.search(text, at)):
            at = match.start()
            for length in self._lengths[text[at]]:
                id = self._ids.get(text[at : at + length])
                if id is not None:
                    if done < at:
                        yield text[done:at]
                    yield id
                    done = at = at + length
                    break
            else:
                at += 1
        if done < len(text):
            yield text[done:]


class StreamDecoder:
    """Token ids to text, one at a time; never gives half a character.

    special: show control tokens. continues: the ids follow a text that was shown before, so that a SentencePiece
    model's first space belongs to the text (without it, that space is the one that encode put in front).
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False, continues: bool = False) -> None:
        self._tokenizer, self._show_control = tokenizer, special
        self._strip = tokenizer.space_prefix and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, possibly empty."""
        return self.push_bytes(self.visible_bytes(id))

    def finish(self) -> str:
        """What is left: a replacement character where the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)

    def visible_bytes(self, id: int) -> bytes:
        """Bytes that this token adds to the text as this decoder shows it; takes off the first space once."""
        if self._tokenizer.is_control(id):
            data = self._tokenizer.token_bytes(id) if self._show_control else b""
            self._strip = self._strip and not data
            return data
        data = self._tokenizer.token_bytes(id)
        if self._strip and data:
            self._strip = False
            return data[1:] if data[0] == 0x20 else data
        return data

    def push_bytes(self, data: bytes) -> str:
        """The text that these bytes complete."""
        return self._utf8.decode(data)


def load_tokenizer(file: Any) -> Tokenizer:
    """The tokenizer of a GGUF file (anything with `.metadata`).

    FormatError for broken data, UnsupportedError for a kind of tokenizer or pre-tokenizer that is not here.
    """
    metadata = Metadata(file)
    model = metadata.text("model")
    codec: Codec
    if model == "gpt2":
        from .tokenizer_bpe import ByteBPE

        vocabulary = Vocabulary.read(metadata)
        codec = ByteBPE(vocabulary)
    elif model == "llama":
        from .tokenizer_spm import SentencePiece

        vocabulary = Vocabulary.read(metadata)
        codec = SentencePiece(vocabulary)
    else:
        raise UnsupportedError(
            f"{metadata.path}: tokenizer.ggml.model: got {model[:80]!r}, supported are {', '.join(SUPPORTED)}"
        )
    return Tokenizer(vocabulary, codec)
