"""How text is cut before byte-level BPE: the table of pre-tokenizers, and its match with a tokenizer.json.

Sources: the names and most patterns are those of llama.cpp (src/llama-vocab.cpp, convert_hf_to_gguf_update.py);
where the model's own tokenizer.json cuts differently, the table follows the tokenizer.json.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UnsupportedError

if TYPE_CHECKING:
    import tokenizers


class Step(Enum):
    """Cuts that are no pattern; they are Hugging Face's own, whose idea of a digit is newer than the patterns'."""

    DIGITS = "each digit alone"
    DIGIT_RUNS = "digits together"
    PUNCTUATION = "punctuation together"
    BYTES = "from here on, each byte is its printable stand-in"


_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _tiktoken(digits: str, letters: str = r"\p{L}") -> str:
    """The split that cl100k_base introduced; its descendants differ in digits, letters and contractions."""
    word = letters if letters == r"\p{L}" else f"[{letters}]"
    symbols = rf" ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{word}+|{digits}|" + symbols + _SPACES


def _cased(digits: str, suffix: str) -> str:
    """The split of o200k_base and Tekken: a word is upper case and then lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES


_LLAMA3 = _tiktoken(r"\p{N}{1,3}")
_QWEN2 = _tiktoken(r"\p{N}")
_O200K = _cased(r"\p{N}{1,3}", _SHORT + "?")
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# DeepSeek LLM lists the cased letters of an older Unicode, without these
_NOT_CASED = (
    "\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua78f-\ua7ff\uab30-\uab6f"
    "\U00010570-\U000105bf\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001dfff"
)
_CASED = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NOT_CASED}]]"


class PreTokenizer(NamedTuple):
    """How text is cut before BPE: patterns and steps, each applied to the pieces that the one before left."""

    steps: tuple[str | Step, ...]
    ignore_merges: bool = False  # a piece that is a token needs no merges
    add_bos: bool = False  # used when the file does not say
    nfc: bool = False  # the model's own tokenizer composes characters first (llama.cpp does not)

    def build(self) -> tokenizers.pre_tokenizers.PreTokenizer:
        """This cut as the tokenizers library runs it."""
        from tokenizers import Regex, pre_tokenizers

        named = {
            Step.DIGITS: pre_tokenizers.Digits(individual_digits=True),
            Step.DIGIT_RUNS: pre_tokenizers.Digits(individual_digits=False),
            Step.PUNCTUATION: pre_tokenizers.Punctuation("contiguous"),
            Step.BYTES: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        }
        steps = self.steps if Step.BYTES in self.steps else (*self.steps, Step.BYTES)
        return pre_tokenizers.Sequence(
            [named[step] if isinstance(step, Step) else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
        )


# Names in a row behave alike; the first is the one that a converted file gets, unless _OWN_NAMES knows better.
_FAMILIES: dict[str, PreTokenizer] = {
    "gpt-2 jais phi-2 roberta-bpe trillion gigachat modern-bert exaone4 mellum a.x-4.0"
    " jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code": PreTokenizer((_GPT2,)),
    # GPT-NeoX's, and those who took it over: Pythia, StableLM, OLMo, OLMoE, MPT
    "olmo mpt": PreTokenizer((_GPT2,), nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b": PreTokenizer((Step.DIGITS, _GPT2)),
    "command-r": PreTokenizer((Step.DIGITS, _GPT2), nfc=True),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    # tiiuae/falcon-7b, quoted in ggml-org/llama.cpp issue 3502: its digits are looked for among bytes' stand-ins,
    # so that characters whose UTF-8 contains B2, B3, B9 or BC to BE (as "¼" does) are cut there
    "falcon": PreTokenizer((Step.PUNCTUATION, _GPT2, Step.BYTES, Step.DIGIT_RUNS, r"[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 f2llmv2": PreTokenizer((_QWEN2,), nfc=True),
    "stablelm2 deepseek-r1-qwen hunyuan megrez solar-open grok-2 kormo": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_tiktoken(r"\p{N}", letters=r"\p{L}\p{M}"),), nfc=True),
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
# config.json's model_type -> the name that llama.cpp gives that family, among names that behave alike
_OWN_NAMES = {
    "starcoder2": "starcoder",
    "gpt_bigcode": "starcoder",
    "granite": "refact",
    "granitemoe": "refact",
    "cohere": "command-r",
    "mpt": "mpt",
    "qwen2": "deepseek-r1-qwen",
    "llama": "smaug-bpe",
    "llama4": "llama4",
}


def steps_of(structure: Any) -> tuple[str | Step, ...]:
    """A tokenizer.json's `pre_tokenizer` as steps; UnsupportedError naming the part that has none."""
    kind = structure.get("type") if isinstance(structure, dict) else None
    parts = structure.get("pretokenizers") if kind == "Sequence" else None
    if isinstance(parts, list):
        return tuple(step for part in parts for step in steps_of(part))
    if kind == "Digits":
        return (Step.DIGITS if structure.get("individual_digits") else Step.DIGIT_RUNS,)
    if kind == "Punctuation" and structure.get("behavior") == "Contiguous":
        return (Step.PUNCTUATION,)
    if kind == "ByteLevel" and not structure.get("add_prefix_space"):
        return (_GPT2, Step.BYTES) if structure.get("use_regex", True) else (Step.BYTES,)
    if kind == "Split" and (pattern := _pattern(structure)):
        return (pattern,)
    shown = repr(structure)
    raise UnsupportedError(f"got {shown if len(shown) < 200 else shown[:199] + '…'}")


def _pattern(split: dict[str, Any]) -> str:
    """The pattern of a Split that only cuts; "" for one that also drops or moves text."""
    pattern, behavior = split.get("pattern"), split.get("behavior")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str):
        return ""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n").replace(r"\p{N}{1}|", r"\p{N}|")
    # "Remove what does not match" cuts in the same places where the pattern matches everything.
    whole = behavior == "Removed" and split.get("invert") is True and regex.endswith("|" + _SPACES)
    return regex if behavior == "Isolated" or whole else ""


def name_of(structure: Any, ignore_merges: bool, nfc: bool, model_type: str) -> str:
    """The name of the pre-tokenizer that cuts as this `pre_tokenizer` does; UnsupportedError where none does.

    Among those that cut alike: the one that agrees in ignore_merges, then in nfc, then the family's own name.
    """
    steps = steps_of(structure)
    if steps[-1:] == (Step.BYTES,):
        steps = steps[:-1]
    found = [name for name, known in PRE_TOKENIZERS.items() if known.steps == steps]
    if not found:
        raise UnsupportedError("got " + " then ".join(_shown(step) for step in steps))

    def fit(name: str) -> tuple[bool, bool, bool]:
        known = PRE_TOKENIZERS[name]
        return known.ignore_merges == ignore_merges, known.nfc == nfc, name == _OWN_NAMES.get(model_type)

    return max(found, key=fit)


def _shown(step: str | Step) -> str:
    text = step.value if isinstance(step, Step) else repr(step)
    return text if len(text) < 160 else text[:159] + "…"
