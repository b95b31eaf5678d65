"""The model as a graph: nodes that read and write named values, in an order that a single thread could run.

A value is an array with one row a token (`x` [n_tok, n_embd], ...), or the KV cache of a layer (`kv.3`). Values on the
GPU begin with `gpu.`. Values whose names differ only after a colon (`h:1024`) share their memory: they are one value of
several widths. A node's `unit` says where it runs; an executor lowers the nodes of its unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """One operation.

    op: embed, positions (add learned ones), norm, matmul, rope, attention, activate or pack; of a sparse FFN also
    select (write the list of active neurons), rows (a matmul of the listed rows) and down (add the listed rows, times
    h); of a mixture of experts route (choose experts, and list the pairs of a token and an expert), experts (a matmul
    of each pair with its expert's matrix) and combine (sum over a token's pairs, weighted). On the GPU an FFN is ffn
    (gate, rule and up in one, `up` being the second weight), down (into parts) and merge (base + parts), and route
    writes the weights of a share's experts for every token; send and fetch copy a value to and from the GPU.

    reads, writes: names of values; a node that adds to a value reads it too, but not first. weight, bias: tensor
    names. layer: index of the block, -1 outside. rows: "tokens", "outputs" where only the positions whose logits are
    wanted take part, or "pairs". branch: of a sparse FFN, the steps that the node belongs to: "sparse", "dense", or ""
    for all. function: of an activate, or of rows that are activated too; of a norm, "rms" or "layer". eps, group
    (values that are normed together; 0: all): of a norm. gain: a factor of a norm's or embedding's result. threshold,
    cut: the rule by which neurons are active (sparsity.py); cut is a tensor's name. limit: the most neurons that a
    select lists before the step is dense.
    """

    op: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weight: str = ""
    up: str = ""
    bias: str = ""
    up_bias: str = ""
    layer: int = -1
    rows: str = "tokens"
    branch: str = ""
    function: str = ""
    eps: float = 0.0
    group: int = 0
    gain: float = 1.0
    threshold: float = 0.0
    cut: str = ""
    limit: int = 0
    unit: str = "cpu"

    @property
    def adds(self) -> bool:
        """The result is added to what the written value holds."""
        return self.writes[0] in self.reads[1:]


@dataclass
class Graph:
    """Nodes in order, and the width (float32 a row) of every value that is an activation."""

    nodes: list[Node] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        self.nodes.append(node)


def memory_of(value: str) -> str:
    """The name under which a value's memory is kept: without its width."""
    return value.partition(":")[0]


def part(tensor: str, name: str) -> str:
    """The name of the "hot" or "cold" rows of a tensor."""
    return f"{tensor}@{name}"
