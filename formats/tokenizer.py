"""Text to token ids and back: what all tokenizers share (special tokens, BOS and EOS, streaming)."""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from .errors import ParameterError, UnsupportedError
from .vocabulary import (
    CONTROL,
    OWN_STRIP_LEFT,
    OWN_STRIP_RIGHT,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Metadata,
    Vocabulary,
)

_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_SPACES_AFTER, _SPACES_BEFORE = re.compile(f"[{_SPACES}]*"), re.compile(f"[{_SPACES}]*\\Z")


class Codec(Protocol):
    """What a kind of tokenizer adds: plain text to ids, and the bytes of its ordinary tokens."""

    add_bos: bool  # used when the file does not say
    space_prefix: bool  # a space is put before each piece of text, to be taken off again when decoding
    marks_spaces: bool  # a space is U+2581, and the other way round
    longest: int | None  # characters of a text that one token may stand for; None: any number

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text without special tokens; first: nothing comes before it."""

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes that a token (not control, unknown or user-defined) stands for."""


class Tokenizer:
    """Token ids of texts for one model; made by `load_tokenizer`."""

    def __init__(self, vocabulary: Vocabulary, codec: Codec) -> None:
        metadata, self.n_vocab = vocabulary.metadata, len(vocabulary)
        self._vocabulary, self._codec = vocabulary, codec
        self.bos_id = metadata.token_id("bos", self.n_vocab)
        self.eos_id = metadata.token_id("eos", self.n_vocab)
        self.add_bos = metadata.flag("add_bos_token", codec.add_bos) and self.bos_id is not None
        self.add_eos = metadata.flag("add_eos_token", False) and self.eos_id is not None
        self.stop_ids = vocabulary.stop_ids()
        strips = (metadata.ids(OWN_STRIP_LEFT, self.n_vocab), metadata.ids(OWN_STRIP_RIGHT, self.n_vocab))
        self._user_defined = _Splitter(vocabulary.special(USER_DEFINED), *strips)
        self._special = _Splitter(vocabulary.special(USER_DEFINED, CONTROL, UNKNOWN), *strips)
        marked = any("\u2581" in token for token in vocabulary.special(USER_DEFINED, CONTROL, UNKNOWN))
        self._swallows = any(strips)
        self._unmark = codec.marks_spaces and not marked
        self._bytes: list[bytes | None] = [None] * self.n_vocab

    @property
    def space_prefix(self) -> bool:
        """Whether a text gets a space in front before it is split (SentencePiece's dummy prefix)."""
        return self._codec.space_prefix

    def most_characters(self, n_tokens: int) -> int | None:
        """A length that no text of so many tokens exceeds; None: unknown."""
        longest = self._codec.longest
        return None if longest is None or self._swallows else n_tokens * longest

    def encode(self, text: str, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of `text`.

        add_bos: None = as the model wants (and no second BOS where the text brings its own). special: parse
        control tokens in the text, without it they are text like any other; user-defined tokens always are.
        """
        if not isinstance(text, str):
            raise ParameterError(f"text: got a {type(text).__name__}, wanted a string")
        if not text.isascii():
            text = _SURROGATE.sub("\ufffd", text)
            if self._unmark:  # or runs of spaces that are tokens would be missed
                text = text.replace("\u2581", " ")
        ids: list[int] = []
        for part in (self._special if special else self._user_defined).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._codec.encode(part, not ids))
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
        """Bytes that a token stands for (a control token: its name); ParameterError for a bad id."""
        i = self._index(id)
        found = self._bytes[i]
        if found is None:
            token, kind = self._vocabulary.tokens[i], self._vocabulary.types[i]
            raw = kind in (CONTROL, UNKNOWN, USER_DEFINED)
            found = token.encode("utf-8", "replace") if raw else self._codec.token_bytes(token, kind)
            self._bytes[i] = found
        return found

    def token_text(self, id: int) -> str:
        """The token as the file writes it; ParameterError for a bad id."""
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


class _Splitter:
    """Cuts a text at special tokens: leftmost first, the longest at one place.

    strip_left, strip_right: ids of tokens that swallow the spaces before or after them.
    """

    def __init__(self, ids: dict[str, int], strip_left: frozenset[int], strip_right: frozenset[int]) -> None:
        self._strip_left, self._strip_right = strip_left, strip_right
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
                    piece = text[done:at]
                    if id in self._strip_left:
                        piece = _SPACES_BEFORE.sub("", piece, count=1)
                    if piece:
                        yield piece
                    yield id
                    done = at = at + length
                    if id in self._strip_right and (spaces := _SPACES_AFTER.match(text, at)):
                        done = at = spaces.end()
                    break
            else:
                at += 1
        if done < len(text):
            yield text[done:]


class StreamDecoder:
    """Token ids to text, one at a time; never gives half a character.

    special: show control tokens. continues: the ids follow a text that was shown before, so that a first
    space belongs to the text (without it, SentencePiece's first space is the one that encode put in front).
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
            # Only an ordinary token has the space that encode put in front; others spell their spaces as such.
            if data[:1] == b" " and self._tokenizer.token_text(id)[0] == "\u2581":
                return data[1:]
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
    # Each branch imports its own library: they take longer to load than a small vocabulary.
    if model == "gpt2":
        from .tokenizer_bpe import ByteBPE

        vocabulary = Vocabulary(metadata)
        return Tokenizer(vocabulary, ByteBPE(vocabulary))
    if model == "llama":
        from .tokenizer_spm import SentencePiece

        vocabulary = Vocabulary(metadata)
        return Tokenizer(vocabulary, SentencePiece(vocabulary))
    wanted = "supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
    raise UnsupportedError(f"{metadata.path}: tokenizer.ggml.model: got {model[:80]!r}, {wanted}")
