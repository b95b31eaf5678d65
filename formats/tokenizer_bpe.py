"""Byte-level BPE ("gpt2") through Hugging Face tokenizers, and the table of pre-tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UnsupportedError
from .vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    import tokenizers

_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _tiktoken(digits: str, letters: str = r"\p{L}") -> str:
    """The split that cl100k_base introduced; its descendants differ in digits, letters and contractions."""
    symbols = rf" ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}|" + symbols + _SPACES


def _cased(digits: str, suffix: str) -> str:
    """The split of o200k_base and Tekken: a word is upper case and then lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES


_LLAMA3 = _tiktoken(r"\p{N}{1,3}")
_QWEN2 = _tiktoken(r"\p{N}")
_O200K = _cased(r"\p{N}{1,3}", _SHORT + "?")
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_FALCON_MARKS = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# DeepSeek LLM lists the cased letters of an older Unicode, without these
_NOT_CASED = (
    "\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua78f-\ua7ff\uab30-\uab6f"
    "\U00010570-\U000105bf\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001dfff"
)
_CASED = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NOT_CASED}]]"


class PreTokenizer(NamedTuple):
    """How text is cut before BPE: patterns applied in turn, each to the pieces that the one before left."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token needs no merges
    add_bos: bool = False  # used when the file does not say


_FAMILIES: dict[str, PreTokenizer] = {
    "gpt-2 mpt olmo jais phi-2 roberta-bpe trillion gigachat modern-bert exaone4 mellum a.x-4.0"
    " jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code": PreTokenizer((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": PreTokenizer((r"\p{N}", _GPT2)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((_FALCON_MARKS, _GPT2, r"[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 stablelm2 hunyuan megrez deepseek-r1-qwen solar-open grok-2 kormo f2llmv2": PreTokenizer(
        (_QWEN2,)
    ),
    "qwen35": PreTokenizer((_tiktoken(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    "tekken": PreTokenizer((_cased(r"\p{N}", ""),), True, True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((_O200K,)),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", rf"\s?{_CASED}+", r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+", r"\s+$", _CJK, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES,
        )
    ),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]"),)),
    "seed-coder": PreTokenizer((_QWEN2.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+"),)),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: family for names, family in _FAMILIES.items() for name in names.split()
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()


class ByteBPE:
    """A `Codec` for tokenizer.ggml.model "gpt2": tokens, merges, and the split that `pre` names."""

    space_prefix = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        metadata = vocabulary.metadata
        name = metadata.text("pre", "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedError(
                f"{metadata.path}: tokenizer.ggml.pre: got {name[:80]!r}, supported are {known}"
            )
        self.add_bos = PRE_TOKENIZERS[name].add_bos
        self._tokenizer = _build(vocabulary, PRE_TOKENIZERS[name])

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


def _build(vocabulary: Vocabulary, pre: PreTokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

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
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
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
