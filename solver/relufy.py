"""Turn a SwiGLU or GeGLU model into a ReLU model: train its FFNs against itself, resumably, and write the new file.

First each layer in turn, on the student's own inputs, so that the residual after it meets the teacher's; then all
layers together, so that the student's next-token distribution meets the teacher's at the wanted density.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError, StorageError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.pages import forget
from ..formats.section_file import update_section
from ..formats.section_layout import sidecar_path
from ..formats.types import GGMLType
from . import relu_file
from .corpus import Corpus
from .work import Work

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .distill import Student
    from .torch_model import TorchModel

WINDOW = 256  # tokens; attention stays as it is, so longer ones would only cost time
HELD_OUT = 16  # windows that are never trained on
MIN_WINDOWS = 64
MAX_DIALOGUES = 768  # windows; more are repeated
SAVES = 20  # of the training of all layers together
TRAINED = ("silu", "gelu")


@dataclass(frozen=True)
class Recipe:
    """How long to train, and for what.

    tokens and epochs: text of the layers in turn; polish: tokens of all layers together (0 leaves that out);
    density: mean share of active neurons to reach; chat: share of conversations that the model writes itself.
    """

    tokens: int = 98304
    epochs: int = 3
    polish: int = 614400
    density: float = 0.33
    chat: float = 0.33
    seed: int = 0

    def __post_init__(self) -> None:
        least = MIN_WINDOWS * WINDOW
        for name, low in (("tokens", least), ("epochs", 1), ("polish", 0), ("seed", 0)):
            if (got := getattr(self, name)) < low:
                raise ParameterError(f"{name}: got {got}, wanted at least {low}")
        if 0 < self.polish < WINDOW:
            raise ParameterError(f"polish: got {self.polish}, wanted 0 or at least {WINDOW}")
        if not 0.01 <= self.density <= 1.0:
            raise ParameterError(f"density: got {self.density}, wanted 0.01 to 1")
        if not 0.0 <= self.chat <= 0.9:
            raise ParameterError(f"chat: got {self.chat}, wanted 0 to 0.9")


@dataclass(frozen=True)
class Report:
    """What was made, measured on the held-out windows in the training's arithmetic."""

    teacher_perplexity: float
    perplexity: float
    densities: list[float]  # by layer
    n_dialogues: int  # windows that the model wrote itself

    @property
    def density(self) -> float:
        return sum(self.densities) / len(self.densities)


Say = Callable[[str], None]
Advance = Callable[[str, int, int], None]  # what, done, of


def relufy(
    source: GGUFFile, corpus: Corpus, out: Path, recipe: Recipe, kind: GGMLType, say: Say, advance: Advance
) -> Report:
    """Train and write OUT; work is kept in `OUT.relufy/` until then, and taken up from there by the next call.

    UnsupportedError: no PyTorch, or a model that is ReLU already or of another kind; ParameterError: too little text;
    TrainingError: losses that are no numbers; StorageError: OUT or its folder cannot be written.
    """
    config = ModelConfig.from_gguf(source)
    check_model(source, config)
    check(config, corpus, out)
    require_torch()
    work = work_folder(out, source, corpus, recipe)
    with work.locked():
        if work.begin():
            say(f"going on with the work kept in {work.folder}")
        student, report = _train(source, config, corpus, recipe, work, say, advance)

        def weights(layer: int) -> Mapping[str, np.ndarray]:
            tensors = student.ffns[layer].tensors()
            return {part: tensor.detach().numpy() for part, tensor in zip(relu_file.PARTS, tensors, strict=True)}

        relu_file.write(source, config, out, kind, weights, _notes(corpus, recipe, report))
        update_section(out, relu_file.section(config, kind, weights))
        forget(out)
        work.drop()
    return report


