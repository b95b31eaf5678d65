"""GGUF images built byte by byte, so that tests can write what no writer would."""

from __future__ import annotations

import struct
from collections.abc import Sequence

STRING, ARRAY = 8, 9
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A length-prefixed string; `length` overrides the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    return struct.pack("<" + FORMS[kind], value)


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    """An array of already encoded items; `count` overrides the true one."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def kv(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def image(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; the counts are the true ones unless given."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    header = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def every_value_type(version: int = 3) -> bytes:
    """A valid file with each value type, arrays of each, nested arrays, and tensors of several types."""
    pairs = [kv(f"scalar.{kind}", kind, scalar(kind, 1)) for kind in FORMS]
    pairs += [kv(f"array.{kind}", ARRAY, array(kind, [scalar(kind, i % 2) for i in range(5)])) for kind in FORMS]
    pairs += [
        kv("general.architecture", STRING, string("llama")),
        kv("general.alignment", 4, scalar(4, 64)),
        kv("text", STRING, string("naïve 日本 😀")),
        kv("texts", ARRAY, array(STRING, [string(text) for text in ("", "a", "ß", "<|end|>")])),
        kv("empty.texts", ARRAY, array(STRING, [])),
        kv("empty.numbers", ARRAY, array(6, [])),
        kv(
            "nested",
            ARRAY,
            array(ARRAY, [array(5, [scalar(5, -1), scalar(5, 2)]), array(STRING, [string("x")])]),
        ),
    ]
    tensors = [
        tensor("a", (5, 3), 0, 0),  # F32, 60 bytes
        tensor("b", (32, 2), 8, 64),  # Q8_0, 68 bytes
        tensor("c", (256, 1, 1, 2), 14, 192),  # Q6_K, 420 bytes
    ]
    body = bytes(i % 251 for i in range(192 + 420))
    return image(pairs, tensors, body, version=version, alignment=64)
