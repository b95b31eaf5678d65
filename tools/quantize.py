"""`hotcold quantize`: a model's matrices in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console, options
from .console import StatusLine, download_bar, human_bytes, note

if TYPE_CHECKING:
    from ..formats.types import GGMLType
    from ..solver.quantize import Report

Source = Annotated[str, typer.Argument(metavar="IN.gguf", help="The model, best in F16, BF16 or F32.")]
Out = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write; replaced if it is there.")]
Type = Annotated[str, typer.Argument(metavar="TYPE", help="Q4_K_M, Q5_K_M, Q6_K, Q8_0, Q4_0, ...; BF16, F16, F32.")]
Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance of columns, from llama-imatrix.")
]
Again = Annotated[bool, typer.Option("--allow-requantize", help="Quantise what is quantised already.")]
Pure = Annotated[bool, typer.Option("--pure", help="One type for all matrices.")]
OutputType = Annotated[
    str | None, typer.Option("--output-tensor-type", "--output-type", metavar="T", help="Type of output.weight.")
]
EmbeddingType = Annotated[
    str | None, typer.Option("--token-embedding-type", metavar="T", help="Type of token_embd.weight.")
]


def quantize(
    source: Source,
    out: Out,
    type: Type,
    imatrix: Imatrix = None,
    allow_requantize: Again = False,
    pure: Pure = False,
    output_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    threads: options.Threads = None,
) -> None:
    """Write a model with its matrices in another type, such as Q4_K_M."""
    from ..solver import quantize as library

    wanted = library.Options(
        allow_requantize,
        pure,
        _kind("--output-tensor-type", output_type),
        _kind("--token-embedding-type", token_embedding_type),
        threads,
    )
    path = console.find_model(source)
    status = StatusLine()
    with download_bar() as progress:
        report = library.quantize(path, out, type, wanted, imatrix, progress, status)
    status.clear()
    _explain(path, report)
    print(out)


def _kind(option: str, name: str | None) -> GGMLType | None:
    from ..formats.errors import ParameterError
    from ..formats.types import GGMLType
    from ..runtime.encode import ENCODED

    if name is None:
        return None
    if name.upper() not in ENCODED:
        raise ParameterError(f"{option}: got {name!r:.30}, wanted one of {', '.join(ENCODED)}")
    return GGMLType[name.upper()]


def _explain(path: Path, report: Report) -> None:
    from ..formats.mixes import fallen_note

    before, after, count = report.bytes_before, report.bytes_after, report.n_weights
    note(
        f"{report.mix.name}: {human_bytes(before)} ({8 * before / count:.2f} bits a weight) -> {human_bytes(after)} "
        f"({8 * after / count:.2f} bits a weight); {', '.join(f'{n} {kind}' for kind, n in report.types.items())}"
    )
    if report.fallen:
        note(fallen_note(report.fallen))
    if report.unweighted:
        names = ", ".join(report.unweighted[:3]) + (", ..." if len(report.unweighted) > 3 else "")
        note(f"no entry in the imatrix for {len(report.unweighted)} tensors: {names}")
    if report.section:
        note(f"the section of {path.name} is not carried over, as it belongs to the old weights")
