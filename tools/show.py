"""`hotcold inspect`: what is in a GGUF file."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from . import console, family, options, section
from .console import human_bytes, printable

if TYPE_CHECKING:
    from ..formats.gguf import GGUFFile

LONG, HEAD = 16, 6

File = Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file, or a model's alias or reference.")]


def inspect(file: File, as_json: options.AsJson = False) -> None:
    """Show a file's family, features, memory needs, metadata, tensors and sizes."""
    from ..formats.gguf import GGUFFile

    with GGUFFile(console.find_model(file)) as gguf:
        report = describe_file(gguf)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        _print(report)


def parameter_count(gguf: GGUFFile) -> int:
    """Number of weights in all tensors."""
    return sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())


def bits_per_weight(gguf: GGUFFile) -> float:
    """Bits of tensor data per weight; 0 for a file without tensors."""
    data = sum(tensor.nbytes for tensor in gguf.tensors.values())
    return 8 * data / max(1, parameter_count(gguf))


def type_totals(gguf: GGUFFile) -> dict[str, tuple[int, int]]:
    """Tensor type -> (number of tensors, bytes), largest first."""
    totals: dict[str, tuple[int, int]] = {}
    for tensor in gguf.tensors.values():
        count, size = totals.get(tensor.type.name, (0, 0))
        totals[tensor.type.name] = (count + 1, size + tensor.nbytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def describe_file(gguf: GGUFFile) -> dict[str, Any]:
    """Everything that is shown, as JSON-able data; sizes in bytes, arrays longer than 16 shortened."""
    return {
        "file": str(gguf.path),
        "file_bytes": gguf.path.stat().st_size,
        "version": gguf.version,
        "alignment": gguf.alignment,
        "parameters": parameter_count(gguf),
        "bits_per_weight": round(bits_per_weight(gguf), 3),
        "section": section.brief(gguf),
        "model": family.describe(gguf),
        "types": {name: {"tensors": count, "bytes": size} for name, (count, size) in type_totals(gguf).items()},
        "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "type": tensor.type.name,
                "bytes": tensor.nbytes,
                "offset": tensor.offset,
            }
            for tensor in gguf.tensors.values()
        ],
    }


def _plain(value: Any) -> Any:
    """JSON-able form of a metadata value; a long array keeps its head and says its length."""
    if isinstance(value, (list, np.ndarray)):
        if len(value) > LONG:
            return {"length": len(value), "first": [_plain(item) for item in value[:HEAD]]}
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _print(report: dict[str, Any]) -> None:
    print(printable(report["file"]))
    print(
        f"GGUF version {report['version']}, {human_bytes(report['file_bytes'])}, "
        f"{report['parameters'] / 1e6:.1f} M parameters, {report['bits_per_weight']:.2f} bits per weight"
    )
    if report["section"]:
        print(f"Section: {printable(report['section'])}; `hotcold section` shows it")
    print("\nModel")
    for line in family.lines(report["model"]):
        print(printable(line))
    print("\nMetadata")
    width = max((len(key) for key in report["metadata"]), default=0)
    for key, value in report["metadata"].items():
        print(f"  {printable(key):{width}}  {_shortened(value)}")
    print("\nTensors")
    rows = [
        (tensor["name"], " x ".join(map(str, tensor["shape"])), tensor["type"], human_bytes(tensor["bytes"]))
        for tensor in report["tensors"]
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for name, shape, kind, size in rows:
        print(f"  {printable(name):{widths[0]}}  {shape:>{widths[1]}}  {kind:{widths[2]}}  {size:>{widths[3]}}")
    print("\nTypes")
    for name, total in report["types"].items():
        print(f"  {name:{widths[2]}}  {total['tensors']:>5} tensors  {human_bytes(total['bytes']):>10}")


def _shortened(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{', '.join(_shortened(item) for item in value['first'])}, ...] ({value['length']} in all)"
    if isinstance(value, str):
        text = json.dumps(printable(value), ensure_ascii=False)
        return text if len(text) <= 100 else f"{text[:97]}... ({len(value)} characters)"
    return json.dumps(value, ensure_ascii=False)
