"""Tools in the prompt: through the model's chat template where it knows them, else as text in messages."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

from ..formats.chat_template import ChatTemplate
from ..formats.errors import HotcoldError, ParameterError
from .chat_prompt import Messages, check_messages

_INSTRUCTION = """\
You can call functions. Here they are, one a line:
{tools}

To call one, answer with its name and its arguments, and nothing else:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
What it returns comes back in <tool_response></tool_response>. Where no function helps, answer in plain words."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probekey": {"type": "string"}}, "required": ["probekey"]},
    },
}
_USER = {"role": "user", "content": "probe"}


class ToolPrompt:
    """How one chat template takes tools, calls and results; found out by rendering probes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = weakref.ref(template)  # it is the key under which this is kept
        self.knows_tools = "probe_tool" in self._render([_USER], [_TOOL])
        self.knows_system = "probe system" in self._render([{"role": "system", "content": "probe system"}, _USER])
        # content and arguments of an assistant's calls as the template wants them; None: it knows no calls
        styles: list[tuple[str | None, type]] = [(None, dict), ("", dict), (None, str), ("", str)]
        self.style = next((style for style in styles if self._fits(*style)), None)
        self.short_ids = "length" in template.source and "TOOL_CALLS" in template.source  # Mistral: 9 characters

    def prepare(
        self, messages: Messages, tools: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages, and tools or None, for the template: what it does not know has become text."""
        found = self._history(check_messages(messages))
        if tools and not self.knows_tools:
            found = self._instruct(found, tools)
        return found, tools if tools and self.knows_tools else None

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        template = self._template()
        assert template is not None
        try:
            return template.render(messages, tools=tools)
        except HotcoldError:
            return ""

    def _fits(self, content: str | None, kind: type) -> bool:
        arguments = {"probekey": "probevalue"}
        function = {"name": "probe_tool", "arguments": arguments if kind is dict else json.dumps(arguments)}
        call = {"id": "probe1234", "type": "function", "function": function}
        result = {"role": "tool", "tool_call_id": "probe1234", "name": "probe_tool", "content": "proberesult"}
        asked: list[dict[str, Any]] = [_USER, {"role": "assistant", "content": content, "tool_calls": [call]}, result]
        text = self._render(asked, [_TOOL])
        called = text.split("proberesult")[0]
        double = '\\"probekey' in called
        return "proberesult" in text and "probevalue" in called and not double and "None" not in text

    def _history(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names: dict[object, str] = {}  # of calls, by id
        found: list[dict[str, Any]] = []
        joins = False  # the last message is made of results, and takes the next one
        for i, message in enumerate(messages):
            role, calls = message["role"], _checked_calls(i, message.pop("tool_calls", None))
            names.update((str(call.get("id")), call["function"]["name"]) for call in calls)
            is_result = role in ("tool", "function")
            if is_result and self.style is None:
                text = f"<tool_response>\n{message['content'] or ''}\n</tool_response>"
                if joins:
                    found[-1]["content"] += "\n" + text
                else:
                    found.append({"role": "user", "content": text})
            elif is_result:
                id = message.get("tool_call_id")
                name = names.get(str(id))
                message |= {"role": "tool", "tool_call_id": self._id(id)}
                found.append({"name": name, **message} if name else message)
            elif calls:
                found.append(self._with_calls(message, calls))
            else:
                content = "" if role == "assistant" and message["content"] is None else message["content"]
                found.append({**message, "role": "system" if role == "developer" else role, "content": content})
            joins = is_result and self.style is None
        return found

    def _with_calls(self, message: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
        if self.style is None:
            written = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
            texts = [*filter(None, [message["content"]]), *(f"<tool_call>\n{text}\n</tool_call>" for text in written)]
            return {**message, "content": "\n".join(texts)}
        content, kind = self.style
        for call in calls:
            call["id"] = self._id(call.get("id"))
            if kind is str and not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**message, "content": message["content"] or content, "tool_calls": calls}

    def _id(self, id: object) -> object:
        fits = isinstance(id, str) and len(id) == 9 and id.isascii() and id.isalnum()
        return id if fits or not self.short_ids else hashlib.sha256(str(id).encode("utf-8", "replace")).hexdigest()[:9]

    def _instruct(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = _INSTRUCTION.format(tools=lines)
        first = messages[0]
        if first["role"] == "system":
            parts = [first["content"], text]
        elif first["role"] == "user" and not self.knows_system:
            parts = [text, first["content"]]
        else:
            return [{"role": "system", "content": text}, *messages]
        return [{**first, "content": "\n\n".join(part for part in parts if part)}, *messages[1:]]


def tool_prompt(template: ChatTemplate) -> ToolPrompt:
    """The ToolPrompt of a template, made once."""
    found = _prompts.get(template)
    if found is None:
        found = _prompts[template] = ToolPrompt(template)
    return found


_prompts: weakref.WeakKeyDictionary[ChatTemplate, ToolPrompt] = weakref.WeakKeyDictionary()


def _checked_calls(i: int, calls: object) -> list[dict[str, Any]]:
    """An assistant message's calls, copied, with arguments as a dict where they are one."""
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple)):
        raise ParameterError(f"messages[{i}].tool_calls: got {type(calls).__name__}, wanted a list of calls")
    found = []
    for k, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            wanted = "a dict with a function that has a name and arguments"
            raise ParameterError(f"messages[{i}].tool_calls[{k}]: got {call!r:.60}, wanted {wanted}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                read = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                read = arguments  # what a model wrote, and broke
            arguments = read if isinstance(read, dict) else arguments
        elif arguments is None:
            arguments = {}
        elif not isinstance(arguments, Mapping):
            where = f"messages[{i}].tool_calls[{k}].function.arguments"
            raise ParameterError(f"{where}: got {type(arguments).__name__}, wanted JSON as a text")
        found.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return found
