"""The chat page in headless Chromium, where there is one, against a server that says what a test tells it to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, find_chromium, open_browser
from page_server import PageServer, Reply, serve
from serve_process import KEY, Served

from hotcold.runtime.server.page import FOLDER, HEADERS

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
POLICY = HEADERS["Content-Security-Policy"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as page:
        yield page


@pytest.fixture
def server() -> Iterator[PageServer]:
    """Each test has a port, so an origin and a storage, of its own."""
    with serve(FOLDER, POLICY) as found:
        yield found


@pytest.fixture
def page(browser: Page, server: PageServer) -> Iterator[Page]:
    """The page, open and ready; afterwards nothing red was in the console and nobody else was asked."""
    browser.look()
    browser.open(server.url)
    browser.problems.clear()
    browser.requests.clear()
    browser.until("!document.getElementById('model').disabled")
    yield browser
    browser.run("1")
    refused = re.compile(r"Failed to load resource: the server responded with a status of (400|401|429|503)")
    assert [problem for problem in browser.problems if not refused.match(problem)] == []
    assert [url for url in browser.requests if not url.startswith(server.url)] == []
    browser.open("about:blank#")


def say(page: Page, text: str, wait: bool = True) -> None:
    """Send a message as a person does; wait: until the answer has ended."""
    page.run("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")
    if wait:
        page.until("document.getElementById('stop').hidden")


def click(page: Page, selector: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def shown(page: Page, selector: str = "#log") -> str:
    """The text that is seen there."""
    text: str = page.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
    return text


def test_an_answer_streams(page: Page, server: PageServer) -> None:
    go_on = threading.Event()
    server.script = lambda body, key: Reply(["Hello **wor", lambda: go_on.wait(20), "ld**, at last"])
    say(page, "Hi\tthere", wait=False)
    page.until("document.querySelector('.assistant .body')?.innerText.includes('Hello')")
    assert "at last" not in shown(page)
    assert page.run("document.getElementById('log').getAttribute('aria-busy')") == "true"
    go_on.set()
    page.until("document.getElementById('stop').hidden")
    assert shown(page, ".assistant .body") == "Hello world, at last"
    assert page.run("document.querySelector('.assistant strong').textContent") == "world"
    assert re.match(r"2 tokens · [\d.]+ tok/s", shown(page, ".assistant footer"))
    assert shown(page, "#status") == "The answer is complete, 2 tokens"
    (body,) = server.asked
    assert body == {
        "model": "smollm2", "messages": [{"role": "user", "content": "Hi\tthere"}],
        "repeat_penalty": 1.1, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert page.run("document.activeElement.id") == "input"
    say(page, "And then?")
    assert [m["content"] for m in server.asked[1]["messages"]] == ["Hi\tthere", "Hello **world**, at last", "And then?"]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(page: Page, server: PageServer, how: str) -> None:
    def until_left() -> Iterator[str]:
        while not server.left.is_set():
            time.sleep(0.02)
            yield "more "

    class Endless(list[Any]):
        __iter__ = lambda self: until_left()  # noqa: E731

    server.script = lambda body, key: Reply(Endless())
    say(page, "Go on", wait=False)
    page.until("document.querySelector('.assistant .body')?.innerText.includes('more')")
    click(page, "#stop") if how == "button" else page.press("Escape")
    assert server.left.wait(20)
    page.until("document.getElementById('stop').hidden")
    assert shown(page, ".assistant footer") == "stopped"
    assert shown(page, "#status") == "Stopped"
    assert shown(page, ".assistant .body").startswith("more")


HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>

[a](javascript:window.hacked=3) [b](https://example.com/" onmouseover="window.hacked=4) ![c](https://example.com/pixel.png)

| <svg onload=window.hacked=5> | b |
|---|---|
| <iframe src="https://example.com/"></iframe> | [d](data:text/html,x) |

# <style>*{display:none}</style>

```html" onclick="window.hacked=6
</code></pre><img src=x onerror="window.hacked=7">
```
"""


