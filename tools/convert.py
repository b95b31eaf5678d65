"""`hotcold convert`: PowerInfer's checkpoints to ordinary GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .console import download_bar, human_bytes, note

Source = Annotated[str, typer.Argument(metavar="SRC.powerinfer.gguf", help="A checkpoint of PowerInfer's.")]
Out = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write; replaced if it is there.")]


def convert(source: Source, out: Out) -> None:
    """Turn one of PowerInfer's checkpoints into a GGUF model with a section."""
    from ..formats import powerinfer_convert

    path = console.find_model(source)
    with download_bar() as progress:
        config = powerinfer_convert.convert(path, out, progress)
    note(f"{human_bytes(out.stat().st_size)}; ffn_down_t and the predictors are in the section (`hotcold section`)")
    if config.arch == "llama":
        note(f"llama.cpp would run it with SiLU and give nonsense; it is a {config.activation} model")
    else:
        note(f"llama.cpp does not know the architecture {config.arch}")
    print(out)
