"""`hotcold train-predictor`: small predictors of active neurons for a model, and what they cost."""

from __future__ import annotations

import importlib.util
import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..formats.errors import ParameterError, UnsupportedError
from . import console, offline, options
from .console import human_bytes, note

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from ..formats.gguf import GGUFFile
    from ..formats.section_file import SectionTensor
    from ..runtime.engine import Engine
    from ..solver.predictor import Trained
    from ..solver.predictor_train import Plan, Split
    from ..solver.recording import Recording

TOKENS, MIN_TOKENS = 65_536, 256
JUDGED, CUTS = 8192, 6144  # held-out tokens
JUDGED_SHARE, CUTS_SHARE = 0.2, 0.15  # of the text, at most


class Kind(str, Enum):
    """b . relu(a . x), or without the relu and of rank 1000, as in Deja Vu."""

    relu = "relu"
    dejavu = "dejavu"


class Stored(str, Enum):
    """Types in which predictors can be stored."""

    q8_0 = "Q8_0"
    q4_0 = "Q4_0"
    f16 = "F16"


KindOption = Annotated[Kind, typer.Option("--kind", help="relu, or dejavu for comparison.")]
Recall = Annotated[
    float, typer.Option("--recall", metavar="R", help="Share of the active neurons to be found, at least.")
]
Energy = Annotated[
    float,
    typer.Option("--energy", metavar="E", help="Share of the squared output to be found; less is faster, less exact."),
]
Epochs = Annotated[float, typer.Option("--epochs", min=0.01, metavar="N", help="Times to go through the text.")]
StoredOption = Annotated[Stored, typer.Option("--type", case_sensitive=False, help="Type to store predictors in.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", min=64, metavar="N", help="Use the first N tokens.")]
Threshold = Annotated[
    float | None,
    typer.Option("--threshold", metavar="D", help="Predict what exceeds the section's thresholds for the density D."),
]
NoPerplexity = Annotated[bool, typer.Option("--no-perplexity", help="Do not measure perplexity.")]


def train_predictor(
    model: options.Model,
    texts: offline.Texts = None,
    kind: KindOption = Kind.relu,
    recall: Recall = 0.95,
    energy: Energy = 0.99995,
    tokens: Tokens = TOKENS,
    epochs: Epochs = 2.0,
    stored: StoredOption = Stored.q8_0,
    threshold: Threshold = None,
    no_perplexity: NoPerplexity = False,
    sidecar: offline.Sidecar = False,
    dry_run: offline.DryRun = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train predictors of active neurons and put them into the model's section."""
    for name, value in (("--recall", recall), ("--energy", energy)):
        if not 0 < value < 1:
            raise ParameterError(f"{name}: got {value:g}, wanted a number between 0 and 1, such as 0.95")
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("train-predictor needs PyTorch: pip install 'hotcold[train]'")
    from ..formats.gguf import GGUFFile
    from ..formats.section_file import Contents
    from ..formats.tokenizer import load_tokenizer
    from ..formats.types import GGMLType
    from ..solver import corpus, predictor, recording
    from ..solver.predictor_train import Plan

    path = console.find_model(model)
    with GGUFFile(path) as file:
        text = corpus.load(texts or [], load_tokenizer(file), tokens)
    if len(text) < MIN_TOKENS:
        raise ParameterError(f"{text.name}: got {len(text)} tokens, wanted at least {MIN_TOKENS}, better {TOKENS}")
    known, held_out = text.split(min(JUDGED, int(len(text) * JUDGED_SHARE)))
    with console.open_engine(str(path), None, threads, "dense", use_section=False) as engine:
        config = engine.config
        if config.n_expert:
            what = f"{path}: the router of a mixture of experts says which neurons are needed"
            raise UnsupportedError(f"{what}; `hotcold train-predictor` is for models without experts")
        plan = Plan(kind.value, recall, energy, epochs, GGMLType[stored.value], _limits(engine, threshold))
        _check_sizes(config, plan)
        note(f"{human_bytes(recording.nbytes(config, len(text)))} of FFN inputs go into a temporary file")
        with recording.Recording(config, len(text)) as recorded:
            with offline.token_bar("recording, tokens", len(text)) as progress:
                recorded.run(engine, known, progress)
                recorded.run(engine, held_out, progress)
            before = None if no_perplexity else offline.perplexity(engine, held_out)
            layers = _train(engine.file, config, recorded, _split(len(known), len(held_out)), plan)
        weights = sum(np.prod(info.shape, dtype=np.int64) for info in engine.file.tensors.values())
        model_bytes = sum(info.nbytes for info in engine.file.tensors.values())
    report = _report(layers, config, plan, int(weights), model_bytes)
    report |= {"model": model, "dataset": text.name, "tokens": len(known), "held_out": len(held_out)}
    report |= {"perplexity_dense": before, "perplexity": None}
    if not dry_run:
        with GGUFFile(path) as file:
            made = predictor.contents(layers, plan.kind, plan.stored, config.n_embd)
            offline.save(path, Contents(made.metadata, made.tensors + _down_t(file, config)), sidecar)
        if not no_perplexity:
            with console.open_engine(str(path), None, threads, "predict") as engine:
                report["perplexity"] = offline.perplexity(engine, held_out)
    elif not no_perplexity:
        note("perplexity with predictors is measured once they are saved, without --dry-run")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)


