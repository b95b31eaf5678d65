"""The plugin of the llm tool, through llm's own API and its command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fakes
import pytest

llm = pytest.importorskip("llm", reason="the extra `llm` is not installed")
from click.testing import CliRunner  # noqa: E402

from hotcold import LLM  # noqa: E402
from hotcold.runtime import models  # noqa: E402
from hotcold.tools import llm_models, llm_plugin  # noqa: E402

# as llm does it where hotcold is installed; its command line takes the plugins' commands when it is imported
if not llm.plugins.pm.is_registered(llm_plugin):
    llm.plugins.pm.register(llm_plugin, name="hotcold")
cli = import_module("llm.cli").cli
CLONE = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """llm's and hotcold's folders, empty."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "hotcold"))
    yield
    for model in llm_models._open.values():
        model.close()
    llm_models._open.clear()


def run(*arguments: str, code: int = 0, input: str | None = None) -> str:
    """llm's command line, in this process."""
    done = CliRunner().invoke(cli, arguments, input=input)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> Path:
    """A model that llm knows as hotcold:tiny."""
    path = tiny_model(seed=3)
    assert run("hotcold", "add", str(path), "--name", "tiny") == "hotcold:tiny\n"
    return path


@pytest.fixture
def oracle(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny) as model:
        yield model


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "repeat_penalty": 1.1}


def test_entry_point() -> None:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (module,) = project["entry-points"]["llm"].values()
    assert import_module(module) is llm_plugin
    extra = project["optional-dependencies"]["llm"]
    assert extra[0].startswith("llm>=") and extra[1:] == project["optional-dependencies"]["schema"]  # -s, --schema


