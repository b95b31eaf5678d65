"""`hotcold pull`: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import download_bar, human_bytes, note

Name = Annotated[str, typer.Argument(metavar="NAME", help="smollm2, hf:ORG/REPO/FILE.gguf, ORG/REPO:QUANT.")]


def pull(name: Name) -> None:
    """Fetch a model and print where it is."""
    from ..runtime import models

    with download_bar() as progress:
        path = models.pull(name, progress)
    note(f"{name}: {human_bytes(path.stat().st_size)}, ready for `hotcold chat {name}`")
    print(path)
