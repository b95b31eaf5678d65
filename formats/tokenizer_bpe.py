"""Byte-level BPE ("gpt2") through Hugging Face tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .vocabulary import CONTROL, OWN_IGNORE_MERGES, OWN_NFC, UNKNOWN, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    import tokenizers


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()
LONG = 2000  # characters above which a text is encoded as a batch, which keeps no other Python thread waiting


class ByteBPE:
    """A `Codec` for tokenizer.ggml.model "gpt2": tokens, merges, and the split that `pre` names."""

    space_prefix = False
    marks_spaces = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        metadata = vocabulary.metadata
        name = metadata.text("pre", "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedError(f"{metadata.path}: tokenizer.ggml.pre: got {name[:80]!r}, supported are {known}")
        pre = PRE_TOKENIZERS[name]
        # Files that hotcold converts say where their tokenizer departs from others of this name.
        pre = pre._replace(
            ignore_merges=metadata.flag(OWN_IGNORE_MERGES, pre.ignore_merges), nfc=metadata.flag(OWN_NFC, pre.nfc)
        )
        self.add_bos = pre.add_bos
        # NFC makes one character of four at most
        self.longest: int | None = max(map(len, vocabulary.tokens), default=0) * (4 if pre.nfc else 1)
        self._tokenizer = _build(vocabulary, pre)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text without special tokens."""
        if len(text) > LONG:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes behind a token's printable stand-ins; a character that is none stands for itself."""
        try:
            return bytes([_BYTES[char] for char in token])
        except KeyError:
            return b"".join(
                bytes([_BYTES[char]]) if char in _BYTES else char.encode("utf-8", "replace") for char in token
            )


def _build(vocabulary: Vocabulary, pre: PreTokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models, normalizers

    # Special tokens stay out of BPE's reach: they must not come out of plain text.
    ordinary = dict(vocabulary.ids)
    for token in vocabulary.special(CONTROL, UNKNOWN, USER_DEFINED):
        del ordinary[token]
    merges: list[Any] = [tuple(merge.split(" ")) for merge in vocabulary.metadata.strings("merges")]
    try:
        model = models.BPE(vocab=ordinary, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception:  # checking 49,000 merges takes longer than building them: look only after a refusal
        merges = _usable_merges(vocabulary, ordinary, merges)
        try:
            model = models.BPE(vocab=ordinary, merges=merges, ignore_merges=pre.ignore_merges)
        except Exception as error:
            raise vocabulary.metadata.error("merges", error, "merges that make a BPE model") from None
    tokenizer = Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    return tokenizer


def _usable_merges(vocabulary: Vocabulary, ordinary: dict[str, int], merges: list[Any]) -> list[Any]:
    """Merges between ordinary tokens; FormatError for one that is no pair or names no token at all."""
    kept = []
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not all(merge):
            shown = repr(" ".join(merge))
            raise vocabulary.metadata.error("merges", f"{shown} at {i}", "two tokens and one space")
        names = (*merge, "".join(merge))
        for name in names:
            if name not in vocabulary.ids:
                raise vocabulary.metadata.error("merges", f"{name!r} at {i}", "tokens of the vocabulary")
        if all(name in ordinary for name in names):
            kept.append(merge)
    return kept
