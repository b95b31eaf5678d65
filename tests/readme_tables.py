"""The README's tables of families and tensor types, made from the code's own tables.

Run by hand to bring README.md up to date; tests/unit/test_readme.py checks that it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from hotcold.formats.architecture_terms import EXPERTS, Architecture
from hotcold.formats.architectures import ARCHITECTURES
from hotcold.formats.mixes import MIXES
from hotcold.formats.types import GGMLType
from hotcold.runtime.cpu.buffers import GROUPS
from hotcold.runtime.cuda.repack import KINDS
from hotcold.runtime.encode import ENCODED
from hotcold.runtime.sparsity import ZEROS

README = Path(__file__).parent.parent / "README.md"
_FIVE = "|" + "---|" * 5
_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "gelu_erf": "GELU", "relu": "ReLU", "relu2": "ReLU²", "drelu": "dReLU"}


def families() -> str:
    """One row an architecture: models, Hugging Face's classes, feed-forward network, sparse modes."""
    lines = ["| architecture | models | converted from | feed-forward network | sparse modes |", _FIVE]
    for name, row in ARCHITECTURES.items():
        classes = ", ".join(f"`{found}`" for found in (*row.hf.classes, *row.hf.wrapped))
        modes = "exact, threshold, predict" if row.activation in ZEROS else "threshold, predict"
        if set(map(str, row.ffn)) == {str(EXPERTS)}:
            modes = "by expert"
        lines.append(f"| `{name}` | {row.models} | {classes} | {_ffn(row)} | {modes} |")
    return "\n".join(lines)


def _ffn(row: Architecture) -> str:
    kind = f"{_ACTIVATIONS[row.activation]}{', gated' if row.gated else ''}"
    if EXPERTS in row.ffn:
        return f"experts, {kind}" if len(row.ffn) == 1 else f"{kind}; or experts"
    return kind


def types() -> str:
    """One row a tensor type: its size, who computes it, whether it can be written."""
    lines = ["| type | bits a weight | CPU | GPU | `convert`, `quantize` |", _FIVE]
    for kind in GROUPS:
        size = GGMLType[kind]
        bits = 8 * size.type_size / size.block_size
        marks = ["yes" if kind in known else "" for known in (GROUPS, KINDS, ENCODED)]
        lines.append(f"| {kind} | {bits:g} | {' | '.join(marks)} |")
    lines.append("")
    mixes = ", ".join(mix for mix in MIXES if mix not in GROUPS)
    lines.append(f"Mixes of them that `convert --type` and `quantize` write, as llama.cpp's of these names: {mixes}.")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README with both tables as they are today."""
    for name, table in (("families", families()), ("types", types())):
        begin, end = f"<!-- {name}: made by tests/readme_tables.py -->\n", f"\n<!-- end of {name} -->"
        text, n = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + table + end, text, flags=re.S)  # noqa: B023
        assert n == 1, name
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
