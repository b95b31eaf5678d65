"""Keys and values on disk: a file of the cached blocks and their tokens, which the same model takes up again.

Little endian: a head (_HEAD), for each block its parent, how many tokens it has and KV_BLOCK ids (int32), then for each
block its keys and its values of all layers as the cache has them, and the SHA-256 of all that. A parent comes before
its children; -1 is none. Lanes without a token are zero.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ContextLengthError, FormatError, ModelNotFoundError
from .cpu.layout import KV_BLOCK

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from .engine import Engine
    from .kv_cache import KVCache
    from .scheduler import Scheduler

MAGIC, VERSION = b"HOTCOLDS", 2
# Magic, version, identity, types of keys and values, layers, block, bytes of its keys and values, blocks.
_HEAD = struct.Struct("<8sI32s8s8sIIIII")
_DIGEST, _PIECE, _SAMPLE = 32, 1 << 20, 64
_TABLE_ROW = 2 + KV_BLOCK


def identity(engine: Engine) -> bytes:
    """SHA-256 of what keys and values depend on: the model's numbers, samples of its weights, what else is computed."""
    from ..formats.section_layout import tensor_hash  # who saves nothing shall not wait for it

    file, config, plan = engine.file, engine.config, engine.plan
    digest = hashlib.sha256(tensor_hash(file).encode())
    for field in fields(config):
        if field.name not in ("name", "tensors", "n_ctx_train", "sampling", "pooling"):
            digest.update(f"{field.name}={getattr(config, field.name)}\n".encode())
    for name in sorted(file.tensors):
        data = file.data(name)
        for start in (0, len(data) // 2, max(0, len(data) - _SAMPLE)):
            digest.update(data[start : start + _SAMPLE].tobytes())
    if plan and plan.sparsity.kind in ("threshold", "predict"):
        digest.update(repr(plan).encode())
    if config.rope_scaling.kind == "longrope":
        digest.update(bytes([engine.n_ctx > config.rope_scaling.orig_ctx]))
    for name, change in sorted(engine.changes.items()):
        digest.update(name.encode() + change.factors.a.tobytes() + change.factors.b.tobytes())
    return digest.digest()


class Snapshot:
    """The blocks that a cache knows by their tokens, held until close(); nobody changes them meanwhile.

    To be made and closed in the engine's turn; write() may run beside its steps. If these need the blocks, the cache
    has them back, and what is not written yet is kept in memory of its own.
    """

    def __init__(self, engine: Engine) -> None:
        cache, self._config = engine.cache, engine.config
        self._cache = cache
        self._identity = identity(engine)
        nodes = sorted(cache.prefixes.nodes(), key=lambda node: -node.used)  # no child is used later than its parent
        index = {id(node): i for i, node in enumerate(nodes)}
        self._rows = [(index.get(id(node.parent), -1), node.tokens, cache.hold(node.block)) for node in nodes]
        self._lock = threading.Lock()  # guards what follows
        self._written, self._holds = 0, True
        self._copies: dict[int, list[bytes]] = {}  # by row
        cache.lenders.append(self.give_back)

    @property
    def n_tokens(self) -> int:
        """Tokens in all blocks."""
        return sum(len(tokens) for _, tokens, _ in self._rows)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; StorageError where the disk refuses."""
        from ..formats.section_file import replacing

        layers, key_bytes, value_bytes = _geometry(self._cache)
        types = (kind.name.encode() for kind in (self._cache.types.keys, self._cache.types.values))
        head = MAGIC, VERSION, self._identity, *types, layers, KV_BLOCK, key_bytes, value_bytes, len(self._rows)
        table = np.zeros((len(self._rows), _TABLE_ROW), "<i4")
        for row, (parent, tokens, _) in zip(table, self._rows, strict=True):
            row[:2] = parent, len(tokens)
            row[2 : 2 + len(tokens)] = tokens
        digest = hashlib.sha256()
        with replacing(path, "name a file that can be written there", own=True) as part, open(part, "xb") as file:
            for piece in (_HEAD.pack(*head), table.tobytes()):
                digest.update(piece)
                file.write(piece)
            for number in range(len(self._rows)):
                with self._lock:
                    pieces = self._copies.pop(number, None) or self._pieces(number)
                    self._written = number + 1
                for data in pieces:
                    digest.update(data)
                    file.write(data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())

    def _pieces(self, row: int) -> list[bytes]:
        _, tokens, block = self._rows[row]
        return [bytes(data) for data in _block(self._cache, self._config, block, len(tokens))]

    def give_back(self) -> None:
        """Let the blocks go, in the engine's turn, and keep copies of those that are not written."""
        with self._lock:
            if self._holds:
                self._copies = {row: self._pieces(row) for row in range(self._written, len(self._rows))}
                self._let_go()

    def close(self) -> None:
        """Let the blocks go."""
        with self._lock:
            self._copies = {}
            if self._holds:
                self._let_go()

    def _let_go(self) -> None:
        self._holds = False
        self._cache.lenders.remove(self.give_back)
        self._cache.give([block for _, _, block in self._rows])


def _geometry(cache: KVCache) -> tuple[int, int, int]:
    return cache.keys.shape[0], cache.keys.shape[2], cache.values.shape[2]


def _block(cache: KVCache, config: ModelConfig, block: int, n_tokens: int) -> Iterator[memoryview]:
    """A block's keys and values, without what lies where it has no tokens."""
    keys, values = cache.keys[:, block].copy(), cache.values[:, block].copy()
    if n_tokens < KV_BLOCK:
        cache.types.keys.clear(keys, config.head_dim_k, n_tokens, keys=True)
        cache.types.values.clear(values, config.head_dim_v, n_tokens, keys=False)
    yield keys.data
    yield values.data


class Saved:
    """A file of another run, open, checked and fit for an engine; FormatError where it is not.

    n_tokens: in all of its blocks.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self._engine, self._cache = path, engine, engine.cache
        self._file = _open(path)
        try:
            self._read_head()
            self._check_digest()
            self._read_table()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> None:
        raw = self._file.read(_HEAD.size)
        if len(raw) < _HEAD.size or not raw.startswith(MAGIC):
            raise FormatError(self.path, "magic", repr(raw[:8]), f"{MAGIC!r}, as saved states have it")
        _, version, own, keys, values, layers, block, key_bytes, value_bytes, n_blocks = _HEAD.unpack(raw)
        if version != VERSION:
            raise FormatError(self.path, "version", version, f"{VERSION}; delete it, or save it anew")
        geometry = _geometry(self._cache)
        if own != identity(self._engine) or layers != geometry[0] or block != KV_BLOCK:
            name = f"{self._engine.config.name!r:.60}"
            got = "another model's, or one of other settings (adapters, sparsity)"
            raise FormatError(self.path, "state", got, f"one of {name}; name another file, or delete it")
        kinds = self._cache.types.keys.name, self._cache.types.values.name
        found = tuple(name.rstrip(b"\0").decode("ascii", "replace") for name in (keys, values))
        if found != kinds or (key_bytes, value_bytes) != geometry[1:]:
            got, wanted = (f"{key!r:.20} keys and {value!r:.20} values" for key, value in (found, kinds))
            raise FormatError(self.path, "cache types", got, f"{wanted}: open the model with the file's, or delete it")
        self._node_bytes = layers * (key_bytes + value_bytes)
        size = os.fstat(self._file.fileno()).st_size
        wanted = _HEAD.size + n_blocks * (4 * _TABLE_ROW + self._node_bytes) + _DIGEST
        if size != wanted:
            raise FormatError(self.path, "size", f"{size} bytes", f"{wanted}: the file is torn; delete it")
        self._n_blocks, self._data = n_blocks, _HEAD.size + n_blocks * 4 * _TABLE_ROW

    def _check_digest(self) -> None:
        digest = hashlib.sha256()
        self._file.seek(0)
        left = self._data + self._n_blocks * self._node_bytes
        while left and (piece := self._file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        if self._file.read(_DIGEST) != digest.digest():
            raise FormatError(self.path, "checksum", "another", "that of its bytes: the file is damaged; delete it")

    def _read_table(self) -> None:
        self._file.seek(_HEAD.size)
        raw = self._file.read(self._data - _HEAD.size)
        self._table = np.frombuffer(raw, "<i4").reshape(-1, _TABLE_ROW)
        parents, counts, ids = self._table[:, 0], self._table[:, 1], self._table[:, 2:]
        given = np.arange(KV_BLOCK) < counts[:, None]
        inner = parents[parents >= 0]
        good = (
            (parents >= -1).all()
            and (parents < np.arange(len(parents))).all()
            and (counts > 0).all()
            and (counts <= KV_BLOCK).all()
            and (counts[inner] == KV_BLOCK).all()
            and ((ids >= 0) & (ids < self._engine.n_vocab))[given].all()
        )
        if not good:
            raise FormatError(self.path, "table of blocks", "impossible ones", "full parents first, and token ids")
        self.n_tokens = int(counts.sum())

    def restore(self) -> int:
        """Put its blocks into the cache, as far as there is room, those used last in the end; tokens put there.

        In the engine's turn.
        """
        leaves = np.setdiff1d(np.arange(self._n_blocks), self._table[:, 0])
        return sum(self._restore(int(leaf)) for leaf in leaves[::-1])

    def _restore(self, leaf: int) -> int:
        path = [leaf]
        while self._table[path[-1], 0] >= 0:
            path.append(int(self._table[path[-1], 0]))
        path = path[::-1][: self._engine.n_ctx // KV_BLOCK]
        ids = [id for node in path for id in self._table[node, 2 : 2 + self._table[node, 1]].tolist()]
        sequence = self._engine.new_sequence()
        try:
            if sequence.adopt([*ids, 0]) == len(ids):  # what is there already; it never takes the last
                return 0
            sequence.truncate(len(sequence) // KV_BLOCK * KV_BLOCK)
            held = len(sequence)
            sequence.reserve(len(ids) - held)
            for i in range(held // KV_BLOCK, len(path)):
                keys, values = self._read_block(path[i])
                self._cache.keys[:, sequence.table[i]] = keys
                self._cache.values[:, sequence.table[i]] = values
            sequence.tokens.extend(ids[held:])
            sequence.share(tail=True)
            return len(ids) - held
        except ContextLengthError:  # running answers need all that is left
            return 0
        finally:
            sequence.close()

    def _read_block(self, node: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        self._file.seek(self._data + node * self._node_bytes)
        raw = np.frombuffer(self._file.read(self._node_bytes), np.uint8)
        layers, key_bytes, value_bytes = _geometry(self._cache)
        if len(raw) != self._node_bytes:
            raise FormatError(self.path, "size", "a file that became shorter", "one that nobody changes")
        keys, values = np.split(raw, [layers * key_bytes])
        return keys.reshape(layers, key_bytes), values.reshape(layers, value_bytes)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stateful:
    """The part of LLM that keeps states on disk; LLM supplies what is declared here."""

    scheduler: Scheduler
    _prompt_cache: Path | None = None

    def save_state(self, path: str | os.PathLike[str]) -> int:
        """Write what prompts and answers have left in the cache to a file, whole or not at all; how many tokens.

        Answers go on meanwhile. StorageError where the disk refuses, UnsupportedError with a GPU.
        """
        with self.scheduler.exclusive() as engine:
            snapshot = engine.snapshot()
        try:
            snapshot.write(Path(path))
            return snapshot.n_tokens
        finally:
            with self.scheduler.steps:
                snapshot.close()

    def load_state(self, path: str | os.PathLike[str]) -> int:
        """Take up a file that save_state has written: prompts that begin as those did are computed from there on.

        How many tokens there was room for. FormatError where the file is damaged, or of another model or settings.
        """
        with self.scheduler.exclusive() as engine, engine.saved(Path(path)) as saved:
            return saved.restore()

    def _use_prompt_cache(self, path: str | os.PathLike[str] | None) -> None:
        """Load a file, if it is there, and have _keep_prompt_cache write it."""
        if path is not None and Path(path).exists():
            self.load_state(path)
        elif path is not None:
            self.scheduler.engine.snapshot().close()  # refused now where it would be in the end
        self._prompt_cache = None if path is None else Path(path)

    def _keep_prompt_cache(self) -> None:
        if self._prompt_cache is None or self.scheduler.closed:
            return
        if any(self.scheduler.engine.cache.prefixes.nodes()):
            self.save_state(self._prompt_cache)


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise ModelNotFoundError(f"{path} is not a regular file: name one that save_state wrote")
        return open(path, "rb")
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
