"""Answers of a real model to random JSON schemas: each must be valid, whatever is asked and however hot it runs.

    python tests/serve_schemas.py [--model smollm2] [--count 200] [--seed 0] [--tokens 400]

The schemas are those of tests/schemas.py; jsonschema judges. An answer that max_tokens cut off is asked for again with
more; one that is still cut off then is counted by itself and fails the run. Exit code 1 where anything is invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import jsonschema
import schemas
from serve_http import post, text_of
from serve_process import KEY, Served

from hotcold.runtime.models import resolve


async def ask(server: Served, model: str, schema: Any, seed: int, n_tokens: int, as_tool: bool) -> tuple[str, str]:
    """What became of one request (valid, cut off, ...), and the answer."""
    body: dict[str, Any] = {
        "model": model, "max_tokens": n_tokens, "temperature": 1.0 if seed % 2 else 0.0, "seed": seed,
        "messages": [{"role": "user", "content": "Invent an example of the data that is described. Answer in JSON."}],
    }  # fmt: skip
    if as_tool:
        body["tools"] = [{"type": "function", "function": {"name": "give", "parameters": schema}}]
        body["tool_choice"] = {"type": "function", "function": {"name": "give"}}
    else:
        shape = {"name": "data", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": shape}
    status, found = await post(server.url, "/v1/chat/completions", body, KEY)
    if status != 200:
        return f"status {status}", str(found)
    choice = found["choices"][0]
    text = choice["message"]["tool_calls"][0]["function"]["arguments"] if as_tool else text_of(found)
    if choice["finish_reason"] == "length":
        return "cut off", text
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=schemas.CHECKER)
    except ValueError as error:
        return f"no JSON: {error}", text
    except jsonschema.ValidationError as error:
        return f"invalid: {error.message[:120]}", text
    return "valid", text


async def run(server: Served, asked: list[Any], n_tokens: int, n_clients: int) -> list[tuple[str, str]]:
    """The fate of each schema's answer."""
    model = server.model()
    gate = asyncio.Semaphore(n_clients)

    async def one(number: int, schema: Any) -> tuple[str, str]:
        async with gate:
            # arguments of tools are objects
            as_tool = number % 4 == 3 and isinstance(schema, dict) and schema.get("type") == "object"
            for more in (1, 4):
                fate = await ask(server, model, schema, number, n_tokens * more, as_tool)
                if fate[0] != "cut off":
                    break
            return fate

    return await asyncio.gather(*(one(number, schema) for number, schema in enumerate(asked)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", default="2")
    options = parser.parse_args()
    asked = [schemas.make_schema(options.seed + number) for number in range(options.count)]
    start = time.perf_counter()
    with Served(
        resolve(options.model), "--parallel", str(options.clients), "--threads", options.threads, "--ctx", "4096"
    ) as server:
        fates = asyncio.run(run(server, asked, options.tokens, options.clients))
    counts = Counter(fate.split(":")[0] for fate, _ in fates)
    for number, (fate, text) in enumerate(fates):
        if fate != "valid":
            print(json.dumps({"schema": asked[number], "fate": fate, "answer": text[:300]}), file=sys.stderr)
    distinct = len({text for _, text in fates})
    print(
        json.dumps(
            {
                "schemas": len(asked),
                **counts,
                "different_answers": distinct,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )
    sys.exit(0 if counts["valid"] == len(asked) else 1)


if __name__ == "__main__":
    main()
