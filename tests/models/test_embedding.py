"""Hidden states and embeddings: against the NumPy forward pass, and through each family's head transformers' logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from adapters import merged
from families import BY_NAME, FAMILIES, relative_error

from hotcold import LLM, Engine, GGUFFile
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ClosedError, ContextLengthError, HotcoldError, ParameterError, UnsupportedError
from hotcold.runtime import embedding

IDS = [(7 * i + 3) % 290 for i in range(600)]


def hidden(engine: Engine, ids: list[int] | np.ndarray) -> np.ndarray:
    with closing(engine.new_sequence()) as sequence:
        return engine.embed(sequence, ids)


@pytest.mark.parametrize("qtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("n_tok", [1, 5, 600])
def test_hidden_states(tiny_model: Callable[..., Path], qtype: str, n_tok: int) -> None:
    path = tiny_model(qtype=qtype, n_ctx_train=1024)
    wanted = naive.load(path, kv_f16=True, q8=qtype != "F32").hidden(IDS[:n_tok])
    with Engine(path, n_ctx=640, n_threads=2) as engine:
        got = hidden(engine, IDS[:n_tok])
        assert got.dtype == np.float32 and got.shape == wanted.shape
        assert relative_error(got, wanted) < (2e-3 if qtype == "F32" else 2e-2)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if "short" not in family.name])
def test_what_the_head_reads(name: str, family_file: Callable[[str], Path]) -> None:
    """The states, times the head, scaled and capped by NumPy, are transformers' logits."""
    family, path = BY_NAME[name], family_file(name)
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        head = file.dequantized("token_embd.weight" if config.tied_output else "output.weight")
    with Engine(path, n_ctx=family.n_ctx, n_threads=2) as engine:
        logits = hidden(engine, family.prompt).astype(np.float64) @ head.T.astype(np.float64) * config.logit_scale
    if cap := config.logit_softcap:
        logits = cap * np.tanh(logits / cap)
    assert relative_error(logits, family.logits) < 1e-3


def test_embedding_appends_as_eval_does(tiny_model: Callable[..., Path]) -> None:
    with Engine(tiny_model(), n_ctx=128, n_threads=2) as engine:
        plain, embedded = engine.new_sequence(), engine.new_sequence()
        engine.eval(plain, IDS[:40])
        wanted = np.array(engine.eval(plain, IDS[40:60]))
        engine.embed(embedded, IDS[:40])
        assert embedded.tokens == IDS[:40]
        np.testing.assert_array_equal(engine.eval(embedded, IDS[40:60]), wanted)


def pooled(rows: np.ndarray, pooling: str) -> np.ndarray:
    return {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_texts_of_all_lengths_share_steps(tiny_model: Callable[..., Path], pooling: str) -> None:
    path = tiny_model(n_ctx_train=1024)
    texts = [IDS[:3], IDS[3:600], IDS[5:6], IDS[9:280], IDS[9:280], IDS[2:40]]
    model = naive.load(path, kv_f16=True)
    wanted = np.stack([pooled(model.hidden(ids), pooling) for ids in texts])
    with Engine(path, n_ctx=640, n_threads=2) as engine:
        found = embedding.embed(engine, texts, pooling, normalize=False)
        unit = embedding.embed(engine, texts, pooling, normalize=True).array
        whole = engine.new_sequence()
        whole.reserve(640)  # all blocks are back
        whole.close()
    assert found.n_tokens == tuple(map(len, texts))
    assert found.array.dtype == np.float32
    assert relative_error(found.array, wanted) < 2e-3
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert relative_error(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True)) < 2e-3


