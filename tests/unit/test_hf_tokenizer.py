"""Hugging Face folders -> GGUF keys -> our tokenizer, against Hugging Face's own and SentencePiece's."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizer_families as families
from tokenizer_families import BYTE_FAMILIES, PIECE_FAMILIES, Json

from hotcold.formats.hf_tokenizer import tokenizer_fields
from hotcold.formats.pre_tokenizers import PRE_TOKENIZERS
from hotcold.formats.tokenizer import Tokenizer, load_tokenizer

HARD: list[str] = json.loads((families.DATA / "hard.json").read_text(encoding="utf-8"))
EDGES = [
    *"aZéßжλअ日ก한ـ",
    *"1٣²½Ⅻ",
    *" \t\n\r\u00a0\u2003\u3000\u200b\u200d\u0301\ufe0f",
    *"'’.,!?-_=+$<>|`^~/",
    "'s",
    "'LL",
    "\r\n",
    "  ",
    "👩‍👧",
    "<|im_end|>",
]
HARD += ["".join(random.Random(i).choices(EDGES, k=16)) for i in range(150)]
SPARE = 5  # rows of the embedding without a token


def load(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file with these keys, arrays as the GGUF reader gives them."""
    arrays = {"token_type": np.int32, "scores": np.float32, "strip_left_ids": np.int32, "strip_right_ids": np.int32}
    metadata = {
        key: np.array(value, arrays[key.rsplit(".", 1)[1]]) if key.rsplit(".", 1)[1] in arrays else value
        for key, value in fields.items()
    }
    return load_tokenizer(SimpleNamespace(metadata=metadata, path="test.gguf"))


def theirs(data: Json) -> Any:
    from tokenizers import Tokenizer as HFTokenizer

    return HFTokenizer.from_str(json.dumps(data))


def size(data: Json) -> int:
    return max([*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]) + 1


def own(fields: dict[str, Any]) -> dict[str, Any]:
    start = "hotcold.tokenizer."
    return {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}


@pytest.fixture(scope="module")
def byte_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Json, dict[str, Any]]]:
    """For each byte-level family its tokenizer.json and the keys made of it."""
    made = {}
    for name, family in BYTE_FAMILIES.items():
        data = families.byte_json(family)
        folder = families.write_folder(tmp_path_factory.mktemp("hf") / name, data, family["settings"])
        made[name] = data, tokenizer_fields(folder, size(data) + SPARE, {"model_type": family["model_type"]})
    return made


@pytest.mark.parametrize("name", BYTE_FAMILIES)
def test_byte_level_ids_are_hugging_faces(name: str, byte_folders: Any) -> None:
    data, fields = byte_folders[name]
    ours, oracle, family = load(fields), theirs(data), BYTE_FAMILIES[name]
    assert fields["tokenizer.ggml.pre"] == family["pre"]
    assert {key: value for key, value in own(fields).items() if "strip" not in key} == family["own"]
    for special in (True, False):
        oracle.encode_special_tokens = not special
        for text in HARD:
            wanted = oracle.encode(text, add_special_tokens=False)
            found = ours.encode(text, add_bos=False, special=special)
            assert found == wanted.ids, (text, [ours.token_text(id) for id in found], wanted.tokens)
            if not special:
                same = unicodedata.normalize("NFC", text) if family["normalizer"] == families.NFC else text
                assert ours.decode(ours.encode(text, add_bos=False)) == same


@pytest.mark.parametrize("name", BYTE_FAMILIES)
def test_byte_level_begins_as_hugging_faces(name: str, byte_folders: Any) -> None:
    data, fields = byte_folders[name]
    ours, oracle = load(fields), theirs(data)
    assert ours.encode("hello") == oracle.encode("hello").ids and ours.encode("") == oracle.encode("").ids
    assert fields["tokenizer.ggml.add_bos_token"] is bool(BYTE_FAMILIES[name]["bos"])


@pytest.mark.parametrize("name", BYTE_FAMILIES)
def test_cuts_are_hugging_faces(name: str, byte_folders: Any) -> None:
    """The same through the pieces alone, which no vocabulary can hide."""
    data, fields = byte_folders[name]
    oracle, ours = theirs(data).pre_tokenizer, PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]].build()
    for text in HARD:
        assert [piece for piece, _ in ours.pre_tokenize_str(text)] == [p for p, _ in oracle.pre_tokenize_str(text)]


def test_families_differ() -> None:
    """The hard strings tell any two cuts apart, so that a wrong name could not pass."""
    built = {pre.steps: pre.build() for pre in PRE_TOKENIZERS.values()}
    cuts = {steps: str([cut.pre_tokenize_str(text) for text in HARD]) for steps, cut in built.items()}
    assert len(set(cuts.values())) == len(cuts) - 1 > 14  # bailingmoe's pattern is qwen2's, written otherwise


@pytest.fixture(scope="module", params=[(name, beside) for name in PIECE_FAMILIES for beside in (True, False)], ids=str)
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, Json, Any]:
    """A SentencePiece-like family, its tokenizer.json, and the keys made with and without a tokenizer.model beside."""
    name, beside = request.param
    family = PIECE_FAMILIES[name]
    data = families.piece_json(family)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = tmp_path_factory.mktemp("hf")
    families.write_folder(folder, data, settings, family["model"] if beside else None)
    return family, data, tokenizer_fields(folder, size(data) + SPARE, {"model_type": "llama"})


def test_sentencepiece_like_ids_are_hugging_faces(pieces: tuple[Json, Json, Any]) -> None:
    family, data, fields = pieces
    ours, oracle = load(fields), theirs(data)
    assert own(fields).get("space_prefix") == (family["prefix"] or None)
    assert (
        fields["tokenizer.ggml.add_space_prefix"] is (family["prefix"] != "") and fields["tokenizer.ggml.add_bos_token"]
    )
    for special in (True, False):
        oracle.encode_special_tokens = not special
        # Of spaces beyond the longest token, SentencePiece takes the longest first and Hugging Face's merges do not.
        for text in (text for text in HARD if family["model"] != "spaces" or " " * 9 not in text):
            wanted = oracle.encode(text, add_special_tokens=False)
            found = ours.encode(text, add_bos=False, special=special)
            assert found == wanted.ids, (text, [ours.token_text(id) for id in found], wanted.tokens)
            if not special and (family["prefix"] in (None, "") or text[:1] not in (" ", "▁")):
                assert ours.decode(found) == text.replace("▁", " ")


@pytest.mark.parametrize("name", ["sentencepiece", "spaces"])
def test_sentencepiece_ids_are_its_librarys(name: str, tmp_path: Path) -> None:
    """A folder with nothing but a tokenizer.model."""
    import sentencepiece

    folder = families.write_folder(tmp_path, None, {"bos_token": "<s>", "eos_token": "</s>"}, name)
    ours = load(tokenizer_fields(folder, 1000 + SPARE, {}))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ours.add_bos and ours.encode("hello") == [1, *oracle.encode("hello")]
    for text in HARD:
        found = ours.encode(text, add_bos=False)
        assert found == oracle.encode(text), (text, [ours.token_text(id) for id in found])
        assert ours.decode(found) == text.replace("▁", " ")
