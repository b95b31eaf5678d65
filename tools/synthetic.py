"""`hotcold synthesize`: write a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..formats.errors import ParameterError
from ..solver.synthetic import TYPES, Shape, write_model
from ..solver.synthetic_relu import ReluWeights
from .console import download_bar, human_bytes, note


def synthesize(
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write; replaced if it is there.")],
    type: Annotated[str, typer.Option("--type", help=f"Tensor type: {', '.join(TYPES)}.")] = "Q4_0",
    n_embd: Annotated[int, typer.Option("--n-embd", help="Width of the residual stream.")] = 4096,
    n_ff: Annotated[int, typer.Option("--n-ff", help="Neurons of a feed-forward network.")] = 11008,
    n_layer: Annotated[int, typer.Option("--n-layer", help="Layers.")] = 8,
    n_head: Annotated[int, typer.Option("--n-head", help="Attention heads.")] = 32,
    n_head_kv: Annotated[int | None, typer.Option("--n-head-kv", help="Key/value heads [n-head].")] = None,
    n_vocab: Annotated[int, typer.Option("--n-vocab", help="Tokens of the vocabulary.")] = 32000,
    experts: Annotated[int, typer.Option("--experts", help="Experts of a layer, each of n-ff neurons.")] = 0,
    used: Annotated[int, typer.Option("--experts-used", help="Experts that compute a token.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights.")] = 0,
    active: Annotated[
        float | None,
        typer.Option("--active", help="Make a ReLU model, with predictors, in which this share of neurons is active."),
    ] = None,
    skew: Annotated[
        float, typer.Option("--skew", help="Of a ReLU model: the power of a neuron's rank by which activity falls.")
    ] = 0.8,
    rank: Annotated[int, typer.Option("--rank", help="Of a ReLU model: rank of its predictors.")] = 1024,
) -> None:
    """Write a llama model with random weights, to measure speed with."""
    if (kind := TYPES.get(type.upper())) is None:
        raise ParameterError(f"--type: got {type!r}, wanted one of {', '.join(TYPES)}")
    n_head_kv = n_head if n_head_kv is None else n_head_kv
    shape = Shape(kind, n_embd, n_ff, n_layer, n_head, n_head_kv, n_vocab, experts, used)
    if experts and active is not None:
        raise ParameterError("--active: is for models without experts")
    relu = None if active is None else ReluWeights(shape, active, skew, rank, seed)
    with download_bar() as progress:
        write_model(out, shape, seed, progress, relu)
    note(f"{human_bytes(out.stat().st_size)}; norms are F32, all else (output.weight too) is {kind.name}")
    print(out)