def test_a_turn_is_taken_for_each_step(tiny_model: Callable[..., Path]) -> None:
    turns = []

    class Turn:
        def __enter__(self) -> None:
            turns.append(len(sequence))

        def __exit__(self, *_: object) -> None:
            engine.eval(sequence, [len(turns)])  # another user of the engine comes between

    with Engine(tiny_model(n_ctx_train=1024), n_ctx=1024, n_threads=2) as engine:
        alone = embedding.embed(engine, [IDS], "mean", True)
        sequence = engine.new_sequence()
        between = embedding.embed(engine, [IDS], "mean", True, Turn)
        assert len(turns) >= len(IDS) // embedding.STEP
        np.testing.assert_array_equal(alone.array, between.array)


def test_more_texts_than_the_cache_holds(tiny_model: Callable[..., Path]) -> None:
    with Engine(tiny_model(), n_ctx=32, n_threads=2) as engine:
        texts = [IDS[i : i + 32] for i in range(20)]
        found = embedding.embed(engine, texts, "last", True).array
        np.testing.assert_allclose(found[7], embedding.embed(engine, texts[7:8], "last", True).array[0], atol=1e-5)
        with pytest.raises(ContextLengthError, match="33 tokens"):
            embedding.embed(engine, [IDS[:5], IDS[:33]], "last", True)
        assert hidden(engine, IDS[:32]).shape == (32, 64)  # nothing was kept


def test_pooling_by_name(tiny_model: Callable[..., Path]) -> None:
    for number, name in ((0, "mean"), (1, "mean"), (2, "cls"), (3, "last")):
        with GGUFFile(tiny_model(metadata={"llama.pooling_type": number})) as file:
            assert embedding.check_pooling(None, ModelConfig.from_gguf(file)) == name
    with GGUFFile(tiny_model(metadata={"llama.pooling_type": 4})) as file:
        config = ModelConfig.from_gguf(file)
    assert embedding.check_pooling("cls", config) == "cls"
    with pytest.raises(UnsupportedError, match="pooling"):
        embedding.check_pooling(None, config)
    with pytest.raises(ParameterError, match="pooling: got 'max'"):
        embedding.check_pooling("max", config)


TEXTS = ["the cat", "hello world and the other", "a"]


def test_llm_embeds_texts_and_ids(tiny_model: Callable[..., Path]) -> None:
    with LLM(tiny_model(), n_ctx=64, n_threads=2) as llm:
        ids = [llm.tokenize(text) for text in TEXTS]
        found = llm.embed(TEXTS)
        assert found.array.shape == (3, 64) and found.n_tokens == tuple(map(len, ids))
        np.testing.assert_array_equal(llm.embed(ids).array, found.array)
        for i, text in enumerate(TEXTS):  # alone and among others: the same numbers
            np.testing.assert_array_equal(llm.embed(text).array[0], found.array[i])
            np.testing.assert_array_equal(llm.embed(np.array(ids[i])).array[0], found.array[i])
        rows = np.stack([hidden(llm.engine, one)[-1] for one in ids])
        assert relative_error(llm.embed(TEXTS, pooling="last", normalize=False).array, rows) < 1e-3
        assert llm.engine.cache.n_used == 0  # nothing stays


