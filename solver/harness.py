"""lm-evaluation-harness on an LLM in this process; needs the package lm_eval, and its tasks' data."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.errors import UnsupportedError

if TYPE_CHECKING:
    from ..runtime.llm import LLM

ANSWER_TOKENS = 256  # where a task does not say


def check() -> None:
    """UnsupportedError if the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("--tasks needs lm-evaluation-harness: pip install lm-eval")


def run(
    llm: LLM, tasks: Sequence[str], limit: int | None = None, folder: Path | None = None
) -> dict[str, dict[str, float]]:
    """Numbers by task and metric. limit: questions of each, None: all. folder: of more tasks, as YAML files.

    UnsupportedError: the package is missing, or cannot run a task (unknown, its data is not at hand).
    """
    check()
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder) if folder else None)
        settings = {"task_manager": manager, "limit": limit, "bootstrap_iters": 0, "log_samples": False}
        found = simple_evaluate(adapter(llm), tasks=list(tasks), **settings)
    except Exception as error:  # whatever the harness, its data or the network makes of it
        lines = str(error).strip().splitlines() or ["no reason given"]
        what = f"--tasks {','.join(tasks)}: lm-evaluation-harness: {type(error).__name__}: {lines[0]:.200}"
        raise UnsupportedError(f"{what}; wanted tasks that it knows, with their data at hand") from error
    return {
        # metrics are named with a filter, "acc,none", unlike what else there is
        task: {name: float(x) for name, x in scores.items() if "," in name and isinstance(x, (int, float))}
        for task, scores in found["results"].items()
    }


def adapter(llm: LLM) -> Any:
    """An lm_eval model over an LLM: log probabilities out of raw logits, softmax in double precision."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    n_ctx, eos = llm.n_ctx, llm.tokenizer.eos_id
    end = [] if eos is None else [llm.tokenizer.token_text(eos)]

    class Adapter(TemplateLM):
        eot_token_id = eos
        tokenizer_name = "hotcold"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return llm.tokenize(string, add_bos=False, special=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            found = []
            for _, context, continuation in requests:
                ids = (context + continuation)[-(n_ctx - 1) :]
                rows = llm.logits(ids)[-len(continuation) - 1 : -1].astype(np.float64)
                rows -= rows.max(axis=1, keepdims=True)
                chosen = rows[np.arange(len(rows)), continuation] - np.log(np.exp(rows).sum(axis=1))
                found.append((float(chosen.sum()), bool((rows.argmax(axis=1) == continuation).all())))
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=n_ctx - 2, context_len=1,
                )  # fmt: skip
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found = []
            for request in requests:
                context, wanted = request.args
                n, until = wanted.get("max_gen_toks", ANSWER_TOKENS), wanted.get("until") or []
                stop = [*([until] if isinstance(until, str) else until), *end]
                ids = self.tok_encode(context)[-max(1, n_ctx - n) :]
                found.append(llm.generate(ids, max_tokens=n, stop=stop, temperature=0))
            return found

    return Adapter()
