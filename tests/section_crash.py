"""Kill processes that attach and detach at random moments, and look at what they leave (a script, and a test runs it).

    python tests/section_crash.py [--rounds 200] [--seed 0] [--folder DIR]

Each round a child changes one model's section in a loop until it is killed. Then the model must load with its own bytes
untouched, and its section must be whole, absent, or reported torn. Prints how often each was the case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import sections
from tiny import make_tiny_model

from hotcold.formats.config import ModelConfig
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, attach_section, detach_section, update_section

SIZES = (2, 64, 2048)
SETS = (("profile",), ("predictors", "down_t"), sections.PARTS, ("thresholds", "profile"))
LONGEST = 0.06  # seconds that a child runs


def change(model: Path, spare: Path, seed: int, started: Any) -> None:
    """The child: attach, replace, detach and move sections until the end."""
    rng = random.Random(seed)
    warnings.simplefilter("ignore")
    detach = {"nothing": {}, "to": {"to": spare}, "keep": {"keep_sidecar": True}}
    started.set()
    while True:
        number = rng.randrange(2**20)
        kind = rng.choice(["attach", "attach", "attach", "sidecar", "spare", "nothing", "to", "keep"])
        try:
            if kind in ("attach", "sidecar"):
                one = contents(number)
                update_section(model, one, sidecar=kind == "sidecar", drop=sections.PARTS)
            elif kind == "spare":
                if spare.exists():
                    attach_section(model, spare)
            else:
                detach_section(model, **detach[kind])
        except Exception as error:  # nothing to detach
            if "no section" not in str(error) and "nothing to keep" not in str(error):
                print(f"child: {error}", file=sys.stderr)


def contents(number: int) -> Contents:
    """The section of that number, which it carries in a key of its own."""
    made = sections.contents(*SETS[number % len(SETS)], seed=number, sizes=SIZES)
    return Contents({**made.metadata, "hotcold.number": number}, made.tensors)


def look(model: Path, base: bytes) -> str:
    """Check what a child left: whole, absent or torn; AssertionError for anything else."""
    with open(model, "rb") as raw:
        assert raw.read(len(base)) == base
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with GGUFFile(model) as file:
            ModelConfig.from_gguf(file)
            section = find_section(file)
            if section is None:
                return "torn" if said else "absent"
            with section:
                sections.assert_holds(section, contents(section.image.get("hotcold.number", 0, int)))
    assert not said, [str(one.message) for one in said]
    return "whole"


def run(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """`rounds` kills; returns how often the section was whole, absent or torn."""
    model = make_tiny_model(folder / "model.gguf", n_ff=SIZES[2])
    base, rng, seen = model.read_bytes(), random.Random(seed), Counter[str]()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    for number in range(rounds):
        started = context.Event()
        child = context.Process(target=change, args=(model, folder / "spare.gguf", seed * 10**6 + number, started))
        child.start()
        started.wait()
        time.sleep(rng.random() * LONGEST)
        child.kill()
        child.join()
        seen[look(model, base)] += 1
        seen["mid-change"] += (folder / ".hotcold-model.gguf.part").exists() or (
            (folder / "hotcold-model.gguf").exists() and model.stat().st_size > len(base)
        )
    update_section(model, contents(0))  # nothing that they left is in the way
    detach_section(model)
    assert model.read_bytes() == base
    left = {path.name for path in folder.iterdir()} - {"spare.gguf", ".spare.gguf.part"}
    assert left <= {"model.gguf", ".hotcold-model.gguf.lock"}, left
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="kills [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is attached [%(default)s]")
    parser.add_argument("--folder", type=Path, help="work here, on this file system [a temporary folder]")
    options = parser.parse_args()
    import gguf  # noqa: F401  # once here, not in every child

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seen = run(Path(folder), options.rounds, options.seed)
    print(
        f"{options.rounds} kills: "
        + ", ".join(f"{seen[kind]} {kind}" for kind in ("whole", "absent", "torn", "mid-change"))
    )


if __name__ == "__main__":
    main()
