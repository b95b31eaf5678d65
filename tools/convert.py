"""`hotcold convert`: Hugging Face checkpoints, and PowerInfer's, to ordinary GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console, options
from .console import StatusLine, download_bar, human_bytes, note

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A folder with a Hugging Face checkpoint, or a *.powerinfer.gguf file.")
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


def convert(source: Source, out: Out = None, kind: Kind = None, threads: options.Threads = None) -> None:
    """Turn a Hugging Face checkpoint, or one of PowerInfer's files, into a GGUF model."""
    if Path(source).is_dir():
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
