"""`hotcold profile`: how often each neuron is active, or each expert chosen, by layer, and kept in the section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, offline, options
from .console import note

if TYPE_CHECKING:
    import numpy as np

    from ..formats.config import ModelConfig
    from ..runtime.engine import Engine
    from ..solver.corpus import Corpus
    from ..solver.neurons import Rule
    from ..solver.priors import Prior

DEFAULT_DENSITY = 0.5
RULE_TOKENS = 4096  # on which thresholds are found where the section has none

Threshold = Annotated[
    float | None,
    typer.Option("--threshold", metavar="D", help="Count neurons above the thresholds for the density D (0 to 1)."),
]
Import = Annotated[
    Path | None,
    typer.Option("--import", metavar="FILE", help="An imatrix GGUF, or PowerInfer's folder of activation_N.pt."),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the activation CDF by layer.")]


def profile(
    model: options.Model,
    texts: offline.Texts = None,
    tokens: offline.Tokens = None,
    threshold: Threshold = None,
    imported: Import = None,
    plot: Plot = None,
    sidecar: offline.Sidecar = False,
    dry_run: offline.DryRun = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Count how often each neuron is active on a text, or each expert chosen."""
    import numpy as np

    from ..solver import neurons, priors
    from ..solver import profile as profiler

    if threshold is not None:
        priors.check_density(threshold)
    path = console.find_model(model)
    prior: Prior | None = None
    if imported is not None:
        prior, config = _import(path, imported, threshold or DEFAULT_DENSITY)
    if prior is not None and not texts:
        density = threshold or DEFAULT_DENSITY
        name = "exact" if prior.source.startswith("PowerInfer") else f"threshold={density:g}"
        name = neurons.EXPERTS if config.n_expert else name
        freq, counted, dataset = prior.freq, prior.tokens, prior.source
    else:
        with console.open_engine(str(path), None, threads, "dense", use_section=False) as engine:
            corpus, rule = _prepare(engine, texts or [], tokens, threshold)
            freq, kept = _count(engine, corpus, rule)
            config = engine.config
        counted, dataset, name = len(corpus), corpus.name, rule.name
        if prior is not None:
            weight = min(priors.PRIOR_TOKENS, prior.tokens)
            freq = profiler.mixed(prior.freq, weight, freq, counted)
            dataset += f" + {prior.source}"
    layers = [profiler.statistics(row) for row in freq]
    whole = profiler.statistics(np.ravel(freq))
    report = {
        "model": model,
        "dataset": dataset,
        "tokens": counted,
        "rule": name,
        "density": whole.density,
        "skew": whole.skew,
        "dead": whole.dead,
        "layers": [vars(layer) for layer in layers],
    }
    if config.n_expert:
        report["experts"] = [[round(float(share), 6) for share in row] for row in freq]
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    elif config.n_expert:
        _print_experts(report, freq)
    else:
        _print(report, freq.shape)
    if plot is not None:
        from ..solver.plot import plot_cdf

        plot_cdf(freq, f"{path.stem}: {name} on {counted} tokens of {dataset}", plot)
        note(f"drawn to {plot}")
    if not dry_run:
        per = config.n_ff // profiler.counted(config)
        offline.save(path, profiler.contents(freq, counted, dataset, name, per), sidecar)
    if prior is None or texts:
        kept.drop()


def _import(path: Path, source: Path, density: float) -> tuple[Prior, ModelConfig]:
    from ..formats.config import ModelConfig
    from ..formats.errors import ModelNotFoundError
    from ..formats.gguf import GGUFFile
    from ..solver import priors

    if not source.exists():
        raise ModelNotFoundError(f"{source}: no such file or folder; wanted an imatrix GGUF or activation_N.pt files")
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
    if config.n_expert:
        return priors.of_experts(source, config), config
    return priors.load(source, config.n_layer, config.n_ff, density), config