def test_a_text_has_what_the_model_wants_around_it(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model(metadata={"tokenizer.ggml.add_eos_token": True, "llama.pooling_type": 3}, tokenizer="llama")
    with LLM(path, n_ctx=64, n_threads=2) as llm:
        ids = llm.tokenizer.encode("the cat")
        assert (ids[0], ids[-1]) == (llm.tokenizer.bos_id, llm.tokenizer.eos_id)
        rows = hidden(llm.engine, ids)
        assert relative_error(llm.embed("the cat", normalize=False).array[0], rows[-1]) < 1e-3


def test_embeddings_as_openai_gives_them(tiny_model: Callable[..., Path]) -> None:
    with LLM(tiny_model(), n_ctx=64, n_threads=2) as llm:
        wanted, found = llm.embed(TEXTS), llm.create_embedding(TEXTS, model="mine")
        assert found["object"] == "list" and found["model"] == "mine"
        assert found["usage"] == {"prompt_tokens": sum(wanted.n_tokens), "total_tokens": sum(wanted.n_tokens)}
        assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", i) for i in range(3)]
        np.testing.assert_array_equal(np.float32([one["embedding"] for one in found["data"]]), wanted.array)
        assert llm.create_embedding("the cat")["model"] == llm.name


WRONG: list[Any] = ["", [], [[]], ["a", ""], b"x", None, 3, [1.5], ["a", 3], [["a"]], [300], [-1], {"a": 1}]


@pytest.mark.parametrize("text", WRONG, ids=repr)
def test_wrong_input(tiny_model: Callable[..., Path], text: Any) -> None:
    with LLM(tiny_model(), n_ctx=64, n_threads=2) as llm, pytest.raises(ParameterError) as caught:
        llm.embed(text)
    assert "\n" not in str(caught.value)


def test_a_text_too_long_is_refused_at_once(tiny_model: Callable[..., Path]) -> None:
    with LLM(tiny_model(), n_ctx=64, n_threads=2) as llm:
        steps = llm.engine._executor.steps
        with pytest.raises(ContextLengthError, match=r"65 tokens \(number 1\).*n_ctx = 64"):
            llm.embed([IDS[:64], IDS[:65]])
        assert llm.engine._executor.steps == steps
    with pytest.raises(ClosedError):
        llm.embed("the cat")


def test_streams_go_on_between_its_steps(tiny_model: Callable[..., Path]) -> None:
    """The stream's text and the embedding are those that each gives alone."""
    with LLM(tiny_model(n_ctx_train=1024), n_ctx=1024, n_threads=2) as llm:
        text = llm.generate("the cat", max_tokens=40, temperature=0)
        alone = llm.embed([IDS]).array
        llm.engine.cache.prefixes.clear()
        stream = llm.stream("the cat", max_tokens=40, temperature=0)
        pieces = [next(stream)]
        np.testing.assert_array_equal(llm.embed([IDS]).array, alone)  # by the thread that reads the stream
        found: list[np.ndarray] = []
        others = [threading.Thread(target=lambda: found.append(llm.embed([IDS]).array)) for _ in range(3)]
        for thread in others:
            thread.start()
        pieces += stream
        for thread in others:
            thread.join()
        assert "".join(pieces) == text
        assert len(found) == 3
        for array in found:
            np.testing.assert_array_equal(array, alone)


def test_it_takes_no_room_from_answers(tiny_model: Callable[..., Path]) -> None:
    """A stream whose context fills up and texts as long as the context: both are finished, in the cache of one."""
    with LLM(tiny_model(), n_ctx=64, n_threads=2) as llm:
        wanted = llm.generate(IDS[:20], max_tokens=None, temperature=0)
        alone = llm.embed([IDS[:64], IDS[64:128]]).array
        stream = llm.stream(IDS[:20], max_tokens=None, temperature=0)
        said = []
        for piece in stream:
            said.append(piece)
            np.testing.assert_array_equal(llm.embed([IDS[:64], IDS[64:128]]).array, alone)
        assert "".join(said) == wanted
        assert llm.stats().reused_tokens > 0  # what the cache had is there still
        guest, most = llm.engine.new_sequence(guest=True), llm.engine.cache.n_spare
        guest.reserve(64)
        assert llm.engine.cache.n_used >= 2 and most == 3
        with pytest.raises(ContextLengthError, match="KV cache is full: all 96 tokens"):
            llm.engine.new_sequence(guest=True).reserve(64)
        guest.close()


def test_a_broken_model_is_an_error(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    broken = merged(tiny_model(), tmp_path / "broken.gguf", ({"output_norm.weight": np.full(64, np.nan)}, 1.0))
    with LLM(broken, n_ctx=64, n_threads=2) as llm:
        with pytest.raises(HotcoldError, match="embeddings: got NaN"):
            llm.embed("the cat")
        assert llm.engine.cache.n_used == 0
