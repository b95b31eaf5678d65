"""What a checkpoint folder says about the model as such -> general.* keys, and the file's name by GGUF's convention.

From the folder, README.md and generation_config.json. Source of keys and names: ggml/docs/gguf.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .checkpoint_settings import as_number
from .errors import FormatError
from .gguf_header import show
from .hf_vocabulary import read_json

# generation_config.json -> general.sampling.*
_SAMPLING = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
_FRONT_MATTER = 65536  # bytes of README.md that are looked at
_LISTS = {"tags": "general.tags", "language": "general.languages"}
_ITEM = re.compile(r"^\s*-\s+(\S.*)$")


def model_id(folder: Path) -> str:
    """The folder's name, or in Hugging Face's cache (models--ORG--NAME/snapshots/HASH) the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.split("--")[-1]
    return folder.name


def general_keys(folder: Path, n_weights: tuple[int, int, int, int]) -> dict[str, Any]:
    """general.* keys. n_weights: all, those outside experts, those of one expert in every layer, how many experts."""
    from gguf import Metadata, size_label

    full, _, basename, finetune, version, _ = Metadata.get_model_id_components(model_id(folder), n_weights[0])
    found: dict[str, Any] = {"general.type": "model", "general.name": Metadata.id_to_title(full or "model")}
    found |= {"general.basename": basename, "general.finetune": finetune, "general.version": version}
    found["general.size_label"] = size_label(*n_weights)
    return {key: value for key, value in {**found, **_card(folder), **_sampling(folder)}.items() if value is not None}


def file_name(keys: dict[str, Any], encoding: str) -> str:
    """BaseName-SizeLabel-FineTune-Version-Encoding.gguf."""
    from gguf import naming_convention

    name, base, finetune, version, size = (
        keys.get(f"general.{key}") for key in ("name", "basename", "finetune", "version", "size_label")
    )
    return re.sub(r"[^\w.+-]", "-", naming_convention(name, base, finetune, version, size, encoding)) + ".gguf"


def _card(folder: Path) -> dict[str, Any]:
    """licence, tags and languages, as far as README.md has them in the plainest YAML."""
    try:
        with open(folder / "README.md", "rb") as file:
            lines = file.read(_FRONT_MATTER).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}
    found: dict[str, Any] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        name, colon, value = line.partition(":")
        if item := _ITEM.match(line):
            if key in _LISTS:
                found.setdefault(_LISTS[key], []).append(_unquoted(item[1]))
        elif colon and not line[:1].isspace():
            key, value = name.strip(), _unquoted(value)
            if key == "license" and value:
                found["general.license"] = value
            elif key == "language" and value and value[0] not in "[{":
                found["general.languages"] = [value]
    return found


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _sampling(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    said = read_json(path)
    found: dict[str, Any] = {}
    for name, key in _SAMPLING.items():
        value = said.get(name)
        if value is not None:
            error = FormatError(path, f"setting {show(name)}", show(value), "a number")
            found[f"general.sampling.{key}"] = as_number(value, lambda _, error=error: error)  # type: ignore[misc]
    if (top_k := said.get("top_k")) is not None:
        if type(top_k) is not int or not -1 <= top_k < 2**31:
            raise FormatError(path, "setting 'top_k'", show(top_k), "an integer")
        found["general.sampling.top_k"] = max(top_k, 0)  # -1 is how some say "all", which is 0 here
    return found
