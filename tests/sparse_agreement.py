"""How far exact mode is from dense on a model: greedy tokens, logits in F32, perplexity as the file is.

Not a test of the suite: `python tests/sparse_agreement.py MODEL.gguf TEXT` takes minutes. MODEL has an activation with
zeros. For the comparison in F32 it is rewritten, dequantised, to a temporary file beside it, without a section.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from hotcold import Engine
from hotcold.formats.tokenizer import load_tokenizer


def in_f32(source: Path, to: Path) -> None:
    """The same model with all tensors in F32."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(to, arch)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(path: Path, sparsity: str, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """n greedy tokens, and the logits that each was chosen from: float32 [n, n_vocab]."""
    with Engine(path, n_ctx=len(prompt) + n, sparsity=sparsity) as engine:
        sequence = engine.new_sequence()
        rows = [np.array(engine.eval(sequence, prompt)[0])]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < n:
            rows.append(np.array(engine.eval(sequence, tokens[-1:])[0]))
            tokens.append(int(rows[-1].argmax()))
    return tokens, np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--tokens-scored", type=int, default=8192, help="for the perplexity")
    arguments = parser.parse_args()
    with Engine(arguments.model, n_ctx=32, sparsity="dense") as engine:
        tokenizer = load_tokenizer(engine.file)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8", errors="replace"))
    floats = arguments.model.with_name(f".{arguments.model.stem}.{os.getpid()}.f32.gguf")
    try:
        in_f32(arguments.model, floats)
        (dense, wanted), (exact, got) = (
            greedy(floats, mode, ids[:32], arguments.tokens) for mode in ("dense", "exact")
        )
    finally:
        floats.unlink(missing_ok=True)
    same = sum(a == b for a, b in zip(dense, exact, strict=True))
    error = np.abs(got - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    print(
        f"F32: {same} of {len(dense)} greedy tokens the same, logits apart by {error.max():.1e} of the largest at most"
    )
    dense_nll, exact_nll = (
        token_by_token(arguments.model, mode, ids[: arguments.tokens_scored]) for mode in ("dense", "exact")
    )
    apart = exact_nll - dense_nll
    change, error = np.expm1(apart.mean()), apart.std() / len(apart) ** 0.5
    print(
        f"as it is, token by token: perplexity dense {np.exp(dense_nll.mean()):.4f}, exact "
        f"{np.exp(exact_nll.mean()):.4f}: {change:+.3%} +/- {error:.3%} over {len(apart)} tokens"
    )


def token_by_token(path: Path, sparsity: str, ids: list[int]) -> np.ndarray:
    """Negative log-likelihoods in windows of 512 tokens, one by one: exact mode then takes its sparse branch."""
    nll = []
    with Engine(path, n_ctx=512, sparsity=sparsity) as engine:
        for start in range(0, len(ids) - 511, 512):
            sequence = engine.new_sequence()
            for token, following in zip(ids[start : start + 511], ids[start + 1 : start + 512], strict=True):
                row = engine.eval(sequence, [token])[0].astype(np.float64)
                nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[following])
            sequence.close()
    return np.array(nll)


if __name__ == "__main__":
    main()
