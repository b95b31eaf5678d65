"""The vocabularies of tests/tokenizers as tokenizers of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hotcold.formats.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "tokenizers"
CONTROL = ["<s>", "</s>", "<|im_end|>", "[TOOL_CALLS]"]
USER_DEFINED = ["<tool_call>", "</tool_call>"]


def byte_level() -> Tokenizer:
    """Byte-level BPE; two tokens end an answer."""
    data = json.loads((DATA / "byte_level.json").read_text(encoding="utf-8"))
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    keys = {"model": "gpt2", "pre": "gpt-2", "merges": data["merges"]}
    return _load(keys, tokens, [1] * len(tokens))


def sentencepiece(name: str = "sentencepiece") -> Tokenizer:
    """SentencePiece BPE with byte fallback; name: the file, "spaces" puts no space in front of a text."""
    from sentencepiece import SentencePieceProcessor

    source = SentencePieceProcessor(model_file=str(DATA / f"{name}.model"))
    ids = range(source.vocab_size())
    is_kinds = ((source.is_unknown, 2), (source.is_control, 3), (source.is_byte, 6))
    types = [next((kind for is_kind, kind in is_kinds if is_kind(i)), 1) for i in ids]
    tokens = [source.id_to_piece(i) for i in ids]
    renamed = [f"<was{i}>" if token in (*CONTROL, *USER_DEFINED) else token for i, token in enumerate(tokens)]
    scores = np.array([source.get_score(i) for i in ids] + [0.0] * (len(CONTROL) + len(USER_DEFINED)), np.float32)
    prefix = name == "sentencepiece"
    return _load({"model": "llama", "scores": scores, "add_space_prefix": prefix}, renamed, types)


def _load(keys: dict[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    tokens = [*tokens, *CONTROL, *USER_DEFINED]
    kinds = [*types, *[3] * len(CONTROL), *[4] * len(USER_DEFINED)]
    keys = {**keys, "tokens": tokens, "token_type": np.array(kinds, np.int32)}
    keys |= {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>")}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return load_tokenizer(SimpleNamespace(metadata=metadata, path="test.gguf"))