def check_model(source: GGUFFile, config: ModelConfig) -> None:
    """Raise UnsupportedError, which says why, for a model whose forward pass torch_model.py does not know."""
    c = config
    kinds = {
        "a mixture of experts": c.n_expert > 0,
        "an FFN without a gate": not c.gated,
        "an FFN whose gate and up projections are one tensor": "blk.0.ffn_gate.weight" in source.rows,
        "an FFN with biases": any(c.has(f"ffn_{part}.bias") for part in relu_file.PARTS),
        "layer norms": c.norm != "rms",
        "attention and FFN side by side": c.parallel,
        "norms after attention and FFN": c.has("post_attention_norm.weight") or c.has("post_ffw_norm.weight"),
        "norms of queries and keys": c.has("attn_q_norm.weight"),
        "no rotary positions": c.rope_dim == 0,
        "rotary positions that are not the same in all layers and contexts": (
            c.local_base > 0 or c.rope_scaling.kind == "longrope"
        ),
        "scaled embeddings, residuals or logits": (c.embd_scale, c.residual_scale, c.logit_scale) != (1.0, 1.0, 1.0),
        "soft caps": c.attn_softcap > 0 or c.logit_softcap > 0,
        "attention projections in one tensor": "blk.0.attn_q.weight" in source.rows,
    }
    for what, there in kinds.items():
        if there:
            raise UnsupportedError(
                f"{c.name!r:.60} has {what}: relufy retrains models with a gated FFN in blocks of the Llama kind "
                f"(RMS norms before attention and FFN, rotary positions), such as Llama, Mistral and Qwen2"
            )


def check(config: ModelConfig, corpus: Corpus, out: Path) -> None:
    """Raise what can be raised before hours of work."""
    if config.activation not in TRAINED:
        wanted = " or ".join(TRAINED)
        raise UnsupportedError(f"{config.name}: its activation is {config.activation} already, wanted {wanted}")
    least = (MIN_WINDOWS + HELD_OUT) * WINDOW
    if len(corpus) < least:
        raise ParameterError(f"{corpus.name}: got {len(corpus)} tokens, wanted at least {least}, better 300000")
    if out.is_dir() or not out.parent.is_dir():
        raise StorageError(f"{out}: {'a folder' if out.is_dir() else 'no such folder'}; name a file to write")
    if (side := sidecar_path(out)).exists():
        raise StorageError(f"{side}: the section of an earlier {out.name}; delete it, or name another file to write")


