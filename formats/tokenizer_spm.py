"""SentencePiece BPE ("llama"): the model file is rebuilt from tokens, scores and types."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    OWN_SPACE_PREFIX,
    SPACE_PREFIXES,
    UNDEFINED,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
)

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class SentencePiece:
    """A `Codec` for tokenizer.ggml.model "llama"."""

    add_bos = True
    marks_spaces = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as schema

        metadata = vocabulary.metadata
        if not vocabulary.typed:
            raise metadata.error("token_type", "nothing", "an array of types, one for each token")
        scores = metadata.numbers("scores", len(vocabulary), "fiu")
        if scores is None:
            raise metadata.error("scores", "nothing", "an array of scores, one for each token")
        if not (abs(scores) < np.finfo(np.float32).max).all():
            raise metadata.error("scores", "a score that is infinite or no number", "finite scores")
        types = _piece_types(vocabulary)
        self.space_prefix = metadata.flag("add_space_prefix", True)
        self._prefix = metadata.text(OWN_SPACE_PREFIX, "each") if self.space_prefix else "each"
        if self._prefix not in SPACE_PREFIXES:
            raise metadata.error(OWN_SPACE_PREFIX, self._prefix, " or ".join(SPACE_PREFIXES))
        proto: Any = vars(schema)["ModelProto"]()  # protobuf makes its classes when imported
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        proto.trainer_spec.byte_fallback = BYTE in types
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = self.space_prefix and self._prefix == "each"
        proto.normalizer_spec.remove_extra_whitespaces = metadata.flag("remove_extra_whitespaces", False)
        swallows = proto.normalizer_spec.remove_extra_whitespaces
        self.longest: int | None = None if swallows else max(map(len, vocabulary.tokens), default=0)
        try:
            for token, score, kind in zip(vocabulary.tokens, scores.tolist(), types, strict=True):
                proto.pieces.add(piece=token, score=score, type=kind)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except (RuntimeError, ValueError) as error:
            raise metadata.error("tokens", error, "pieces of a SentencePiece model") from None

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text without special tokens."""
        if self._prefix != "each" and text[:1] not in (" ", "\u2581") and (first or self._prefix.startswith("each")):
            text = " " + text
        return self._processor.encode(text)

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes of a token: the byte that it names, or its text with U+2581 as space."""
        if kind == BYTE and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode("utf-8", "replace")


def _piece_types(vocabulary: Vocabulary) -> list[int]:
    """Types as SentencePiece wants them: one unknown token, and all 256 bytes or none."""
    # User-defined tokens are cut out of the text before SentencePiece sees it, so they need no place there.
    plain = {UNDEFINED: NORMAL, USER_DEFINED: CONTROL, UNKNOWN: CONTROL}
    types = [plain.get(kind, kind) for kind in vocabulary.types]
    unknown = vocabulary.metadata.token_id("unknown", len(types))
    if unknown is None:
        unknown = next(iter(vocabulary.special(UNKNOWN).values()), 0)
    types[unknown] = UNKNOWN
    found = {token for token, kind in zip(vocabulary.tokens, types, strict=True) if kind == BYTE}
    if found and found != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise vocabulary.metadata.error(
            "token_type", f"{len(found)} byte tokens", "none, or the 256 tokens <0x00> to <0xFF>"
        )
    return types
