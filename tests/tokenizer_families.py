"""Tokenizer folders of the model families, in Hugging Face's format, on the small vocabularies of tests/tokenizers/.

Structures (pre-tokenizer, normalizer, decoder, post-processor, added tokens) are the families' own; where each is
quoted is said beside it: "transformers" means its convert_slow_tokenizer.py and models/*/tokenization_*.py,
"llama.cpp" the "original regex from tokenizer.json" comments of its src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "tokenizers"
Json = dict[str, Any]

CL100K = (  # meta-llama/Meta-Llama-3-8B and K-intelligence/Midm-2.0 (ggml-org/llama.cpp pull request 14626)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")  # transformers; llama.cpp for stablelm2
TEKKEN = (  # llama.cpp; transformers (the pattern of fix_mistral_regex)
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (  # llama.cpp
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (  # transformers; llama.cpp
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NFC = {"type": "NFC"}


def bytes_part(use_regex: bool = True) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content: str, special: bool = True, **options: bool) -> Json:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"content": content, "special": special, **defaults, **options}


DIGITS = sequence({"type": "Digits", "individual_digits": True}, bytes_part())
NEOX_SPACES = [added(" " * n, special=False) for n in range(24, 1, -1)]
IM = [added("<|endoftext|>"), added("<|im_start|>"), added("<|im_end|>")]
QWEN_TOOLS = [added(name, False, normalized=False) for name in ("<tool_call>", "</tool_call>", "<think>", "</think>")]


def byte_family(
    pre: str,
    cut: Json,
    tokens: list[Json],
    normalizer: Json | None = None,
    bos: str = "",
    ignore_merges: bool = False,
    own: Json | None = None,
    model_type: str = "",
    **settings: Any,
) -> Json:
    return {
        "kind": "byte_level", "pre": pre, "cut": cut, "tokens": tokens, "normalizer": normalizer, "bos": bos,
        "ignore_merges": ignore_merges, "own": own or {}, "model_type": model_type, "settings": settings,
    }  # fmt: skip


LLAMA3 = [added(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")]
# name -> the tokenizer.json's parts, and what must come out: `pre`, and `own` for keys of hotcold's own
BYTE_FAMILIES: dict[str, Json] = {
    "gpt2": byte_family("gpt-2", bytes_part(), [added("<|endoftext|>", normalized=True)], eos_token="<|endoftext|>"),
    # transformers (GPTNeoXTokenizer); its runs of spaces: ggml-org/llama.cpp pull request 8228
    "gptneox": byte_family(
        "olmo", bytes_part(), [added("<|endoftext|>"), added("<|padding|>"), *NEOX_SPACES], NFC, model_type="gpt_neox"
    ),
    "olmoe": byte_family(
        "olmo", bytes_part(), [added("<|endoftext|>"), added("|||IP_ADDRESS|||", False), *NEOX_SPACES], NFC
    ),
    "mpt": byte_family("mpt", bytes_part(), [added("<|endoftext|>"), *NEOX_SPACES], NFC, model_type="mpt"),
    # the same in several public readers of these files: Digits one by one, then GPT-2's cut
    "smollm2": byte_family("smollm", DIGITS, IM, model_type="llama", bos_token="<|im_start|>", eos_token="<|im_end|>"),
    "starcoder2": byte_family("starcoder", DIGITS, [added("<|endoftext|>")], model_type="starcoder2"),
    "granite": byte_family("refact", DIGITS, [added("<|start_of_role|>")], model_type="granite"),
    "command-r": byte_family("command-r", DIGITS, [added("<BOS_TOKEN>")], NFC, bos="<BOS_TOKEN>"),
    # tiiuae/falcon-7b: ggml-org/llama.cpp issue 3502
    "falcon": byte_family(
        "falcon",
        sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            bytes_part(),
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ),
        [added(">>QUESTION<<"), added("<|endoftext|>")],
    ),
    "llama3": byte_family(
        "llama-bpe", sequence(split(CL100K), bytes_part(False)), LLAMA3, bos="<|begin_of_text|>", ignore_merges=True,
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    ),
    "llama3-without-ignore-merges": byte_family(
        "smaug-bpe", sequence(split(CL100K), bytes_part(False)), LLAMA3, bos="<|begin_of_text|>", model_type="llama"
    ),
    # olmo2 and phi-4 share cl100k_base's cut; many conversions write it as what to keep (llama.cpp pull request 14626)
    "olmo2": byte_family("dbrx", sequence(split(CL100K, "Removed", True), bytes_part(False)), IM, model_type="olmo2"),
    "phi4": byte_family(
        "dbrx",
        sequence(split(CL100K, "Removed", True), bytes_part(False)),
        [added("<|endoftext|>", lstrip=True, rstrip=True), added("<|im_start|>", lstrip=True, rstrip=True),
         added("<|im_end|>", lstrip=True, rstrip=True), added("<|dummy_0|>", lstrip=True, rstrip=True)],
        model_type="phi3",
    ),
    "qwen2": byte_family(
        "qwen2", sequence(split(QWEN2), bytes_part(False)), [*IM, *QWEN_TOOLS], NFC, model_type="qwen2",
        bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False,
    ),
    "qwen3moe": byte_family("qwen2", sequence(split(QWEN2), bytes_part(False)), [*IM, *QWEN_TOOLS], NFC),
    "qwen35": byte_family("qwen35", sequence(split(QWEN35), bytes_part(False)), [*IM, *QWEN_TOOLS], NFC),
    "deepseek-r1-qwen": byte_family(
        "deepseek-r1-qwen", sequence(split(QWEN2), bytes_part(False)), [added("<｜begin▁of▁sentence｜>"), *QWEN_TOOLS],
        {"type": "Sequence", "normalizers": []}, bos="<｜begin▁of▁sentence｜>", model_type="qwen2",
    ),
    "stablelm2": byte_family("stablelm2", sequence(split(QWEN2), bytes_part(False)), IM, model_type="stablelm"),
    "tekken": byte_family(
        "tekken", sequence(split(TEKKEN), bytes_part(False)), [added("<s>"), added("</s>"), added("[INST]")],
        bos="<s>", ignore_merges=True, model_type="mistral",
    ),
    "tekken-with-merges": byte_family(
        "tekken", sequence(split(TEKKEN), bytes_part(False)), [added("<s>"), added("</s>"), added("[INST]")],
        bos="<s>", own={"ignore_merges": False}, model_type="mistral",
    ),
    "gpt-4o": byte_family("gpt-4o", sequence(split(O200K), bytes_part(False)), [added("<|endoftext|>")]),
    "nfc-where-no-name-has-it": byte_family(
        "dbrx", sequence(split(CL100K), bytes_part(False)), [added("<|endoftext|>")], NFC, own={"nfc": True}
    ),
}  # fmt: skip

PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
GEMMA_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
S = [added("<unk>"), added("<s>"), added("</s>")]
# written with U+2581 and never normalized: ggml-org/llama.cpp pull request 8228
GEMMA_RUNS = [
    added(text, False, normalized=False)
    for text in (*("\n" * n for n in range(1, 6)), *("▁" * n for n in range(2, 9)), "<h1>", "</h1>")
]
PHI3 = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]


def metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def piece_family(
    model: str, normalizer: Json | None, cut: Json | None, tokens: list[Json], prefix: str | None, bos: str = "<s>"
) -> Json:
    return {
        "kind": "sentencepiece", "model": model, "normalizer": normalizer, "cut": cut, "tokens": tokens,
        "prefix": prefix, "bos": bos,
    }  # fmt: skip


# prefix: hotcold.tokenizer.space_prefix that must come out, "" = no space in front at all
PIECE_FAMILIES: dict[str, Json] = {
    # transformers (LlamaConverter of version 4): Llama 1 and 2, TinyLlama, Yi, Mixtral, Mistral v1, Bamboo
    "llama2": piece_family("sentencepiece", PREPEND, None, S, None),
    # transformers (LlamaTokenizer, legacy=False): Mistral 7B v0.3, Nemotron, newly saved Llamas
    "mistral-v3": piece_family(
        "sentencepiece", None, metaspace("first"), [*S, added("[INST]"), added("[/INST]")], "first unless there"
    ),
    "metaspace-always": piece_family("sentencepiece", None, metaspace("always"), S, "each unless there"),
    # microsoft/Phi-3: Llama 2's, and added tokens that swallow the spaces after them
    "phi3": piece_family(
        "sentencepiece", PREPEND, None, [*S, *(added(name, rstrip=name != PHI3[0]) for name in PHI3)], None
    ),
    # transformers (GemmaTokenizer, GemmaConverter)
    "gemma2": piece_family(
        "spaces", REPLACE, GEMMA_CUT, [*S, added("<start_of_turn>"), added("<end_of_turn>"), *GEMMA_RUNS], ""
    ),
}  # fmt: skip


def merges_of(pieces: list[str], never: set[str]) -> list[list[str]]:
    """All pairs of pieces that make a piece, in the pieces' order, as transformers extracts them."""
    ids = {piece: i for i, piece in enumerate(pieces) if piece not in never and not piece.startswith("<0x")}
    merges = []
    for piece in ids:
        local = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        local = [pair for pair in local if pair[0] in ids and pair[1] in ids]
        merges += [list(pair) for pair in sorted(local, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return merges


def byte_json(family: Json) -> Json:
    """The tokenizer.json of a byte-level family."""
    model = json.loads((DATA / "byte_level.json").read_text(encoding="utf-8"))
    vocab = model["vocab"]
    tokens = [token | {"id": len(vocab) + i} for i, token in enumerate(family["tokens"])]
    post: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if family["bos"]:
        ids = {token["content"]: token["id"] for token in tokens}
        post = {"type": "Sequence", "processors": [post, template(family["bos"], ids[family["bos"]])]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": family["normalizer"],
        "pre_tokenizer": family["cut"],
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": family["ignore_merges"], "vocab": vocab, "merges": model["merges"],
        },
    }  # fmt: skip


def template(bos: str, id: int) -> Json:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def piece_json(family: Json) -> Json:
    """The tokenizer.json that says what a SentencePiece model does."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / f"{family['model']}.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    never = {token["content"] for token in family["tokens"] if token["content"].strip("▁\n")}
    tokens = []
    for token in family["tokens"]:
        tokens.append(token | {"id": vocab.get(token["content"], len(vocab))})
        vocab.setdefault(token["content"], len(vocab))
    first = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": family["normalizer"],
        "pre_tokenizer": family["cut"],
        "post_processor": template("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": [*decoders, *([first] if family["prefix"] != "" else [])]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: id for piece, id in vocab.items() if id < len(pieces)}, "merges": merges_of(pieces, never),
        },
    }  # fmt: skip


def write_folder(folder: Path, tokenizer: Json | None, settings: Json, model: str | None = None) -> Path:
    """A checkpoint folder with these files; model: name of a SentencePiece model to put beside."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if model:
        shutil.copy(DATA / f"{model}.model", folder / "tokenizer.model")
    return folder