def require_torch(n_threads: int | None = None) -> None:
    """Set the number of PyTorch's threads (None: its own choice); UnsupportedError without PyTorch."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError("training needs PyTorch: pip install 'hotcold[train]'") from None
    if n_threads is not None:
        torch.set_num_threads(n_threads)


def work_folder(out: Path, source: GGUFFile, corpus: Corpus, recipe: Recipe) -> Work:
    """Where the work on OUT is kept, for this model, text and recipe."""
    model = hashlib.sha256()
    with open(source.path, "rb") as file:
        while block := file.read(1 << 24):
            model.update(block)
    return Work(out, "relufy", {"model": model.hexdigest(), "text": corpus.digest, **asdict(recipe)})


def _train(
    source: GGUFFile, config: ModelConfig, corpus: Corpus, recipe: Recipe, work: Work, say: Say, advance: Advance
) -> tuple[Student, Report]:
    import torch

    from .distill import Student
    from .torch_model import TorchModel, fastest_dtype

    windows = torch.from_numpy(_windows(corpus, recipe.seed)).long()
    held_out, windows = windows[:HELD_OUT], windows[HELD_OUT:]
    kept = work.load("dtype")  # the two types differ in their last digits, and a machine's speed may change
    dtype = getattr(torch, kept) if kept else fastest_dtype()
    work.save("dtype", str(dtype).removeprefix("torch."))
    student = Student(TorchModel(source, config, WINDOW, dtype), [])
    teacher_perplexity, _ = student.evaluate(held_out)
    say(f"teacher: perplexity {teacher_perplexity:.2f} on {held_out.numel()} held-out tokens")
    dialogues = _dialogues(student.teacher, source, recipe, work, advance)
    first, then = recipe.tokens // WINDOW, recipe.polish // WINDOW
    _in_turn(student, _mixed(windows, dialogues, 0, first, recipe.chat), held_out, recipe, work, say, advance)
    if recipe.polish:
        mixed = _mixed(windows, dialogues, first, then, recipe.chat)
        _together(student, mixed, held_out, recipe, work, say, advance)
    perplexity, densities = student.evaluate(held_out)
    return student, Report(teacher_perplexity, perplexity, densities, 0 if dialogues is None else len(dialogues))


def _windows(corpus: Corpus, seed: int) -> np.ndarray:
    """All whole windows of the text, shuffled; int32 [n, WINDOW]."""
    import numpy as np

    windows = corpus.ids[: len(corpus) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
    if corpus.bos is not None:
        windows[:, 0] = corpus.bos
    return np.random.default_rng(seed).permutation(windows)


def _dialogues(teacher: TorchModel, source: GGUFFile, recipe: Recipe, work: Work, advance: Advance) -> Tensor | None:
    """Conversations as windows int64 [n, WINDOW]; None where none are wanted, or the model has no chat template."""
    from . import dialogues

    n_windows = min(MAX_DIALOGUES, round(max(recipe.tokens, recipe.polish) * recipe.chat) // WINDOW)
    start = dialogues.opening(source, WINDOW) if n_windows else None
    if start is None:
        return None
    if (kept := work.load("dialogues")) is None:
        kept = dialogues.write(teacher, start, n_windows, WINDOW, recipe.seed, partial(advance, "writing dialogues"))
        work.save("dialogues", kept)
    return kept


def _mixed(windows: Tensor, dialogues: Tensor | None, start: int, n: int, chat: float) -> Tensor:
    """`n` windows: the share `chat` of dialogues, the rest text from number `start` on; both begin again at the end."""
    import torch

    n_chat = 0 if dialogues is None else round(n * chat)
    parts = [windows[torch.arange(start, start + n - n_chat) % len(windows)]]
    if dialogues is not None:
        parts.append(dialogues[torch.arange(n_chat) % len(dialogues)])
    return torch.cat(parts)


def _in_turn(
    student: Student, windows: Tensor, held_out: Tensor, recipe: Recipe, work: Work, say: Say, advance: Advance
) -> None:
    """Train layer after layer; those that are kept already are only walked through."""
    from .distill import Ffn, Sequential

    n_layer = student.teacher.config.n_layer
    kept = [work.load(f"layer-{layer}") for layer in range(n_layer)]
    streams = None if None not in kept else Sequential(student.teacher, windows)
    for layer in range(n_layer):
        if streams is not None:
            advance(f"layer {layer}: attention", layer, n_layer)
            streams.attend()
        if kept[layer] is not None:
            student.ffns.append(Ffn(*kept[layer]))
        elif streams is not None:
            result = streams.train(recipe.density, recipe.epochs, recipe.seed, partial(advance, f"layer {layer}"))
            work.save(f"layer-{layer}", [tensor.detach() for tensor in result.ffn.tensors()])
            student.ffns.append(result.ffn)
            perplexity, densities = student.evaluate(held_out)
            error = f"error {result.error:.3f}, held-out perplexity {perplexity:.2f}"
            say(f"layer {layer} of 0-{n_layer - 1}: {densities[-1]:.1%} active, {error}")
        if streams is not None and layer + 1 < n_layer:
            streams.pass_through(student.ffns[-1])


def _together(
    student: Student, windows: Tensor, held_out: Tensor, recipe: Recipe, work: Work, say: Say, advance: Advance
) -> None:
    """Train all layers at once; kept some twenty times on the way."""
    from .distill import Together

    training = Together(student, windows, recipe.density, recipe.seed)
    if (state := work.load("together")) is not None:
        training.load(state)
    every = -(-training.steps // SAVES)
    while training.done < training.steps:
        divergence, density = training.step()
        advance(f"all layers: {divergence:.3f} nats, {density:.1%} active", training.done, training.steps)
        if training.done % every == 0 or training.done == training.steps:
            work.save("together", training.state())
            perplexity, densities = student.evaluate(held_out)
            mean = sum(densities) / len(densities)
            at = f"step {training.done} of {training.steps}"
            say(f"all layers, {at}: {mean:.1%} active, held-out perplexity {perplexity:.2f}")


def _notes(corpus: Corpus, recipe: Recipe, report: Report) -> dict[str, Any]:
    """What the file says of its making."""
    made = f"{recipe.tokens} tokens x {recipe.epochs} epochs layer by layer, {recipe.polish} tokens all layers together"
    if report.n_dialogues:
        made += f"; {recipe.chat:.0%} of them dialogues of the model's own"
    return {
        "general.description": f"FFNs retrained with ReLU by hotcold relufy on {corpus.name}: {made}",
        "hotcold.relufy.texts": corpus.name.split(", "),
        **{f"hotcold.relufy.{name}": value for name, value in asdict(recipe).items()},
    }
