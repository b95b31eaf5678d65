"""Messages -> prompt token ids; only the template's own control tokens count, never those in a message or a tool."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..formats.chat_template import ChatTemplate
from ..formats.errors import ParameterError, UnsupportedError
from ..formats.tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
_SPEAKERS = ("system", "developer", "user")


class ChatPrompt:
    """Turns conversations into token ids for one tokenizer and template; check_length: of a text, before it is cut."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, check_length: Callable[[int], None] = lambda length: None
    ) -> None:
        self.tokenizer, self.template, self.check_length = tokenizer, template, check_length
        self._control: re.Pattern[str] | None = None

    def encode(self, messages: Messages, tools: list[Any] | None = None) -> list[int]:
        """Prompt ids of a conversation (a str is one user message), ready for the assistant's answer."""
        checked = check_messages(messages)
        hidden: dict[str, str] = {}
        nonce = f"hotcold{secrets.token_hex(8)}x"

        def hide(match: re.Match[str]) -> str:
            name = f"{nonce}{len(hidden)}x"
            hidden[name] = match[0]
            return name

        control = self._control_pattern()
        safe = [_map_text(message, lambda text: control.sub(hide, text)) for message in checked]
        # descriptions of tools come from others, too
        safe_tools = tools and [_map_text(tool, lambda text: control.sub(hide, text)) for tool in tools]
        text = self.template.render(safe, add_generation_prompt=True, tools=safe_tools)
        self.check_length(len(text) - sum(len(name) - len(token) for name, token in hidden.items()))
        if not hidden:
            return self._with_ends(self.tokenizer.encode(text, add_bos=False, special=True))
        # Names are plain text, so what still matches is the template's: cut there, then put the texts back.
        ids: list[int] = []
        names = re.compile(f"{nonce}[0-9]+x")
        done = 0
        for match in [*control.finditer(text), None]:
            plain = names.sub(lambda name: hidden[name[0]], text[done : match.start() if match else None])
            ids += self.tokenizer.encode(plain, add_bos=False) if plain else []
            if match:
                ids += self.tokenizer.encode(match[0], add_bos=False, special=True)
                done = match.end()
        return self._with_ends(ids)

    def _with_ends(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _control_pattern(self) -> re.Pattern[str]:
        if self._control is None:
            known = self.tokenizer
            texts = {known.token_text(i) for i in range(known.n_vocab) if known.is_control(i)} - {""}
            # the longest first: Python's alternation takes the first that fits; (?!) matches nothing
            self._control = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
        return self._control


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as dicts with a role and text content (parts joined); ParameterError, UnsupportedError."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise ParameterError(f"messages: got {messages!r:.60}, wanted a text or a non-empty list of dicts")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ParameterError(f"messages[{i}]: got {message!r:.60}, wanted a dict with a role and content")
        content = _content(i, message.get("content"))
        if content is None and message["role"] in _SPEAKERS:  # templates put it behind other text
            raise ParameterError(f"messages[{i}].content: got none, wanted a text or a list of parts")
        checked.append({**message, "content": content})
    return checked


def _content(i: int, content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ParameterError(f"messages[{i}].content: got {type(content).__name__}, wanted a text or a list of parts")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedError(f"messages[{i}].content: got a part of type {part.get('type')!r}, supported is text")
    return "".join(part["text"] for part in content)


def _map_text(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy of nested dicts and lists with every text and key changed, except roles."""
    if isinstance(value, str):
        return value if key == "role" else change(value)
    if isinstance(value, Mapping):
        return {change(str(name)): _map_text(item, change, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    return value
