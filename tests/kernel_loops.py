"""The innermost loops of a compiled kernel: how many instructions they have, and which, the longest first.

    python tests/kernel_loops.py matmul:Q4_0 [--with vpdpbusd] [--show 0]
    HOTCOLD_ISA=avx2 python tests/kernel_loops.py matmul:Q4_0

Divide by the weights of one round of a loop (their vpdpbusd or vpmaddubsw times 64 or 32, for one token) to have the
instructions a weight. `--show N` prints the N-th loop. A loop is a label, a jump back to it, and no label in between
that anybody jumps to.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter

_LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
_CODE = re.compile(r"^\s+([a-z]\w*)\b")


def loops(assembly: str) -> list[list[str]]:
    """The instructions of each innermost loop of a text in LLVM's AT&T syntax."""
    lines = [line.split("#")[0].rstrip() for line in assembly.splitlines()]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    back = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := _JUMP.match(line)) and labels.get(m[1], i) < i]
    innermost = [(a, b) for a, b in back if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in back)]
    return [[line for line in lines[a:b + 1] if _CODE.match(line)] for a, b in innermost]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--with", dest="wanted", default="v", help="list loops that have instructions so beginning")
    parser.add_argument("--show", type=int, help="print this loop")
    options = parser.parse_args()
    command = [sys.executable, "-m", "hotcold.runtime.cpu.compile", "--asm", options.kernel]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = [loop for loop in loops(text) if any(line.lstrip().startswith(options.wanted) for line in loop)]
    found.sort(key=len, reverse=True)
    for number, loop in enumerate(found):
        names = Counter(match[1] for line in loop if (match := _CODE.match(line)))
        spills = sum("%rsp" in line and line.lstrip().startswith("v") for line in loop)
        mix = ", ".join(f"{count} {name}" for name, count in names.most_common(12))
        print(f"{number}: {len(loop)} instructions{f', {spills} with the stack' if spills else ''}: {mix}")
    if options.show is not None:
        print("\n".join(found[options.show]))


if __name__ == "__main__":
    main()
