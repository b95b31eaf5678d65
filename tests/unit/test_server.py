"""The server as its clients see it: paths, statuses, errors, who may come in."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import httpx
import numpy as np
import pytest
from serving import USER, Serving, make, serving

from hotcold.formats.errors import ParameterError
from hotcold.runtime.server.process import check_exposure
from hotcold.runtime.server.service import Settings
from hotcold.tools import serve


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


def error_of(response: httpx.Response) -> dict[str, Any]:
    found = response.json()["error"]
    assert sorted(found) == ["code", "message", "param", "type"] and found["message"]
    return found


# answers


def test_a_chat_answer(server: Serving) -> None:
    response = server.chat()
    found = response.json()
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert (found["object"], found["model"]) == ("chat.completion", "m")
    assert found["choices"][0]["message"]["content"] == "Hello" and found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 2


def test_a_streamed_chat_answer(server: Serving) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]" and all(event.startswith("data: {") for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "Hello"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2


def test_completions_and_responses(server: Serving) -> None:
    found = server.client.post("/v1/completions", json={"prompt": "x?", "temperature": 0}).json()
    assert (found["object"], found["choices"][0]["text"]) == ("text_completion", "Hello")
    found = server.client.post("/v1/responses", json={"input": "x?", "temperature": 0}).json()
    assert found["output"][0]["content"][0]["text"] == "Hello" and found["usage"]["output_tokens"] == 2
    streamed = server.client.post("/v1/responses", json={"input": "x?", "temperature": 0, "stream": True}).text
    last = json.loads(streamed.removesuffix("\n\n").split("\n\n")[-1].split("data: ")[1])
    assert last["type"] == "response.completed" and last["response"]["output"][0]["content"][0]["text"] == "Hello"


def test_streams_are_ascii() -> None:
    """Clients cut lines at U+2028 and its like, which JSON need not escape."""
    with serving({"m": make(fakes.saying(fakes.SMILE, *"\u2028".encode()))}) as running:
        response = running.chat(stream=True)
        assert response.content.isascii()
        chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "😀\u2028"


def test_embeddings(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.float32([[0.6, 0.8], [1 / 3, 0]])
    llm = server.service.models["m"]
    asked: list[Any] = []

    def embed(given: Any, wanted: Any) -> Any:
        asked.append(given)
        assert wanted()
        return SimpleNamespace(array=rows, n_tokens=(3, 4))

    monkeypatch.setattr(llm, "embed", embed, raising=False)
    monkeypatch.setattr(llm.config, "n_embd", 2, raising=False)
    plain = server.client.post("/v1/embeddings", json={"input": ["a", "b"]}).json()
    assert np.float32([one["embedding"] for one in plain["data"]]).tolist() == rows.tolist()
    assert [one["index"] for one in plain["data"]] == [0, 1] and plain["model"] == "m"
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = server.client.post("/v1/embeddings", json={"input": [1, 2], "encoding_format": "base64"}).json()
    assert base64.b64decode(packed["data"][1]["embedding"]) == rows[1].astype("<f4").tobytes()
    assert asked == [["a", "b"], [1, 2]]
    assert server.client.post("/v1/embeddings", json={"input": "a", "dimensions": 2}).status_code == 200
    refused = server.client.post("/v1/embeddings", json={"input": "a", "dimensions": 1})
    assert refused.status_code == 400 and error_of(refused)["param"] == "dimensions"


def test_tokenize_and_detokenize(server: Serving) -> None:
    def tokens(**given: Any) -> Any:
        return server.client.post("/tokenize", json=given).json()["tokens"]

    assert tokens(content="ab") == [97, 98]
    assert tokens(content="a<|im_end|>", add_special=True) == [fakes.BOS, 97, fakes.END]
    assert tokens(content="<|im_end|>", parse_special=False) == list(b"<|im_end|>")
    assert tokens(content="é", with_pieces=True) == [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    found = server.client.post("/detokenize", json={"tokens": [fakes.HEL, fakes.LO, fakes.END]}).json()
    assert found == {"content": "Hello<|im_end|>"}
    assert server.client.post("/detokenize", json={"tokens": [99999]}).status_code == 400


# models


def test_one_model_answers_to_any_name(server: Serving) -> None:
    for name in ("m", "gpt-4o", "", None):
        assert server.chat(model=name).json()["model"] == "m"


def test_several_models_are_chosen_by_name() -> None:
    models = {"a/b": make(fakes.saying(fakes.HEL)), "c": make(fakes.saying(fakes.LO))}
    with serving(models) as running:
        listed = running.client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["a/b", "c"]
        assert running.client.get("/v1/models/a/b").json() == listed["data"][0]
        assert running.client.get("/v1/models/a%2Fb").json()["id"] == "a/b"
        answers = [running.chat(model=name).json()["choices"][0]["message"]["content"] for name in ("a/b", "c")]
        assert answers == ["Hel", "lo"]
        for name, status, code in (("d", 404, "model_not_found"), (None, 400, None)):
            response = running.chat(model=name)
            assert (response.status_code, error_of(response)["code"]) == (status, code)
        assert error_of(running.client.get("/v1/models/d"))["code"] == "model_not_found"


def test_while_a_model_loads() -> None:
    with serving({"m": None}) as running:
        health = running.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for response in (running.client.get("/v1/models"), running.chat()):
            assert (response.status_code, error_of(response)["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) > 0
        assert running.client.get("/").status_code == 200
        running.service.put("m", make())
        assert running.client.get("/health").json() == {"status": "ok"}
        running.service.models["m"].close()


# what clients do wrong


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", b'{"messages": 5}', 400, "invalid_value"),
        ("/v1/chat/completions", b"{", 400, "invalid_json"),
        ("/v1/chat/completions", b"", 400, "invalid_json"),
        ("/v1/completions", b'{"prompt": "' + b"x" * 500 + b'"}', 400, "context_length_exceeded"),
        ("/v1/completions", b'{"prompt": [999999]}', 400, None),
        ("/v1/completions", b'{"prompt": "x", "logit_bias": {"x": 1}}', 400, "invalid_value"),
        ("/v1/responses", b'{"input": "x", "previous_response_id": "y"}', 400, "invalid_value"),
        ("/v1/nothing", b"{}", 404, "unknown_url"),
        ("//v1/models", b"{}", 404, "unknown_url"),
    ],
)
def test_a_mistake_is_told(server: Serving, path: str, body: bytes, status: int, code: str | None) -> None:
    url = httpx.URL(f"http://127.0.0.1:{server.port}").copy_with(raw_path=path.encode())
    response = server.client.post(url, content=body)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"


def test_odd_texts_are_answered(server: Serving) -> None:
    for text in ("\0", "\ufeff", "\U0010ffff", "<|im_end|>", "\r\n\u2028", ""):
        assert server.chat(messages=[{"role": "user", "content": text}]).status_code == 200


def test_a_wrong_method_names_the_right_ones(server: Serving) -> None:
    for method, path, allowed in (("GET", "/v1/completions", "POST"), ("DELETE", "/v1/models", "GET, HEAD")):
        response = server.client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert error_of(response)["code"] == "method_not_allowed"
    options = server.client.options("/health")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD")


def test_head_is_get_without_the_body(server: Serving) -> None:
    head, get = server.client.head("/v1/models"), server.client.get("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))


def test_a_body_over_the_limit() -> None:
    with serving(max_body=1000) as running:
        for content in (b"x" * 2000, iter([b"x" * 300] * 8)):
            response = running.client.post("/v1/completions", content=content)
            assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert running.chat().status_code == 200


def test_a_queue_that_is_full() -> None:
    llm = make(n_parallel=1, n_queue=0)
    with serving({"m": llm}) as running:
        held = llm.ask("x", max_tokens=None)
        held.start()
        llm.scheduler.run_in_background()
        response = running.chat()
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
        held.close()


def test_more_answers_than_the_queue_is_long() -> None:
    """A request is admitted as one, however many answers it has."""
    with serving({"m": make(fakes.saying(fakes.HEL, fakes.LO), n_parallel=2, n_queue=1)}) as running:
        assert len(running.chat(n=100).json()["choices"]) == 100
        body = {"prompt": ["x?"] * 100, "temperature": 0, "max_tokens": 4}
        found = running.client.post("/v1/completions", json=body).json()
        assert [choice["text"] for choice in found["choices"]] == ["Hello"] * 100
        too_many = running.client.post("/v1/completions", json={**body, "n": 2})
        assert (too_many.status_code, error_of(too_many)["param"]) == (400, "n")


def test_features_that_are_refused_by_name(server: Serving) -> None:
    for name, value in (("functions", [{"name": "f", "parameters": {}}]), ("function_call", {"name": "f"})):
        response = server.chat(**{name: value})
        assert (response.status_code, error_of(response)["param"]) == (400, name)


def test_a_bug_is_a_500_in_the_same_shape(
    server: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("/secret")

    monkeypatch.setattr(server.service.models["m"], "tokenize", broken)
    response = server.client.post("/tokenize", json={"content": "x"})
    assert response.status_code == 500 and "secret" not in response.text
    assert error_of(response)["type"] == "server_error"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a bug: KeyError" in said


# who may come in


def test_the_key_is_asked_for() -> None:
    with serving(api_keys=("one", "two")) as running:
        for authorization in (None, "Bearer", "Bearer three", "one", "Basic one", "Bearer one two", "Bearer \xff"):
            headers = [(b"authorization", authorization.encode("latin-1"))] if authorization else []
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = running.client.get(path, headers=headers)
                assert response.status_code == 401, (authorization, path)
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            assert running.client.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
        assert running.client.get("/health").status_code == running.client.get("/").status_code == 200
        assert running.client.get("/v1/models", headers={"Host": "x/health?"}).status_code == 401
        document = running.client.get("/openapi.json").json()
        assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "[", "x/health?"])
def test_a_page_that_renames_this_machine_stays_out(server: Serving, host: str) -> None:
    for path in ("/v1/models", "/health", "/"):
        response = server.client.get(path, headers={"Host": host})
        assert (response.status_code, error_of(response)["code"]) == (403, "unknown_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "app.localhost:80", "192.168.0.7:8080", "[::1]:8080"])
def test_this_machine_has_several_names(server: Serving, host: str) -> None:
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_another_page_may_not_call(server: Serving) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert server.client.get("/v1/models", headers={"Origin": own}).status_code == 200
    for origin in ("https://evil.example", "null", own + "0"):
        response = server.client.get("/v1/models", headers={"Origin": origin})
        assert (response.status_code, error_of(response)["code"]) == (403, "unknown_origin")
        assert "access-control-allow-origin" not in response.headers


def test_a_page_that_may_call() -> None:
    friend = "https://friend.example"
    with serving(cors=(friend,)) as running:
        asked = {"Origin": friend, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization"}  # fmt: skip
        preflight = running.client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == friend
        response = running.client.get("/v1/models", headers={"Origin": friend})
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == friend
        assert running.client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_insecure_asks_nobody_anything() -> None:
    with serving(insecure=True) as running:
        headers = {"Host": "any.example", "Origin": "https://other.example"}
        assert running.client.get("/v1/models", headers=headers).status_code == 200


def test_a_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ParameterError, match="--api-key"):
            check_exposure(Settings(host=host))
        check_exposure(Settings(host=host, api_keys=("k",)))
        check_exposure(Settings(host=host, insecure=True))
    for host in ("127.0.0.1", "localhost", "127.8.8.8"):
        check_exposure(Settings(host=host))
    with pytest.raises(ParameterError, match="no.such.host.invalid"):
        check_exposure(Settings(host="no.such.host.invalid"))


def test_names_and_keys_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTCOLD_API_KEY", raising=False)
    models = ["a/Model.Q4.gguf", "smollm2", "hf:org/repo/x.gguf"]
    assert serve.names(models, []) == ["Model.Q4", "smollm2", "x"]
    assert serve.names(models, ["one", "two"]) == ["one", "two", "x"]
    for given, aliases in ((["a.gguf", "b/a.gguf"], []), (["a"], ["x", "y"]), (["a", "b"], ["b"]), (["a"], [""])):
        with pytest.raises(ParameterError, match="--alias"):
            serve.names(given, aliases)
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.setenv("HOTCOLD_API_KEY", "three")
    assert serve.keys(["four"], tmp_path / "keys") == ("four", "three", "one", "two")
    for wrong in ("", " ", "a\nb", "\u00e9"):
        with pytest.raises(ParameterError, match="--api-key"):
            serve.keys([wrong], None)


# the page and the documents


def test_the_page(server: Serving) -> None:
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<html" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    again = server.client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/../service.py", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/index.html", "//etc/passwd",
        "/./index.html", "/..\\service.py", "/index.html%00", "/%00", "/etc/passwd", "/service.py", "/.",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(server: Serving, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: raw.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404"), head
    assert json.loads(body)["error"]["code"] == "unknown_url"


def test_the_openapi_document(server: Serving) -> None:
    document = server.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/models", "/tokenize",
            "/detokenize", "/health", "/metrics"} < set(document["paths"])  # fmt: skip
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][schema]["required"] == ["messages"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (value["$ref"],) if "$ref" in value else ()
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    for path in ("/docs", "/redoc"):
        assert server.client.get(path).status_code == 404


def test_metrics() -> None:
    llm = make(fakes.saying(fakes.HEL, fakes.LO))
    with serving({"m": llm}) as running:
        running.chat()
        running.chat(stream=True, n=3)
        running.chat(messages=5)
        running.client.get("/v1/models/" + "x" * 50)
        response = running.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        figures = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))

    def figure(name: str) -> float:
        return float(figures[name])

    assert figure('hotcold_requests_total{path="/v1/chat/completions",status="200"}') == 2
    assert figure('hotcold_requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert figure('hotcold_requests_total{path="other",status="404"}') == 1
    assert figure('hotcold_generated_tokens_total{model="m"}') == 8
    assert figure('hotcold_prompt_tokens_total{model="m"}') == 2 * len(llm._chat_prompt.encode(USER))  # type: ignore[union-attr]
    assert figure('hotcold_running{model="m"}') == figure('hotcold_waiting{model="m"}') == 0
    assert figure('hotcold_time_to_first_token_seconds_count{model="m"}') == 4
    assert figure('hotcold_time_per_token_seconds_count{model="m"}') == 4
    assert figure('hotcold_kv_blocks_used{model="m"}') == 0
