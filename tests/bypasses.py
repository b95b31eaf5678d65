"""Models of any family with a bypass beside their neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter


def with_bypass(path: Path, to: Path) -> Path:
    """A copy of an F32 model with a bypass of random weights in each layer, its neurons as they were."""
    reader, rng = GGUFReader(path), np.random.default_rng(6)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(to, arch)
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = value.types
            writer.add_key_value(name, value.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for each in reader.tensors:
        writer.add_tensor(each.name, each.data)
    n_layer, n = (reader.fields[f"{arch}.{key}"].contents() for key in ("block_count", "embedding_length"))
    for layer in range(n_layer):
        weight, bias = rng.normal(0, n**-0.5, (n, n)), rng.normal(0, 0.2, n)
        writer.add_tensor(f"blk.{layer}.ffn_bypass.weight", weight.astype(np.float32))
        writer.add_tensor(f"blk.{layer}.ffn_bypass.bias", bias.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
