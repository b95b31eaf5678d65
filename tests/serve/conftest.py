"""One server process over a tiny model, shared by the tests of this folder, and the official clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from serve_process import KEY, Served

N_CTX = 2048
N_PARALLEL = 4


@pytest.fixture(scope="session")
def served_model(tiny_model: Callable[..., Path]) -> Path:
    """The file that the server and the oracles open."""
    return tiny_model(n_ctx_train=N_CTX, seed=6)


@pytest.fixture(scope="session")
def server(served_model: Path) -> Iterator[Served]:
    """The process; tests leave it idle."""
    options = ("--parallel", N_PARALLEL, "--ctx", N_CTX, "--threads", 2)
    with Served(served_model, *map(str, options)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    """The synchronous client; it does not try again."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture
def async_client(server: Served) -> Callable[[], object]:
    """Opens the asynchronous client inside the test's own event loop."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[openai.AsyncOpenAI]:
        url = server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as found:
            yield found

    return opened


@pytest.fixture(scope="session")
def model(server: Served) -> str:
    """The model's id."""
    return server.model()
