"""Figures of one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .usage import Usage


@dataclass
class Stats:
    """Figures of the last answer: tokens, seconds (a stream's consumer not counted), tokens a second.

    prompt_tokens counts the whole prompt, reused_tokens of it were cached; decode_tokens counts the answer,
    decode_steps the evaluations behind decode_s (the first token comes with the prompt). Steps that several answers
    share count for each of them.
    """

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    context_used: int = 0
    n_ctx: int = 0
    reused_tokens: int = 0
    first_s: float = 0.0  # from the question to the first token, waiting included
    total_s: float = 0.0  # and to the end
    guessed_tokens: int = 0  # by prompt lookup, of which right_guesses saved a step each
    right_guesses: int = 0
    usage: Usage | None = None  # of the FFNs, while the answer's tokens were evaluated one by one

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens evaluated a second; 0 where nothing was evaluated."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens that followed by evaluations of the answer, a second; 0 where there was none."""
        return (self.decode_steps + self.right_guesses) / self.decode_s if self.decode_s > 0 else 0.0