def test_names(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Aliases, what is in the hub's cache, and what was added."""
    folder = models.home() / "hub" / "models--org--some--repo"
    snapshot = folder / "snapshots" / "abc"
    (snapshot / "sub").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    for name in ("a-Q4_0.gguf", "sub/b.gguf", "mmproj-a.gguf", "c-00001-of-00002.gguf", "notes.txt"):
        (snapshot / name).write_bytes(b"GGUF")
    (snapshot / "gone.gguf").symlink_to("nowhere")
    (models.home() / "hub" / "models--broken--one").mkdir()
    path = tiny_model(seed=3)
    assert run("hotcold", "add", str(path)) == f"hotcold:{path.stem}\n"
    assert run("hotcold", "list").splitlines() == [
        "hotcold:smollm2",
        "hotcold:hf:org/some--repo/a-Q4_0.gguf",
        "hotcold:hf:org/some--repo/sub/b.gguf",
        f"hotcold:{path.stem}  {path}",
    ]
    for command in (["models"], ["embed-models"]):
        listed = run(*command)
        assert "hotcold: hotcold:smollm2" in listed and f"hotcold:{path.stem}" in listed
    assert run("hotcold", "add", "hf:org/some--repo/a-Q4_0.gguf", "--name", "a") == "hotcold:a\n"
    assert models.resolve(llm_plugin.known()["a"]) == snapshot / "a-Q4_0.gguf"
    assert run("hotcold", "remove", "hotcold:a") == "" and "hotcold:a\n" not in run("hotcold", "list")
    assert "was not added" in run("hotcold", "remove", "smollm2", code=1)
    assert "no such file" in run("hotcold", "add", str(tmp_path / "nothing.gguf"), code=1)


@pytest.mark.parametrize("content", ["{not json", "[]", '{"a": 1}'])
def test_damaged_list(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    llm_plugin.list_file().parent.mkdir(parents=True, exist_ok=True)
    llm_plugin.list_file().write_text(content)
    assert list(llm_plugin.known()) == ["smollm2"]
    assert "hotcold.json" in capsys.readouterr().err


def test_model_that_is_gone(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    path = tmp_path / "short-lived.gguf"
    path.write_bytes(tiny_model(seed=3).read_bytes())
    run("hotcold", "add", str(path))
    path.unlink()
    assert "hotcold:short-lived" in run("models")
    output = run("-m", "hotcold:short-lived", "Hi", code=1)
    assert output.startswith("Error: ") and "no such file" in output


def test_old_llm_is_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(llm.Prompt, "messages")
    llm_plugin.register_models(pytest.fail)
    llm_plugin.register_embedding_models(pytest.fail)
    assert "too old" in capsys.readouterr().err


def test_nothing_heavy_is_loaded_to_list_models(tmp_path: Path) -> None:
    code = (
        "import sys, llm, hotcold.tools.llm_plugin as plugin\n"
        "if not llm.plugins.pm.is_registered(plugin): llm.plugins.pm.register(plugin, name='hotcold')\n"
        "assert llm.get_model('hotcold:smollm2') and llm.get_async_model('hotcold:smollm2')\n"
        "assert llm.get_embedding_model('hotcold:smollm2')\n"
        "heavy = {'numba', 'gguf', 'jinja2', 'huggingface_hub', 'tokenizers', 'hotcold.runtime.llm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_prompt(oracle: LLM) -> None:
    model = llm.get_model("hotcold:tiny")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello world"}]
    wanted = oracle.chat(messages, **GREEDY)
    response = model.prompt("hello world", system="Be kind.", **GREEDY)
    pieces = list(response)
    assert "".join(pieces) == wanted == response.text() and len(pieces) > 1
    usage = response.usage()
    assert usage.input == len(oracle.ask_chat(messages, 0).request.ids) and 0 < usage.output <= 12
    assert model.prompt("hello world", system="Be kind.", stream=False, **GREEDY).text() == wanted
    assert len(llm_models._open) == 1  # opened once


def test_options(oracle: LLM) -> None:
    model = llm.get_model("hotcold:tiny")
    wanted = oracle.chat("hello", temperature=1.5, seed=5, max_tokens=8, top_k=50, min_p=0, top_p=1, repeat_penalty=1.3)
    options = {"temperature": 1.5, "seed": 5, "max_tokens": 8, "top_k": 50, "min_p": 0, "top_p": 1}
    assert model.prompt("hello", repeat_penalty=1.3, **options).text() == wanted
    assert model.prompt("hello", n_ctx=64, n_threads=1, repeat_penalty=1.3, **options).text() == wanted
    assert {key[1:] for key in llm_models._open} == {(None, None, 1, "f16", "f16"), (64, 1, 1, "f16", "f16")}
    whole = oracle.chat("hello", **GREEDY)
    assert model.prompt("hello", stop=whole[3], **GREEDY).text() == whole[: whole.index(whole[3])]
    with pytest.raises(ValueError, match="temperature"):
        model.prompt("hello", temperature=-1)
    with pytest.raises(ValueError, match="mirostat"):
        model.prompt("hello", mirostat=1)


def test_conversation(oracle: LLM) -> None:
    talk = llm.get_model("hotcold:tiny").conversation()
    first = talk.prompt("one", **GREEDY).text()
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    assert talk.prompt("two", **GREEDY).text() == oracle.chat(messages, **GREEDY)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_schema(tiny: Path) -> None:
    found = json.loads(llm.get_model("hotcold:tiny").prompt("hello", schema=SCHEMA, max_tokens=200).text())
    assert found["name"] in ("a", "b") and 0 <= found["age"] <= 99


def test_tools_reach_the_template(tiny_model: Callable[..., Path]) -> None:
    """What the model is told, and what it is told after a call; a random model calls nothing by itself."""
    tools, messages = "[{{ t.function.name }}]", "{{ m.role }}:{{ m.content }};"
    template = f"{{% for t in tools %}}{tools}{{% endfor %}}{{% for m in messages %}}{messages}{{% endfor %}}"
    path = tiny_model(seed=3, chat_template=template)
    run("hotcold", "add", str(path), "--name", "tools")

    def weather(city: str) -> str:
        """Tells the weather."""
        return f"rain in {city}"

    model = llm.get_model("hotcold:tools")
    response = model.prompt("hello", tools=[weather], **GREEDY)
    response.text()
    (opened,) = llm_models._open.values()
    assert response.usage().input == len(opened.tokenize("[weather]user:hello;"))


def test_tool_calls_and_results(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that calls a tool, and says what it heard; here it is a fake one that does so word by word."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    heard: list[str] = []

    def next_token(tokens: list[int]) -> int:
        text = fakes.FakeTokenizer().decode(tokens, special=True)
        prompt, _, said = text.rpartition("<|im_start|>assistant\n")
        if not said:
            heard.append(prompt)
        answer = "It rains." if "rain in Oslo" in prompt else call
        return answer.encode()[len(said)] if len(said) < len(answer) else fakes.END

    def weather(city: str) -> str:
        """Tells the weather."""
        return f"rain in {city}"

    model = fakes.make(next_token, n_ctx=4000, n_parallel=2)
    monkeypatch.setattr(llm_models, "open_model", lambda *_: model)
    chain = llm.get_model("hotcold:tiny").chain("How is it in Oslo?", tools=[weather], options={"temperature": 0})
    assert chain.text() == "It rains."
    first, second = chain._responses
    (called,) = first.tool_calls()
    assert (called.name, called.arguments) == ("weather", {"city": "Oslo"}) and second.tool_calls() == []
    assert "Tells the weather." in heard[0] and "rain in Oslo" in heard[1] and '"Oslo"' in heard[1]

    with pytest.raises(llm.ModelError, match="weather: the answer ended within"):
        llm.get_model("hotcold:tiny").prompt("Oslo?", tools=[weather], max_tokens=55).text()

    async def ask() -> str:
        text: str = await llm.get_async_model("hotcold:tiny").chain("Oslo?", tools=[weather]).text()
        return text

    assert asyncio.run(ask()) == "It rains."
    model.close()


def test_async(oracle: LLM) -> None:
    """Several prompts at once, in one event loop."""
    model = llm.get_async_model("hotcold:tiny")

    async def ask(text: str) -> str:
        pieces = [piece async for piece in model.prompt(text, **GREEDY)]
        return "".join(pieces)

    async def all_of(texts: list[str]) -> list[str]:
        return await asyncio.gather(*map(ask, texts))

    texts = ["one", "two", "three", "hello world", "five"]
    assert asyncio.run(all_of(texts)) == [oracle.chat(text, **GREEDY) for text in texts]


def test_embeddings(oracle: LLM) -> None:
    model = llm.get_embedding_model("hotcold:tiny")
    vectors = list(model.embed_multi(["hello", "world"]))
    assert vectors == oracle.embed(["hello", "world"]).array.tolist()
    assert len(vectors[0]) == oracle.config.n_embd
    found = json.loads(run("embed", "-m", "hotcold:tiny", "-c", "hello"))
    assert found == pytest.approx(vectors[0], abs=1e-6)


def test_command_line(oracle: LLM) -> None:
    options = [part for name, value in GREEDY.items() for part in ("-o", name, str(value))]
    wanted = oracle.chat("hello", **GREEDY)
    assert run("-m", "hotcold:tiny", "hello", *options) == wanted + "\n"
    assert run("-m", "hotcold:tiny", "hello", "--no-stream", *options) == wanted + "\n"
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": wanted},
        {"role": "user", "content": "and then"},
    ]
    assert run("-c", "and then", *options) == oracle.chat(messages, **GREEDY) + "\n"
    assert "hotcold:tiny" in run("logs", "list", "--json")
    listed = run("models", "-m", "hotcold:tiny", "--options")
    assert "repeat_penalty" in listed and "default 1024" in listed
