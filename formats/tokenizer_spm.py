"""SentencePiece BPE ("llama"): the model file is rebuilt from tokens, scores and types."""

from __future__ import annotations

import re

import numpy as np

from .tokenizer import BYTE, CONTROL, NORMAL, UNDEFINED, UNKNOWN, Vocabulary

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_BPE = 2  # TrainerSpec.ModelType


class SentencePiece:
    """A `Codec` for tokenizer.ggml.model "llama"."""

    add_bos = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as schema

        metadata, count = vocabulary.metadata, len(vocabulary.tokens)
        if not vocabulary.typed:
            raise metadata.error("token_type", "nothing", "an array of types, one for each token")
        scores = metadata.numbers("scores", count, "fiu")
        if scores is None:
            raise metadata.error("scores", "nothing", "an array of scores, one for each token")
        if not np.isfinite(scores).all():
            raise metadata.error("scores", "a value that is not finite", "finite numbers")
        self.space_prefix = metadata.flag("add_space_prefix", True)
        types = self._checked_types(vocabulary)
        proto = schema.ModelProto()
        for token, score, kind in zip(vocabulary.tokens, scores.tolist(), types, strict=True):
            proto.pieces.add(piece=token, score=score, type=kind)
        proto.trainer_spec.model_type = _BPE
        proto.trainer_spec.byte_fallback = BYTE in types
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = self.space_prefix
        proto.normalizer_spec.remove_extra_whitespaces = False
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except RuntimeError as error:
            raise metadata.error("tokens", " ".join(str(error).split()), "a valid SentencePiece model") from None

    @staticmethod
    def _checked_types(vocabulary: Vocabulary) -> list[int]:
        """Types as SentencePiece wants them: exactly one unknown token, and all bytes or none."""
        metadata, tokens = vocabulary.metadata, vocabulary.tokens
        types = [NORMAL if kind == UNDEFINED else kind for kind in vocabulary.types]
        unknown = metadata.token_id("unknown_token_id", len(tokens))
        unknowns = [i for i, kind in enumerate(types) if kind == UNKNOWN]
        if unknown is None:
            unknown = unknowns[0] if unknowns else 0
        for i in unknowns:
            types[i] = CONTROL
        types[unknown] = UNKNOWN
        found = {token.upper() for token, kind in zip(tokens, types, strict=True) if kind == BYTE}
        wanted = {f"<0X{byte:02X}>" for byte in range(256)}
        if found and found != wanted:
            odd = sorted(found ^ wanted)[0]
            raise metadata.error("tokens", f"{len(found)} byte tokens (see {odd})", "<0x00> to <0xFF>, or none")
        return types

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self._processor.encode(text)

    def token_bytes(self, token: str, kind: int) -> bytes:
        """Bytes of a token: the byte that it names, or its text with U+2581 as space."""
        if kind == BYTE and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode("utf-8", "replace")
