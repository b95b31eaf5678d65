"""Graphs for two units, and their schedule: who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from hotcold import GGUFFile
from hotcold.formats.config import ModelConfig
from hotcold.runtime.decoder import Split, build
from hotcold.runtime.graph import Graph, Node, memory_of
from hotcold.runtime.schedule import Segment, schedule


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("schedule") / "tiny.gguf"
    tiny.make_tiny_model(path, n_layer=3, n_ff=128)
    with GGUFFile(path) as file:
        return ModelConfig.from_gguf(file)


def split(config: ModelConfig, attention: str, hot: tuple[int, ...], head: bool) -> list[Segment]:
    return schedule(build(config, None, (), Split(tuple(c == "g" for c in attention), hot, head)))


def ops(segment: Segment) -> list[str]:
    return [node.op for node in segment.nodes]


def test_without_a_split_all_is_one_segment_on_the_cpu(config: ModelConfig) -> None:
    (only,) = schedule(build(config))
    assert only.unit == "cpu" and not only.waits and ops(only)[0] == "embed"
    assert schedule(build(config, None, (), Split((False,) * 3, (0,) * 3, False)))[0].nodes == only.nodes


def test_a_model_on_the_gpu_leaves_the_embedding_to_the_cpu(config: ModelConfig) -> None:
    first, second = split(config, "ggg", (128,) * 3, True)
    assert (first.unit, ops(first), first.waits) == ("cpu", ["embed"], [])
    assert (second.unit, second.waits) == ("gpu", [0])
    assert ops(second)[0] == "send" and ops(second)[-1] == "fetch" and ops(second).count("send") == 1
    assert second.nodes[-1].rows == "outputs"


def test_the_cold_neurons_wait_for_the_fetch_and_run_beside_the_hot_ones(config: ModelConfig) -> None:
    segments = split(config, "ggg", (64, 64, 64), True)
    cold = [s for s in segments if s.unit == "cpu" and "select" in ops(s)]
    hot = [s for s in segments if s.unit == "gpu" and "ffn" in ops(s)]
    assert len(cold) == len(hot) == 3
    for here, there in zip(cold, hot, strict=True):
        assert [ops(segments[i])[-1] for i in here.waits] == ["fetch"]
        assert there.index not in here.waits and here.index not in there.waits  # so the two overlap
    merges = [s for s in segments if "merge" in ops(s)]
    assert [here.index in merge.waits for here, merge in zip(cold, merges, strict=True)] == [True] * 3


def test_every_value_is_where_it_is_read(config: ModelConfig) -> None:
    """Running the schedule over sets of up-to-date values: nothing is read before it was written on that unit."""
    for attention in ("ggg", "ccc", "gcg", "cgc"):
        for hot in ((0, 0, 0), (64, 0, 128), (128, 64, 32)):
            for head in (False, True):
                written: set[str] = set()
                for segment in split(config, attention, hot, head):
                    for node in segment.nodes:
                        assert set(node.reads) <= written, (attention, hot, head, node)
                        written |= set(node.writes)
                assert "logits" in written


def test_a_split_layer_takes_its_own_rows(config: ModelConfig) -> None:
    graph = build(config, None, (), Split((True,) * 3, (64, 128, 0), True))
    weights = {node.weight for node in graph.nodes} | {node.up for node in graph.nodes}
    assert {"blk.0.ffn_gate.weight@hot", "blk.0.ffn_up.weight@hot", "blk.0.ffn_down_t.weight@hot"} <= weights
    assert {"blk.0.ffn_gate.weight@cold", "blk.0.ffn_up.weight@cold", "blk.0.ffn_down_t.weight@cold"} <= weights
    assert {"blk.1.ffn_down.weight", "blk.2.ffn_down.weight"} <= weights  # whole layers need no other form
    assert graph.widths["h:64"] == 64 and graph.widths["gpu.h:64"] == 64 and graph.widths["gpu.h:128"] == 128


def test_who_writes_what_another_still_reads_waits() -> None:
    """Write after read, and write after write, across units, count too."""
    graph = Graph(widths={"x": 1, "gpu.x": 1})
    graph.add(Node("embed", (), ("x",)))
    graph.add(Node("send", ("x",), ("gpu.x",), unit="gpu"))
    graph.add(Node("norm", ("y:3",), ("x",)))
    graph.add(Node("fetch", ("gpu.x",), ("x",), unit="gpu"))
    graph.add(replace(graph.nodes[2], reads=("x",), writes=("y:4",)))
    assert [set(s.waits) for s in schedule(graph)] == [set(), {0}, {1}, {2}, {3}]
    assert memory_of("y:3") == memory_of("y:4") == "y"
