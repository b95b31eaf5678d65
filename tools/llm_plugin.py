"""hotcold's models in the `llm` command (https://llm.datasette.io): `llm -m hotcold:smollm2 "..."`; the extra `llm`.

Every llm beside which hotcold is installed imports this file at its start, older ones too: so it takes no time, and
the models themselves (llm_models.py) come later, with what they need of llm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import llm

from ..formats.errors import HotcoldError
from ..runtime import hub, models
from .console import find_model

PREFIX = "hotcold:"


def list_file() -> Path:
    """The models that `llm hotcold add` named: a JSON object of name -> path or reference."""
    return Path(llm.user_dir()) / "hotcold.json"


def added() -> dict[str, str]:
    """What that file says; nothing, and a line on stderr, where it cannot be read."""
    try:
        found = json.loads(list_file().read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(model, str) for model in found.values()):
            raise ValueError("wanted an object of names and paths")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"hotcold: {list_file()}: {error}", file=sys.stderr)
        return {}


def known() -> dict[str, str]:
    """Names without the prefix -> what hotcold opens: aliases, files fetched already, and those that were added."""
    if not hasattr(llm.Prompt, "messages"):
        print("hotcold: this llm is too old, wanted 0.32 or later; run `pip install -U llm`", file=sys.stderr)
        return {}
    names = [*models.ALIASES, *hub.references(models.home() / "hub")]
    return {**{name: name for name in names}, **added()}


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """A chat model for each, also as an async one."""
    for name, model in known().items():
        from .llm_models import AsyncChat, Chat

        register(Chat(PREFIX + name, model), AsyncChat(PREFIX + name, model))


@llm.hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """Any model gives embeddings; those made for it give better ones."""
    for name, model in known().items():
        from .llm_models import Embedding

        register(Embedding(PREFIX + name, model))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """`llm hotcold add|remove|list`."""

    @cli.group(name="hotcold")
    def group() -> None:
        """Say which GGUF models llm shall know under hotcold:NAME."""

    @group.command()
    @click.argument("model")
    @click.option("--name", help="What to call it; default: the file's name, or the reference.")
    def add(model: str, name: str | None) -> None:
        """Add a GGUF file, or a Hugging Face reference such as hf:ORG/REPO/FILE.gguf or ORG/REPO:Q4_K_M."""
        path = Path(model).expanduser()
        try:
            if path.is_file():
                name, model = name or path.stem, str(path.absolute())
            else:
                find_model(model)  # fetched now, rather than in the midst of a first prompt
        except HotcoldError as error:
            raise click.ClickException(str(error)) from error
        _write({**added(), name or model: model})
        click.echo(f"{PREFIX}{name or model}")

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget a name that was added; the file stays."""
        names = added()
        if names.pop(name.removeprefix(PREFIX), None) is None:
            raise click.ClickException(f"{name}: was not added; added are: {', '.join(names) or 'none'}")
        _write(names)

    @group.command(name="list")
    def show() -> None:
        """Show the names and what they stand for."""
        for name, model in known().items():
            click.echo(f"{PREFIX}{name}" + ("" if name == model else f"  {model}"))


def _write(names: dict[str, str]) -> None:
    list_file().parent.mkdir(parents=True, exist_ok=True)
    list_file().write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