def _limits(engine: Engine, density: float | None) -> np.ndarray | None:
    """The section's thresholds for a density; None for a model whose neurons are exactly zero, or not."""
    from ..formats.section import find_section
    from ..solver.neurons import RELUS

    activation = engine.config.activation
    if density is None:
        if activation not in RELUS:
            got = f"one with {activation.upper()}, whose neurons are never zero"
            raise ParameterError(f"model: got {got}; wanted a ReLU model, or --threshold D after `hotcold sparsify`")
        return None
    section = find_section(engine.file, engine.config)
    if section is not None:
        with section:
            known = section.thresholds()
            if known is not None:
                at = np.flatnonzero(np.isclose(known.densities, density, atol=1e-6))
                if at.size:
                    return np.array(known.values[at[0]])
    raise ParameterError(f"--threshold: got {density:g}, wanted a density that `hotcold sparsify` has prepared")


def _down_t(file: GGUFFile, config: ModelConfig) -> list[SectionTensor]:
    """What the engine would otherwise make at every load; nothing where the section has it."""
    from ..formats.section import find_section
    from ..solver import transpose

    section = find_section(file, config)
    if section is not None:
        with section:
            if section.has_down_t():
                return []
    return transpose.contents(file, config).tensors


def _check_sizes(config: ModelConfig, plan: Plan) -> None:
    block = plan.stored.block_size
    if config.n_embd % block:
        raise ParameterError(f"--type: got {plan.stored.name}, wanted F16: {config.n_embd} is no multiple of {block}")


def _split(known: int, held_out: int) -> Split:
    from ..solver.predictor_train import Split

    cuts = min(CUTS, max(1, int(known * CUTS_SHARE)))
    return Split(known - cuts, cuts, held_out)


def _train(file: GGUFFile, config: ModelConfig, recorded: Recording, split: Split, plan: Plan) -> list[Trained]:
    from ..solver.predictor_train import train_all

    status = console.StatusLine()

    def progress(layer: int, what: str) -> None:
        status(f"training, layer {layer + 1} of {config.n_layer}: {what}")

    try:
        return train_all(file, config, recorded, split, plan, progress)
    finally:
        status.clear()


def _report(layers: list[Trained], config: ModelConfig, plan: Plan, weights: int, model_bytes: int) -> dict[str, Any]:
    rows = [{"rank": layer.rank, "bytes": layer.nbytes} | _plain(vars(layer.quality)) for layer in layers]
    own = sum(layer.rank for layer in layers) * (config.n_embd + config.n_ff)
    size = sum(layer.nbytes for layer in layers)
    return {
        "kind": plan.kind,
        "type": plan.stored.name,
        "layers": rows,
        "overall": _overall(rows),
        "parameters": own,
        "parameter_share": own / weights,
        "bytes": size,
        "byte_share": size / model_bytes,
    }


def _overall(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of all layers' neurons together; energy and rank are the layers' means."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in ("rank", "energy", "predicted", "active")}
    hit = float(np.mean([row["recall"] * row["active"] for row in rows]))
    return mean | {"recall": hit / max(mean["active"], 1e-30), "precision": hit / max(mean["predicted"], 1e-30)}


def _plain(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _print(report: dict[str, Any]) -> None:
    dataset = console.printable(report["dataset"])
    print(f"{report['kind']} predictors from {report['tokens']} tokens of {dataset}", end="")
    print(f", judged on {report['held_out']} others")
    print(f"{'layer':>5}  {'rank':>4}  {'recall':>7}  {'energy':>8}  {'precision':>9}  {'predicted':>9}", end="")
    print(f"  {'active':>7}  size")
    for number, row in enumerate(report["layers"]):
        print(f"{number:>5}  {_row(row)}  {human_bytes(row['bytes'])}")
    print(f"{'all':>5}  {_row(report['overall'])}  {human_bytes(report['bytes'])}")
    print(
        f"{report['parameters']:,} parameters, {report['parameter_share']:.1%} of the model's; "
        f"{report['byte_share']:.1%} of its bytes"
    )
    dense, predicted = report["perplexity_dense"], report["perplexity"]
    if dense is not None:
        print(f"perplexity dense {dense:.4f}", end="" if predicted is not None else "\n")
    if dense is not None and predicted is not None:
        print(f", with predictors {predicted:.4f} ({predicted / dense - 1:+.2%})")


def _row(row: dict[str, float]) -> str:
    return (
        f"{row['rank']:>4.0f}  {row['recall']:>7.2%}  {row['energy']:>8.3%}  {row['precision']:>9.1%}"
        f"  {row['predicted']:>9.1%}  {row['active']:>7.1%}"
    )
