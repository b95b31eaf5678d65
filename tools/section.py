"""`hotcold section`, `attach` and `detach`: what a model's section holds, putting one in, taking it out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, options
from .console import download_bar, human_bytes, printable

if TYPE_CHECKING:
    from ..formats.gguf import GGUFFile
    from ..formats.section import Section

Verify = Annotated[bool, typer.Option("--verify", help="Read the whole section and check every checksum.")]
SectionFile = Annotated[Path, typer.Argument(metavar="SECTION.gguf", help="A section in a file of its own.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Put it beside the model instead, as hotcold-MODEL.")]
To = Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Keep the section in this file.")]
Keep = Annotated[bool, typer.Option("--keep-sidecar", help="Keep it beside the model, where it stays in force.")]


def section(model: options.Model, as_json: options.AsJson = False, verify: Verify = False) -> None:
    """Show a model's neuron section: profile, thresholds, predictors, placement."""
    from ..formats.errors import SectionError
    from ..formats.gguf import GGUFFile
    from ..formats.section import find_section

    with GGUFFile(console.find_model(model)) as gguf:
        found = find_section(gguf)
        if found is None:
            raise SectionError(f"{gguf.path}: it has no section; `hotcold profile` makes one")
        with found:
            report = describe_section(found)
            if verify:
                if damaged := found.damaged():
                    what = f"the checksum of {len(damaged)} tensors is wrong, {printable(damaged[0])} among them"
                    raise SectionError(f"{found.path}: {what}; detach it and make it again")
                report["verified"] = True
    if as_json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        _print(report)


def attach(model: options.Model, section_file: SectionFile, sidecar: Sidecar = False) -> None:
    """Put a section into a model file, in place of the one it has."""
    from ..formats.section_file import attach_section

    with download_bar() as progress:
        path = attach_section(console.find_model(model), section_file, sidecar=sidecar, progress=progress)
    print(path)


def detach(model: options.Model, to: To = None, keep_sidecar: Keep = False) -> None:
    """Take a model's section out; the model file is then what it was before."""
    from ..formats.errors import ParameterError
    from ..formats.section_file import detach_section

    if to is not None and keep_sidecar:
        raise ParameterError("--to and --keep-sidecar: wanted one of the two")
    path = console.find_model(model)
    with download_bar() as progress:
        detach_section(path, to=to, keep_sidecar=keep_sidecar, progress=progress)
    print(path)


def brief(gguf: GGUFFile) -> str | None:
    """One line on a model's section; None if it has none."""
    from ..formats.errors import HotcoldError
    from ..formats.section import find_section

    try:
        found = find_section(gguf)
    except HotcoldError as error:
        return f"not usable: {error}"
    if found is None:
        return None
    with found:
        place = "attached" if found.attached else f"in {found.path.name}"
        return f"{', '.join(found.parts())}; {human_bytes(found.nbytes)}, {place}"


def describe_section(found: Section) -> dict[str, Any]:
    """Everything that is shown, as JSON-able data; sizes in bytes."""
    image = found.image
    report: dict[str, Any] = {
        "file": str(found.path),
        "attached": found.attached,
        "bytes": found.nbytes,
        "base_tensor_hash": image.get("hotcold.base.tensor_hash", "", str),
        "parts": found.parts(),
    }
    if (profile := found.profile()) is not None:
        report["profile"] = {
            "tokens": profile.tokens,
            "dataset": profile.dataset,
            "rule": profile.rule,
            "active_share": [round(float(share), 4) for share in profile.freq.mean(axis=1)],
        }
    if (thresholds := found.thresholds()) is not None:
        report["thresholds"] = [
            {"density": round(float(density), 4), "lowest": _plain(row.min()), "highest": _plain(row.max())}
            for density, row in zip(thresholds.densities, thresholds.values, strict=True)
        ]
    if (predictors := found.predictors()) is not None:
        report["predictors"] = {
            "kind": predictors.kind,
            "input": predictors.input,
            "layers": [_predictor(found, layer, rank) for layer, rank in enumerate(predictors.ranks)],
        }
    if found.has_down_t():
        tensors = [info for info in image.tensors.values() if info.name.endswith(".ffn_down_t.weight")]
        report["down_t"] = {
            "types": sorted({info.type.name for info in tensors}),
            "bytes": sum(info.nbytes for info in tensors),
        }
    if (placed := found.placement()) is not None:
        report["placement"] = {
            "hot": [len(ids) for ids in placed.hot],
            "attention": [layer for layer, on_gpu in enumerate(placed.attention) if on_gpu],
            "head": placed.head,
            "n_ctx": placed.n_ctx,
            "budget": placed.budget,
            "group": placed.group,
            "cold": placed.cold,
            "objective": placed.objective,
            "hardware": placed.hardware,
            "sparsity": placed.sparsity,
        }
    return report


def _predictor(found: Section, layer: int, rank: int) -> dict[str, Any]:
    parts = [found.image.tensors[f"blk.{layer}.ffn_pred_{part}"] for part in ("a.weight", "b.weight", "cut")]
    size = sum(info.nbytes for info in parts)
    return {"layer": layer, "rank": rank, "bytes": size, "types": sorted({info.type.name for info in parts[:2]})}


def _plain(value: Any) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def _print(report: dict[str, Any]) -> None:
    where = "attached to" if report["attached"] else "in the sidecar"
    print(f"{human_bytes(report['bytes'])} of section, {where} {printable(report['file'])}")
    print(f"  for a model of tensor hash {printable(report['base_tensor_hash'])}")
    if profile := report.get("profile"):
        shares = profile["active_share"]
        print(
            f"  profile     {profile['tokens']} tokens of {printable(profile['dataset'])}, {printable(profile['rule'])}"
        )
        print(
            f"              active on average {sum(shares) / len(shares):.1%}, "
            f"by layer from {min(shares):.1%} to {max(shares):.1%}"
        )
    for threshold in report.get("thresholds", ()):
        print(f"  threshold   density {threshold['density']:.2f}: {threshold['lowest']} to {threshold['highest']}")
    if predictors := report.get("predictors"):
        total = sum(layer["bytes"] for layer in predictors["layers"])
        print(f"  predictors  {predictors['kind']} on {predictors['input']}, {human_bytes(total)}")
        for layer in predictors["layers"]:
            size, types = human_bytes(layer["bytes"]), ", ".join(layer["types"])
            print(f"              layer {layer['layer']:>3}: rank {layer['rank']:>5}, {size:>10}, {types}")
    if down_t := report.get("down_t"):
        print(f"  down_t      {human_bytes(down_t['bytes'])}, {', '.join(down_t['types'])}")
    if placed := report.get("placement"):
        hot, layers = sum(placed["hot"]), len(placed["hot"])
        print(
            f"  placement   {hot} hot neurons in {sum(map(bool, placed['hot']))} of {layers} layers, attention of "
            f"{len(placed['attention'])}, output on the {'GPU' if placed['head'] else 'CPU'}"
        )
        print(
            f"              budget {human_bytes(placed['budget'])}, context {placed['n_ctx']}, "
            f"{printable(placed['sparsity'])}, {printable(placed['objective'])}, for {printable(placed['hardware'])}"
        )
    if report.get("verified"):
        print("  every checksum is right")
