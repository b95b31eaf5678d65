"""`hotcold convert`: Hugging Face checkpoints, PowerInfer's files, and models with adapters to ordinary GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console, options
from .console import StatusLine, download_bar, human_bytes, note

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A folder with a Hugging Face checkpoint, a *.powerinfer.gguf file, or with --lora any GGUF model.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Argument(
        metavar="[OUT.gguf]", help="File to write, replaced if it is there; or a folder for it.", show_default=False
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q4_k_m ...; by default the checkpoint's own.",
        show_default=False,
    ),
]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="OUT.gguf", help="The same as the second argument.", show_default=False),
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[=SCALE]", help="Merge a LoRA adapter (GGUF); may be given several times."),
]


def convert(
    source: Source,
    out: Out = None,
    out_file: OutFile = None,
    kind: Kind = None,
    lora: Lora = None,
    threads: options.Threads = None,
) -> None:
    """Turn a Hugging Face checkpoint, or one of PowerInfer's files, into a GGUF model; or merge adapters into one."""
    if out is not None and out_file is not None:
        raise typer.BadParameter("the file to write is given twice", param_hint="--out")
    out = out or out_file
    if lora:
        _merge(source, out, lora, kind, threads)
    elif Path(source).is_dir():
        _hugging_face(Path(source), out, kind, threads)
    else:
        _powerinfer(source, out, kind)


def _hugging_face(folder: Path, out: Path | None, kind: str | None, threads: int | None) -> None:
    from ..solver.convert import convert as convert_folder

    status = StatusLine()
    with download_bar() as progress:
        done = convert_folder(folder, out, kind, progress, threads, status)
    status.clear()
    for text in done.notes:
        note(text)
    note(f"{done.config.arch}, {done.mix.name}, {human_bytes(done.path.stat().st_size)}")
    print(done.path)


def _powerinfer(source: str, out: Path | None, kind: str | None) -> None:
    from ..formats import powerinfer_convert
    from ..formats.architectures import lookup
    from ..formats.errors import ParameterError

    path = console.find_model(source)
    if kind is not None:
        raise ParameterError("--type: is for Hugging Face checkpoints; a PowerInfer file keeps its types")
    if out is None:
        raise ParameterError("OUT.gguf: got nothing, wanted the file to write")
    with download_bar() as progress:
        config = powerinfer_convert.convert(path, out, progress)
    note(f"{human_bytes(out.stat().st_size)}; ffn_down_t and the predictors are in the section (`hotcold section`)")
    if (usual := lookup(config.arch).activation) != config.activation:
        note(f"llama.cpp would run it with {usual} and give nonsense; it is a {config.activation} model")
    else:
        note(f"llama.cpp does not know the architecture {config.arch}")
    print(out)


def _merge(source: str, out: Path | None, lora: list[str], kind: str | None, threads: int | None) -> None:
    from ..formats.errors import ParameterError
    from ..formats.mixes import fallen_note
    from ..runtime.merge import merge

    if Path(source).is_dir():
        raise ParameterError("--lora: is for GGUF models; convert the checkpoint first")
    path = console.find_model(source)
    if out is None:
        raise ParameterError("OUT.gguf: got nothing, wanted the file to write")
    status = StatusLine()
    with download_bar() as progress:
        report = merge(path, options.adapters(lora), out, kind, threads, progress, status)
    status.clear()
    types = ", ".join(f"{n} {name}" for name, n in report.types.items())
    note(f"{human_bytes(out.stat().st_size)}; changed matrices: {types}")
    if report.fallen:
        note(fallen_note(report.fallen))
    if report.unwritable:
        note(f"Q8_0 stands in for {', '.join(sorted(report.unwritable))}, which nothing here encodes; --type chooses")
    if report.section:
        note(f"the section of {path.name} is not carried over, as it belongs to the old weights")
    if report.relufied:
        note(
            "a ReLU model, with ffn_down by neurons in its section; llama.cpp cannot run it, or would run it with SiLU"
        )
    print(out)
