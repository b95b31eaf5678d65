"""Cutting a graph of two units into segments, each run by its unit's executor when what it waits for is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from .graph import Graph, Node, memory_of


@dataclass
class Segment:
    """Nodes that one unit runs without a pause. waits: the segments of the other unit that must be done before."""

    index: int
    unit: str
    nodes: list[Node]
    waits: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What a timeline calls it."""
        first, last = self.nodes[0], self.nodes[-1]
        block = f"blk.{first.layer} " if first.layer >= 0 else ""
        return f"{block}{first.op}" + (f" .. {last.op}" if last is not first else "")


def schedule(graph: Graph) -> list[Segment]:
    """The segments, in the graph's order; a unit runs its own in that order, so it waits only for the other's.

    A segment ends where the unit changes, and after a fetch, as the CPU waits for nothing else the GPU does.
    """
    segments: list[Segment] = []
    for node in graph.nodes:
        if not segments or segments[-1].unit != node.unit or segments[-1].nodes[-1].op == "fetch":
            segments.append(Segment(len(segments), node.unit, []))
        segments[-1].nodes.append(node)
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    for segment in segments:
        for node in segment.nodes:
            reads = [memory_of(value) for value in node.reads]
            writes = [memory_of(value) for value in node.writes]
            before = [writer[value] for value in (*reads, *writes) if value in writer]
            before += [index for value in writes for index in readers.get(value, ())]
            for index in before:
                if segments[index].unit != segment.unit and index not in segment.waits:
                    segment.waits.append(index)
            for value in writes:
                writer[value], readers[value] = segment.index, []
            for value in reads:
                readers.setdefault(value, []).append(segment.index)
    return segments