def _prepare(engine: Engine, texts: list[Path], tokens: int | None, threshold: float | None) -> tuple[Corpus, Rule]:
    from ..formats.tokenizer import load_tokenizer
    from ..solver import corpus, neurons

    text = corpus.load(texts, load_tokenizer(engine.file), tokens)
    from ..formats.errors import ParameterError

    activation = engine.config.activation
    if engine.config.n_expert:
        if threshold is not None:
            got = f"{threshold:g} for a mixture of experts, which is counted by the experts that its router chooses"
            raise ParameterError(f"--threshold: got {got}; wanted none")
        return text, neurons.Rule(activation, by_expert=True)
    if threshold is None and activation in neurons.RELUS:
        return text, neurons.exact(activation, engine.config.activation_floors)
    if threshold is None:
        threshold = DEFAULT_DENSITY
        note(
            f"a model with {activation.upper()} has no neurons that are exactly zero: "
            f"counting those above the thresholds for a density of {threshold:g}"
        )
    return text, _threshold_rule(engine, text, threshold)


def _threshold_rule(engine: Engine, text: Corpus, density: float) -> Rule:
    """The section's thresholds for that density; else found on the beginning of the text."""
    import numpy as np

    from ..formats.section import find_section
    from ..solver import neurons, thresholds, transpose

    section = find_section(engine.file, engine.config)
    if section is not None:
        with section:
            known = section.thresholds()
            if known is not None:
                at = np.flatnonzero(np.isclose(known.densities, density, atol=1e-6))
                if at.size:
                    return neurons.Rule(engine.config.activation, density, known.values[at[0]].copy())
    head, _ = text.split(max(0, len(text) - RULE_TOKENS))
    with offline.token_bar("finding thresholds, tokens", len(head)) as progress:
        found = thresholds.collect(engine, head, transpose.down_norms(engine.file, engine.config), progress)
    return thresholds.rule(found, engine.config.activation, density)


def _count(engine: Engine, corpus: Corpus, rule: Rule) -> tuple[np.ndarray, Any]:
    from ..runtime import models
    from ..solver import profile as profiler

    file = models.home() / "partial" / profiler.kept_name(engine.file, corpus, rule)
    config = engine.config
    with models.storage_errors(models.home()):
        kept = profiler.Count(file, config.n_layer, profiler.counted(config))
        if kept.tokens:
            note(f"going on after {kept.tokens} tokens that were counted before")
        with offline.token_bar("counting activations, tokens", len(corpus)) as progress:
            progress(kept.tokens)
            try:
                return profiler.count(engine, corpus, rule, kept, progress), kept
            except KeyboardInterrupt:
                note(f"stopped after {kept.tokens} of {len(corpus)} tokens; the same command goes on from there")
                raise


def _print_experts(report: dict[str, Any], freq: np.ndarray) -> None:
    """Of each layer how unevenly its experts are chosen, and the five that are chosen most often."""
    print(f"{report['rule']} on {report['tokens']} tokens of {console.printable(report['dataset'])}")
    print(f"{'layer':>5}  {'skew':>7}  {'never':>6}  {'least':>6}  chosen most often")
    for number, (layer, row) in enumerate(zip(report["layers"], freq, strict=True)):
        most = ", ".join(f"{expert} ({row[expert]:.0%})" for expert in (-row).argsort(kind="stable")[:5])
        print(f"{number:>5}  {layer['skew']:>7.1%}  {layer['dead']:>6}  {row.min():>6.1%}  {most}")
    n_layer, n_expert = freq.shape
    print(
        f"all {n_layer} layers: a token uses {report['density']:.1%} of {n_expert} experts; {report['skew']:.1%} of "
        f"them give 80 % of the choices; {report['dead']} of {n_layer * n_expert} were never chosen"
    )


def _print(report: dict[str, Any], shape: tuple[int, ...]) -> None:
    print(f"{report['rule']} on {report['tokens']} tokens of {console.printable(report['dataset'])}")
    print(f"{'layer':>5}  {'density':>8}  {'skew':>7}  {'dead':>6}")
    for number, layer in enumerate(report["layers"]):
        print(f"{number:>5}  {layer['density']:>8.1%}  {layer['skew']:>7.1%}  {layer['dead']:>6}")
    print(
        f"all {shape[0]} layers: {report['density']:.1%} of the neurons active; {report['skew']:.1%} of the neurons "
        f"give 80 % of the activations; {report['dead']} of {shape[0] * shape[1]} never active"
    )
