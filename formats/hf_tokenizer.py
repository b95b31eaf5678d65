"""A Hugging Face folder's tokenizer and chat template as the tokenizer keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .errors import FormatError
from .hf_vocabulary import HFVocabulary, read_json, read_vocabulary
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    OWN_STRIP_LEFT,
    OWN_STRIP_RIGHT,
    STOP_TEXTS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

Value: TypeAlias = str | bool | int | list[str] | list[int] | list[float]
# GGUF's name of an id -> the names that transformers gives the token
_NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_PADDING_SCORE = -10000.0


def tokenizer_fields(folder: Path, n_vocab: int, config: Mapping[str, Any]) -> dict[str, Value]:
    """All `tokenizer.*` keys of a GGUF file for the checkpoint in `folder`.

    n_vocab: rows of the embedding; ids without a token become unused ones. config: its config.json. Keys under
    `hotcold.tokenizer.` say what the common keys cannot. FormatError for missing or broken files, UnsupportedError
    for a kind of tokenizer that a GGUF file cannot hold. Nothing of the folder is ever run or unpickled.
    """
    settings = _optional(folder / "tokenizer_config.json")
    model_type = str(config.get("model_type", ""))
    found = read_vocabulary(folder, settings, model_type.removesuffix("_text"))
    strips = _add_tokens(found, folder, settings, n_vocab)
    last = max(found.tokens, default=0)
    if last >= n_vocab:
        raise FormatError(found.path, "vocab", f"{found.tokens[last][:80]!r} with id {last}", f"ids below {n_vocab}")
    ids = {token: id for id, token in found.tokens.items()}
    if len(ids) != len(found.tokens):
        id, token = next((id, token) for id, token in found.tokens.items() if ids[token] != id)
        raise FormatError(found.path, "vocab", f"{token[:80]!r} as ids {id} and {ids[token]}", "unique tokens")
    special = _special_ids(found, folder, settings, config, ids)
    fields: dict[str, Value] = {"tokenizer.ggml.model": found.model}
    fields["tokenizer.ggml.tokens"] = [found.tokens.get(i) or _filler(i, ids) for i in range(n_vocab)]
    fields["tokenizer.ggml.token_type"] = [found.types.get(i, UNUSED) for i in range(n_vocab)]
    if found.model == "llama":
        fields["tokenizer.ggml.scores"] = [float(found.scores.get(i, _PADDING_SCORE)) for i in range(n_vocab)]
    fields |= found.keys
    if settings.get("add_prefix_space") is False and found.model == "llama":
        fields["tokenizer.ggml.add_space_prefix"] = False
    fields |= strips
    fields |= special
    fields |= _template_fields(folder, settings)
    return fields


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _filler(id: int, ids: Mapping[str, int]) -> str:
    name = f"[PAD{id}]"
    while name in ids:
        name = f"[{name}]"
    return name


def _add_tokens(found: HFVocabulary, folder: Path, settings: Mapping[str, Any], n_vocab: int) -> dict[str, Value]:
    """Put added tokens into `found`; returns the keys for those that swallow the spaces beside them.

    Ids past the embedding are left out: the model has no such token (Gemma 3's image token in its text models).
    """
    strips: dict[str, set[int]] = {OWN_STRIP_LEFT: set(), OWN_STRIP_RIGHT: set()}
    seen: dict[int, str] = {}
    special_names = set(_special_names(folder, settings))
    for path, id, token in _added(found, folder, settings):
        content = token.get("content")
        if not isinstance(content, str) or not content:
            raise FormatError(path, "added tokens", f"{content!r:.80} with id {id}", "a token's text")
        if seen.setdefault(id, content) != content:
            raise FormatError(path, "added tokens", f"{seen[id]!r} and {content!r} as id {id}", "one token an id")
        if id >= n_vocab:
            continue
        special = token.get("special", content in special_names) or _looks_special(content)
        kind = CONTROL if special else USER_DEFINED
        if found.types.get(id) in (BYTE, UNKNOWN):
            kind = found.types[id]
        spelled = content.replace("▁", " ") if found.model == "llama" and kind == USER_DEFINED else content
        before = found.tokens.get(id, spelled)
        if found.model == "gpt2" and before != spelled:
            raise FormatError(
                path, "added tokens", f"{content[:80]!r} as id {id}", f"{before[:80]!r}, as in the vocabulary"
            )
        found.tokens[id], found.types[id] = spelled, kind
        for key, flag in ((OWN_STRIP_LEFT, "lstrip"), (OWN_STRIP_RIGHT, "rstrip")):
            if token.get(flag) is True:
                strips[key].add(id)
    ids_of = {token: id for id, token in found.tokens.items()}
    for id in (ids_of[name] for name in special_names if name in ids_of):
        if found.types[id] == NORMAL:
            found.types[id] = CONTROL
    return {key: sorted(ids) for key, ids in strips.items() if ids}


def _added(
    found: HFVocabulary, folder: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Added tokens with their ids, from tokenizer.json or else from the files that slow tokenizers read."""
    if found.added:
        for token in found.added:
            yield found.path, _id(found.path, token.get("id")), token
        return
    known = set()
    path, decoder = folder / "tokenizer_config.json", settings.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        id = _id(path, int(key) if key.isdecimal() else key)
        known.add(id)
        yield path, id, token if isinstance(token, dict) else {"content": token}
    path = folder / "added_tokens.json"
    for content, value in _optional(path).items():
        if (id := _id(path, value)) not in known:
            yield path, id, {"content": content}


def _id(path: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FormatError(path, "added tokens", f"id {value!r:.80}", "a number from 0")
    return value


def _looks_special(content: str) -> bool:
    """Whether a token is a control token whatever its file says: user's text must not be able to spell it."""
    return content[:2] in ("<|", "<｜") and content[-2:] in ("|>", "｜>")


def _special_names(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    for source in (settings, _optional(folder / "special_tokens_map.json")):
        extra = source.get("additional_special_tokens")
        values = [source.get(f"{name}_token") for name in (*_NAMED.values(), "sep", "cls", "mask")]
        for value in (*values, *(extra if isinstance(extra, list) else ())):
            yield from _content(value)


def _content(value: Any) -> Iterator[str]:
    """The text of a token that is written as a string or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    if isinstance(value, str):
        yield value


def _special_ids(
    found: HFVocabulary,
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
) -> dict[str, Value]:
    """The ids of special tokens, and whether a text gets BOS and EOS."""
    texts = (settings, _optional(folder / "special_tokens_map.json"))
    generation = _optional(folder / "generation_config.json")
    numbers = (config, generation)
    around = {"bos": found.begins, "eos": found.ends}
    chosen: dict[str, int] = {}
    for name, theirs in _NAMED.items():
        named = [ids[text] for source in texts for text in _content(source.get(f"{theirs}_token")) if text in ids]
        given = [id for source in numbers for id in _usable(source.get(f"{theirs}_token_id"), found)]
        used = [ids[text] for text in around.get(name) or () if text in ids]
        if named or used or given:
            chosen[name] = (named + used + given)[0]
    if "unknown" not in chosen and UNKNOWN in found.types.values():
        chosen["unknown"] = next(id for id, kind in found.types.items() if kind == UNKNOWN)
    ends = [id for source in reversed(numbers) for id in _usable(source.get("eos_token_id"), found)]
    # A file has room for three ends: EOS, end of turn, end of message. Well-known names go first.
    others = sorted(
        {id for id in ends if id != chosen.get("eos")}, key=lambda id: (found.tokens[id] not in STOP_TEXTS, id)
    )
    for id in others:
        key = "eom" if found.tokens[id] == "<|eom_id|>" else "eot"
        chosen.setdefault(key, id)
    fields: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": id for name, id in chosen.items()}
    for name, texts_there in around.items():
        said = settings.get(f"add_{name}_token")
        if not isinstance(said, bool):
            token = found.tokens.get(chosen.get(name, -1))
            default = name == "bos" and found.model == "llama"
            said = token in texts_there if texts_there is not None else default
        fields[f"tokenizer.ggml.add_{name}_token"] = said and name in chosen
    return fields


def _usable(value: Any, found: HFVocabulary) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool) and id in found.tokens]


def _template_fields(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The chat templates: files of their own go before tokenizer_config.json."""
    templates: dict[str, str] = {}
    given = settings.get("chat_template")
    if given is None:
        given = _optional(folder / "chat_template.json").get("chat_template")
    for item in given if isinstance(given, list) else [{"name": "default", "template": given}]:
        if not isinstance(item, dict) or not isinstance(item.get("template"), str | None):
            path = folder / "tokenizer_config.json"
            raise FormatError(path, "chat_template", f"{item!r:.80}", "a template, or a list of named ones")
        if item.get("template"):
            templates[str(item.get("name"))] = item["template"]
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                got = " ".join(str(error).split())
                raise FormatError(path, "template", got, "a readable UTF-8 file") from None
    fields: dict[str, Value] = {
        f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"
    }
    if fields:
        fields["tokenizer.chat_templates"] = [name for name in templates if name != "default"]
    if "default" in templates:
        fields["tokenizer.chat_template"] = templates["default"]
    return fields