def test_hostile_text_stays_text(page: Page, server: PageServer) -> None:
    server.script = lambda body, key: Reply([HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)])
    say(page, HOSTILE)
    assert page.run("document.querySelector('.user .body').textContent").strip() == HOSTILE.strip()
    assert page.run("[...document.querySelectorAll('#log *')].map(e => e.localName)").count("img") == 0
    names = set(page.run("[...document.querySelectorAll('.body *')].map(e => e.localName)"))
    assert names <= set("p a div table thead tbody tr th td h3 span button pre code br".split())
    attributes = page.run("[...document.querySelectorAll('#log *')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
    for link in page.run("[...document.querySelectorAll('.body a')].map(a => [a.protocol, a.rel, a.target])"):
        assert link == ["https:", "noopener noreferrer nofollow", "_blank"]
    assert '<img src=x onerror="window.hacked=1">' in shown(page, ".assistant .body")
    assert page.run("window.hacked ?? null") is None


def test_again_needs_valid_settings(page: Page, server: PageServer) -> None:
    say(page, "Hi")
    page.run("document.getElementById('p-seed').value = '-3'")
    click(page, ".assistant button[aria-label='Answer again']")
    assert page.run("document.activeElement.id") == "p-seed"
    assert "Hello" in shown(page) and len(server.asked) == 1


def test_again_and_edit(page: Page, server: PageServer) -> None:
    server.script = lambda body, key: Reply([f"answer {len(server.asked)}"])
    say(page, "first")
    say(page, "second")
    click(page, ".assistant.last button[aria-label='Answer again']")
    page.until("document.body.innerText.includes('answer 3')")
    assert [m["content"] for m in server.asked[2]["messages"]] == ["first", "answer 1", "second"]
    assert "answer 2" not in shown(page)
    click(page, "button[aria-label=Edit]")
    page.run("document.activeElement.select()")
    page.type("third")
    page.press("Enter")
    page.until("document.body.innerText.includes('answer 4')")
    assert [m["content"] for m in server.asked[3]["messages"]] == ["first", "answer 1", "third"]
    assert "second" not in shown(page)
    click(page, "button[aria-label=Edit]")
    page.press("Escape")
    assert page.run("document.querySelectorAll('.body textarea').length") == 0
    assert "third" in shown(page)


def test_parameters(page: Page, server: PageServer) -> None:
    values = {
        "system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64",
        "seed": "7", "repeat_penalty": "1.2",
    }  # fmt: skip
    click(page, "#settings-open")
    for name, value in values.items():
        page.run(f"document.getElementById('p-{name}').select()")
        page.type(value)
    page.press("Escape")
    assert page.run("document.getElementById('settings').hidden")
    say(page, "Hi")
    body = server.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {name: json.loads(value) for name, value in values.items() if name != "system"}
    assert {name: body[name] for name in wanted} == wanted
    page.open(server.url + "?again")
    assert page.run("document.getElementById('p-seed').value") == "7"
    page.run("document.getElementById('p-top_p').value = '7'")
    page.until("!document.getElementById('model').disabled")
    page.run("document.getElementById('input').focus()")
    page.type("Hi")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "p-top_p"  # shown, and nothing was sent
    assert len(server.asked) == 1
    click(page, "#defaults")
    say(page, " you")
    assert set(server.asked[1]) == {"model", "messages", "repeat_penalty", "stream", "stream_options"}


def test_models(browser: Page, server: PageServer) -> None:
    server.models = ["one", "<b>two</b>"]
    browser.look()
    browser.open(server.url)
    browser.until("!document.getElementById('model').disabled")
    assert browser.run("[...document.getElementById('model').options].map(o => o.text)") == server.models
    choose = "(m => { m.value = '<b>two</b>'; m.dispatchEvent(new Event('change')); })"
    browser.run(f"{choose}(document.getElementById('model'))")
    say(browser, "Hi")
    assert server.asked[0]["model"] == "<b>two</b>"
    assert shown(browser, ".assistant footer") == "1 token · <b>two</b>"
    browser.open(server.url + "?again")
    browser.until("!document.getElementById('model').disabled")
    assert browser.run("document.getElementById('model').value") == "<b>two</b>"


def test_key_is_asked_for(browser: Page, server: PageServer) -> None:
    server.key = "secret"
    browser.look()
    browser.open(server.url)
    browser.until("document.getElementById('ask-key').open")
    browser.type("wrong")
    browser.press("Enter")
    browser.until("!document.getElementById('ask-key-why').hidden && document.getElementById('ask-key').open")
    browser.type("secret")
    browser.press("Enter")
    browser.until("!document.getElementById('model').disabled")
    say(browser, "Hi")
    assert "Hello" in shown(browser)
    assert browser.run("JSON.stringify(localStorage)").count("secret") == 0
    assert browser.run("JSON.stringify(sessionStorage)").count("secret") == 1
    server.key = "changed"
    say(browser, "Again", wait=False)
    browser.until("document.getElementById('ask-key').open")
    browser.press("Escape")
    browser.until("document.body.innerText.includes('wrong key')")
    server.key = ""
    click(browser, ".problem button")
    browser.until("document.querySelectorAll('.assistant footer button').length === 3")


@pytest.mark.parametrize(("status", "words"), [(429, "The server is busy"), (503, "The server is not ready")])
def test_busy_server_is_asked_again(page: Page, server: PageServer, status: int, words: str) -> None:
    def script(body: dict[str, Any], key: str) -> Reply:
        if len(server.asked) == 1:
            return Reply(status=status, headers={"Retry-After": "2"}, message="not now")
        return Reply(["Here I am"])

    server.script = script
    say(page, "Hi", wait=False)
    page.until(f"document.body.innerText.includes({json.dumps(words)})")
    page.until("document.body.innerText.includes('Here I am')")
    assert len(server.asked) == 2
    server.script = lambda body, key: Reply(status=status, headers={"Retry-After": "600"}, message="not now")
    say(page, "More", wait=False)
    page.until("document.body.innerText.includes('trying again in')")
    page.press("Escape")
    page.until("document.getElementById('stop').hidden")
    assert "Stopped before the first word." in shown(page)


def test_errors_are_readable(page: Page, server: PageServer) -> None:
    server.script = lambda body, key: Reply(status=400, message="prompt: got <i>9000</i> tokens")
    say(page, "Hi")
    assert "prompt: got <i>9000</i> tokens" in shown(page, ".problem")
    server.script = lambda body, key: Reply(["a part"], ends=False)
    click(page, ".problem button")
    page.until("document.body.innerText.includes('The connection was lost')")
    assert shown(page, ".assistant .body") == "a part"
    assert shown(page, ".assistant footer") == "broke off"
    server.script = lambda body, key: Reply(["another part"], error="the server is stopping")
    click(page, ".problem button")
    page.until("document.body.innerText.includes('the server is stopping')")
    assert "another part" in shown(page)
    server.script = lambda body, key: Reply(["cut"], finish="length")
    click(page, ".problem button")
    page.until("document.body.innerText.includes('ended at the token limit')")
    assert page.run("document.querySelectorAll('#log .problem').length") == 0
    assert all(len(body["messages"]) == 1 for body in server.asked)


def test_server_that_is_gone(page: Page, server: PageServer) -> None:
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    say(page, "Hi")
    assert "The server cannot be reached" in shown(page, ".problem")


def test_conversations_are_kept(page: Page, server: PageServer) -> None:
    server.script = lambda body, key: Reply([f"answer to {body['messages'][-1]['content']}"])
    say(page, "one")
    click(page, "#new")
    assert shown(page) == "" and page.run("document.activeElement.id") == "input"
    say(page, "two")
    address = page.run("location.href")
    page.open("about:blank#")
    page.open(address)
    page.until("document.body.innerText.includes('answer to two')")
    assert page.run("[...document.querySelectorAll('#list .title')].map(b => b.textContent)") == ["two", "one"]
    page.run("document.querySelectorAll('#list .title')[1].click()")
    assert "answer to one" in shown(page) and page.run("document.title") == "one · hotcold"
    page.run("history.back()")
    page.until("document.getElementById('log').innerText.includes('answer to two')")
    click(page, "#list li button[aria-label^=Delete]")
    page.until("document.querySelectorAll('#list li').length === 1")
    assert shown(page) == ""
    page.until("!document.getElementById('model').disabled")


def test_what_is_kept_has_bounds(page: Page) -> None:
    kept = page.run(
        """(async () => {
          const { keep, conversations } = await import("./store.js");
          localStorage.setItem("hotcold.chat.bad", "{not json");
          const odd = { id: "odd", changed: 1, messages: [{ role: "system" }] };
          localStorage.setItem("hotcold.chat.odd", JSON.stringify(odd));
          const said = (size) => [{ role: "user", content: "x".repeat(size) }];
          const chat = (id, size) => ({ id: String(id), changed: id, messages: said(size) });
          for (let id = 0; id < 130; id++) keep(chat(id, 10));
          const many = conversations().map((c) => c.id);
          for (let id = 200; id < 208; id++) keep(chat(id, 600000));
          return [many, conversations().map((c) => c.id), keep(chat(300, 20000000)), conversations().length];
        })()"""
    )
    assert kept[0] == [str(id) for id in range(129, 29, -1)]
    assert kept[1][:3] == ["207", "206", "205"] and "203" not in kept[1]
    assert kept[2] is False and kept[3] == 0


def test_two_conversations_at_once(page: Page, server: PageServer) -> None:
    go_on = threading.Event()

    def script(body: dict[str, Any], key: str) -> Reply:
        wait = body["messages"][-1]["content"] == "slow"
        return Reply(["begun ", lambda: go_on.wait(20), "done"] if wait else ["quick"])

    server.script = script
    say(page, "slow", wait=False)
    page.until("document.getElementById('log').innerText.includes('begun')")
    click(page, "#new")
    say(page, "fast")
    assert "quick" in shown(page) and "begun" not in shown(page)
    go_on.set()
    page.until("Object.values(localStorage).some((text) => text.includes('begun done'))")
    page.run("[...document.querySelectorAll('#list .title')].find((b) => b.textContent === 'slow').click()")
    assert "begun done" in shown(page)


def test_copy_buttons(page: Page, server: PageServer) -> None:
    page.run("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    server.script = lambda body, key: Reply(["Do\n```sh\nls <x>\n```"])
    say(page, "Hi")
    click(page, ".copy-code")
    page.until("window.copied === 'ls <x>'")
    click(page, ".assistant button[aria-label=Copy]")
    page.until("window.copied.startsWith('Do')")
    assert page.run("document.querySelector('.code-head span').textContent") == "sh"


def test_looks_and_names(page: Page, server: PageServer) -> None:
    """Colours by the reader's preference, no sideways scrolling on a phone, and a name for everything one can use."""
    wide = "x" * 300 + "\n```\n" + "y" * 300 + "\n```\n|" + "a|" * 30 + "\n|" + "-|" * 30
    server.script = lambda body, key: Reply([wide])
    say(page, "z" * 300)
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.look(390, 844, dark=True, phone=True)
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("document.getElementById('scroll').scrollWidth <= 390")
    click(page, "#side-open")
    page.until("document.getElementById('side').getBoundingClientRect().left === 0")
    assert page.run("document.getElementById('side-open').getAttribute('aria-expanded')") == "true"
    page.press("Escape")
    page.until("document.getElementById('side').getBoundingClientRect().right <= 0")
    page.look()
    click(page, "#settings-open")
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        role = node["role"]["value"]
        if role in ("button", "textbox", "combobox", "spinbutton", "link") and not node["ignored"]:
            assert node["name"]["value"].strip(), node


def test_shift_enter_and_input_methods(page: Page, server: PageServer) -> None:
    page.run("document.getElementById('input').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.run(
        "document.getElementById('input').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert server.asked == []
    page.press("Enter")
    page.until("document.body.innerText.includes('Hello')")
    assert server.asked[0]["messages"][0]["content"] == "one\ntwo"


def test_against_the_server_itself(browser: Page, tiny_model: Callable[..., Path]) -> None:
    """The key is asked for, the answer is the API's, and one that is stopped leaves nothing behind in the server."""
    with Served(tiny_model(n_ctx_train=2048, seed=6), "--ctx", "2048", "--threads", "2") as server:
        browser.look()
        browser.open(server.url)
        browser.until("document.getElementById('ask-key').open")
        browser.problems.clear()
        browser.requests.clear()
        browser.type(KEY)
        browser.press("Enter")
        browser.until("!document.getElementById('model').disabled")
        settings = {"temperature": 0, "max_tokens": 20, "repeat_penalty": 1.1}
        for name, value in settings.items():
            browser.run(f"document.getElementById('p-{name}').value = '{value}'")
        say(browser, "hello world")
        body = {"messages": [{"role": "user", "content": "hello world"}], **settings}
        _, wanted = server.get("/v1/chat/completions", body)
        kept = browser.run("Object.entries(localStorage).find(([key]) => key.startsWith('hotcold.chat.'))[1]")
        (_, answer) = json.loads(kept)["messages"]
        assert answer["content"] == wanted["choices"][0]["message"]["content"]
        assert answer["note"]["tokens"] == wanted["usage"]["completion_tokens"]
        browser.run("document.getElementById('p-max_tokens').value = ''")
        say(browser, "again", wait=False)
        browser.until("document.querySelectorAll('.assistant .body')[1]?.innerText.length > 10")
        click(browser, "#stop")
        assert server.settled().running == 0
        assert browser.problems == []
        assert all(url.startswith(server.url) for url in browser.requests)
