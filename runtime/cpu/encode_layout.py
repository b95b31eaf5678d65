"""Sizes and argument records of the kernels that write files, shared with the Python side; imports no Numba."""

from __future__ import annotations

from .layout import arguments

ENCODE_SCRATCH = 6144  # bytes a thread
DECODE_WORST = 128  # bytes a thread: the largest weight's bits, then room for a vector of them

# Rows of k weights, each row_bytes long, to float32 [rows, k]; worst: DECODE_WORST bytes a thread.
Decode = arguments("Decode", "w out k rows row_bytes worst")
# x: float32 [rows, k]; importance: float32 [k], or 0 for none.
Encode = arguments("Encode", "x out k rows importance scratch scratch_bytes")
