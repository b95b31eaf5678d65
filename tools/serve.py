"""`hotcold serve`: models behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..formats.errors import ParameterError, StorageError, UnsupportedError
from . import gpu, options

if TYPE_CHECKING:
    from ..runtime.llm import LLM

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="GGUF files, aliases or hf: references.")]
Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")]
Port = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free.")]
Keys = Annotated[
    list[str] | None,
    typer.Option("--api-key", metavar="KEY", help="Ask for this key; may be repeated. [env: HOTCOLD_API_KEY]"),
]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="A key a line.")]
Parallel = Annotated[int, typer.Option("--parallel", "-np", metavar="N", min=1, help="Answers at once.")]
Queue = Annotated[int, typer.Option("--queue", metavar="N", min=0, help="Requests that may wait; then status 429.")]
PerSequence = Annotated[
    int | None,
    typer.Option(
        "--ctx", "--ctx-size", "-c", metavar="N", min=0, max=2**31, help="Tokens of context an answer; 0: the model's."
    ),
]
Grace = Annotated[
    float, typer.Option("--grace", metavar="S", min=0.0, help="Seconds that running answers get when the server ends.")
]
Cors = Annotated[
    list[str] | None,
    typer.Option("--cors", metavar="ORIGIN", help="Let this origin's pages call (* for all); may be repeated."),
]
Alias = Annotated[
    list[str] | None, typer.Option("--alias", "-a", metavar="NAME", help="The models' names for clients, in order.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No key for a public address, and no look at Host and Origin.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line on stderr for each request.")]


def serve(
    models: Models,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: Keys = None,
    api_key_file: KeyFile = None,
    parallel: Parallel = 8,
    queue: Queue = 64,
    ctx: PerSequence = None,
    threads: options.Threads = None,
    sparsity: options.Sparsity = "auto",
    vram_budget: options.VramBudget = None,
    require_gpu: options.RequireGpu = False,
    cold: options.Cold = "auto",
    lookup: options.Lookup = 0,
    lora: options.Lora = None,
    load: options.Load = "auto",
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    grace: Grace = 30.0,
    cors: Cors = None,
    alias: Alias = None,
    insecure: Insecure = False,
    verbose: Verbose = False,
) -> None:
    """Serve models over HTTP, as OpenAI's API has it, with a page to chat at /."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError("serving needs FastAPI, uvicorn and prometheus-client: pip install 'hotcold[serve]'")
    from ..runtime.server.process import serve
    from ..runtime.server.service import Settings

    wanted = gpu.GPUOptions(vram_budget, require_gpu, cold)
    adapters = options.adapters(lora)
    more: dict[str, Any] = {"n_parallel": parallel, "n_queue": queue, "lookup": lookup, "load": load}
    more |= {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}

    def loader(model: str) -> Callable[[], AbstractContextManager[LLM]]:
        return lambda: gpu.open_llm(model, ctx, threads, sparsity, wanted, adapters, **more)

    settings = Settings(
        host=host, port=port, api_keys=keys(api_key or [], api_key_file), cors=tuple(cors or ()),
        insecure=insecure, grace=grace, verbose=verbose, n_queue=queue,
    )  # fmt: skip
    serve(
        {name: loader(model) for name, model in zip(names(models, alias or []), models, strict=True)},
        settings,
        lambda line: print(f"hotcold: {line}", flush=True),
    )


def names(models: list[str], aliases: list[str]) -> list[str]:
    """What clients call the models: their aliases, references as given, files by their names."""
    if len(aliases) > len(models):
        raise ParameterError(f"--alias: got {len(aliases)}, wanted at most one for each of {len(models)} models")
    found = aliases + [Path(m).stem if m.lower().endswith(".gguf") else m for m in models[len(aliases) :]]
    for name in found:
        if not name or found.count(name) > 1:
            raise ParameterError(f"--alias: got {name!r} for two models, wanted a name for each of them")
    return found


def keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """The API keys of the options, the file and the environment."""
    found = [*given, *filter(None, [os.environ.get("HOTCOLD_API_KEY")])]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"--api-key-file: {file}: {getattr(error, 'strerror', None) or error}") from None
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise ParameterError(f"--api-key-file: {file}: got no key, wanted one a line")
    for key in found:
        if not key.strip() or not key.isascii() or not key.isprintable():
            raise ParameterError("--api-key: got one that is empty or that no header carries, wanted printable ASCII")
    return tuple(found)
