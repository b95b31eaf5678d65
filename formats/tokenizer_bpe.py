"""Byte-level BPE ("gpt2") through Hugging Face tokenizers, and the table of pre-tokenizers."""

from __future__ import annotations

from typing import NamedTuple

from .errors import UnsupportedError
from .tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _tiktoken(digits: str, letters: str = r"\p{L}", contraction: str = _SHORT + "|", slash: str = "") -> str:
    """The split that cl100k_base introduced; its descendants differ in digits, letters and contractions."""
    symbols = rf" ?[^\s{letters}\p{{N}}]+[\r\n{slash}]*|\s*[\r\n]+|"
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}|" + symbols + _SPACES


def _cased(digits: str, suffix: str) -> str:
    """The split of o200k_base and Tekken: a word is upper case and then lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES


_LLAMA3 = _tiktoken(r"\p{N}{1,3}")
_QWEN2 = _tiktoken(r"\p{N}")
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_FALCON_MARKS = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Cased scripts (Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee, ...), as DeepSeek LLM's tokenizer lists them
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    "ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


class PreTokenizer(NamedTuple):
    """How text is cut before BPE: patterns applied in turn, each to the pieces that the one before left."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token needs no merges
    add_bos: bool = False  # used when the file does not say


_ROWS: list[tuple[str, PreTokenizer]] = [
    ("gpt-2 gpt2 mpt olmo jais phi-2 roberta-bpe trillion granite-docling jina-es jina-de jina-v1-en jina-v2-es"
     " jina-v2-de gigachat modern-bert", PreTokenizer((_GPT2,))),
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer((r"\p{N}", _GPT2))),
    ("falcon", PreTokenizer((_FALCON_MARKS, _GPT2, r"[0-9][0-9][0-9]"))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", PreTokenizer((_LLAMA3,), True, True)),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 stablelm2 hunyuan megrez deepseek-r1-qwen solar-open", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_tiktoken(r"\p{N}", letters=r"\p{L}\p{M}"),))),
    ("tekken", PreTokenizer((_cased(r"\p{N}", ""),), True, True)),
    ("gpt-4o o200k llama4 kanana2", PreTokenizer((_cased(r"\p{N}{1,3}", _SHORT + "?"),))),
    ("deepseek-llm", PreTokenizer(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+"))),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense", PreTokenizer(
        (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
         r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
         r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
]  # fmt: skip
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS for name in names.split()}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()


class ByteBPE:
    """A `Codec` for tokenizer.ggml.model "gpt2": tokens, merges, and the split that tokenizer.ggml.pre names."""

    space_prefix = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        metadata = vocabulary.metadata
        name = metadata.text("pre", "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedError(
                f"{metadata.path}: tokenizer.ggml.pre: got {name[:80]!r}, supported are {known}"
            )
        pre = PRE_TOKENIZERS[name]
        self.add_bos = pre.add_bos
        # Special tokens stay out of BPE's reach: they must not come out of plain text.
        hidden = vocabulary.of_type(CONTROL, UNKNOWN, USER_DEFINED)
        vocab = {token: i for i, token in enumerate(vocabulary.tokens) if token not in hidden}
        self._tokenizer = self._build(vocabulary, vocab, pre)

    @staticmethod
    def _build(vocabulary: Vocabulary, vocab: dict[str, int], pre: PreTokenizer):  # type: ignore[no-untyped-def]
        import tokenizers
        from tokenizers import models, pre_tokenizers

        merges = [tuple(merge.split(" ")) for merge in vocabulary.metadata.strings("merges")]
        try:
            model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
        except Exception:  # it names no merge: find out which, or do without those that make special tokens
            merges = _checked_merges(vocabulary, vocab, merges)
            model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
        tokenizer = tokenizers.Tokenizer(model)
        splits = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in pre.splits]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes behind a token's printable stand-ins; a character that is none stands for itself."""
        try:
            return bytes([_BYTES[char] for char in token])
        except KeyError:
            return b"".join(
                bytes([_BYTES[char]]) if char in _BYTES else char.encode("utf-8", "replace") for char in token
            )


def _checked_merges(vocabulary: Vocabulary, vocab: dict[str, int], merges: list[tuple[str, ...]]) -> list:
    """Merges whose three tokens are ordinary ones; FormatError for one that is no pair or names no token."""
    known, kept = set(vocabulary.tokens), []
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not all(merge):
            raise vocabulary.metadata.error("merges", f"{' '.join(merge)!r} as merge {i}", "two tokens and a space")
        names = (*merge, "".join(merge))
        for name in names:
            if name not in known:
                raise vocabulary.metadata.error("merges", f"{name!r} in merge {i}", "tokens of the vocabulary")
        if all(name in vocab for name in names):
            kept.append(merge)
    return kept
