"""The chat page's files, and its Markdown, which runs under Node where there is one."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_markdown import html_of, parse_all

CLONE = Path(__file__).parents[2]
FOLDER = CLONE / "runtime" / "server" / "page"
SOURCES = sorted(path for path in FOLDER.iterdir() if path.is_file())
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="Node is not installed")


# ---- the files


class Elements(HTMLParser):
    """The elements of a page, and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.code = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.code += data.strip()


@pytest.fixture(scope="module")
def elements() -> Elements:
    return Elements((FOLDER / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_leads_elsewhere(source: Path) -> None:
    """No address of another machine; what a file needs lies beside it."""
    text = source.read_text(encoding="utf-8")
    names = {"http://www.w3.org/2000/svg", "https://html.spec.whatwg.org/multipage/server-sent-events.html"}  # no fetch
    assert set(re.findall(r"\w+://[\w./-]+", text)) <= names
    assert not re.search(r"""["'(=]//\w""", text)  # //host/path
    assert "@import" not in text and "url(" not in text


@pytest.mark.parametrize("source", [s for s in SOURCES if s.suffix == ".js"], ids=lambda path: path.name)
def test_scripts_make_no_markup_of_texts(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser",
                 "createContextualFragment", "setHTML", "srcdoc"):  # fmt: skip
        assert sink not in text, sink
    for name in re.findall(r'from "(.+)"', text):
        assert (FOLDER / name).is_file()


def test_page_obeys_a_strict_policy(elements: Elements) -> None:
    """No inline script, style or handler: script-src 'self' and style-src 'self' would refuse them."""
    assert elements.code == ""
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset")], tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (FOLDER / value).is_file(), value


def test_everything_has_a_name(elements: Elements) -> None:
    found = elements.found
    labelled = {attributes["for"] for tag, attributes in found if tag == "label" and "for" in attributes}
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert labelled <= set(ids)
    for tag, attributes in found:
        if tag in ("input", "textarea"):
            assert attributes["id"] in labelled, attributes
        if tag == "img":
            assert "alt" in attributes
        if "aria-controls" in attributes:
            assert attributes["aria-controls"] in ids
    assert ("html", {"lang": "en"}) in found


def test_scripts_find_what_they_look_for(elements: Elements) -> None:
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    scripts = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    assert set(re.findall(r'\$\("([\w-]+)"\)', scripts)) <= ids
    assert {f"i-{name}" for name in re.findall(r'icon(?:Button)?\("(\w+)"', scripts)} <= ids


def test_server_sends_them() -> None:
    """Each file under its name, the page itself at /, with types and a policy that let browsers run them."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from hotcold.runtime.server.page import add_page

    app = FastAPI()
    assert add_page(app) == {"/", *(f"/{path.name}" for path in SOURCES if path.name != "index.html")}
    client = TestClient(app)
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in SOURCES:
        found = client.get("/" if path.name == "index.html" else f"/{path.name}")
        assert found.status_code == 200 and found.content == path.read_bytes()
        assert found.headers["content-type"].split(";")[0] == kinds[path.suffix]
        policy = dict(part.split(maxsplit=1) for part in found.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


# ---- Markdown


AGREED = [
    "One line", "two\nlines", "para\n\npara", "a **bold** and *slanted* word", "***both***", "**a *b* c**",
    "~~gone~~", "snake_case_name and __init__ here", "2 * 3 * 4 and a*b", "`code` and ``a ` b`` and `**not bold**`",
    "an \\*escaped\\* star", "# One\n## Two ##\n### Three\ntext", "#nothing", "---", "- a\n- b\n- c", "1. a\n2. b",
    "3) c\n4) d", "- a\n  - b\n    - c\n- d", "1. a\n   - b\n   - c\n2. d", "- a\n\n- b", "- a\n\n  more\n- b",
    "* a\n* b\n\ntext", "text\n- a\n- b", "> quoted\n> more\n\nafter", "> - a\n> - b",
    "```python\nx = 1 < 2\n\ny\n```\nafter", "~~~\ncode\n~~~", "```\nnever closed\n  kept",
    "- item\n  ```js\n  let a;\n  ```\n- next", "[text](https://example.com/a?b=c)", "[**b** c](http://example.com/)",
    '[title](https://example.com/ "t")', "see [a](https://example.com/(x)) end",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | 4 |", "a | b\n:-: | ---\n`x` | **y**", "a\\\nb", "<b>no html</b> & <br",
    "1986. A great year", "**unclosed and *this", "****", "** **", "a ** b ** c", "**a**b", "*a**b*", "_a_ _b_",
    "`unclosed", "[not a link]", "[a] (b)", "![", "*", "", "   ", "\xe4 **\xf6** \U0001f600",
]  # fmt: skip


@needs_node
def test_agrees_with_another_parser(tmp_path: Path) -> None:
    """On what models write, against markdown-it, which rich brings."""
    from markdown_it import MarkdownIt

    other = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    assert NODE is not None
    for text, tree in zip(AGREED, parse_all(NODE, FOLDER / "markdown.js", AGREED, tmp_path), strict=True):
        wanted = other.render(text).replace(' title="t"', "")
        assert html_of(tree).replace("\n", "") == wanted.replace("\n", ""), text


OWN = [
    ("see https://example.com/a.", '<p>see <a href="https://example.com/a">https://example.com/a</a>.</p>'),
    ("(http://example.com/x)", '<p>(<a href="http://example.com/x">http://example.com/x</a>)</p>'),
    ("![alt](https://example.com/i.png)", '<p><a href="https://example.com/i.png">alt</a></p>'),
    ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
    ("[x](JaVaScRiPt:alert)", "<p>[x](JaVaScRiPt:alert)</p>"),
    ("[x](data:text/html,hi)", "<p>[x](data:text/html,hi)</p>"),
    ("[x](//example.com)", "<p>[x](//example.com)</p>"),
    ("[x](/v1/models)", "<p>[x](/v1/models)</p>"),
    ("[]()", "<p>[]()</p>"),
    ("[x](https://)", "<p>[x](https://)</p>"),
    ('[x](https://e.com/"onclick=x)', '<p><a href="https://e.com/%22onclick=x">x</a></p>'),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("&amp;", "<p>&amp;amp;</p>"),  # entities stay as the model wrote them
    ("a<br>b", "<p>a<br />b</p>"),
    ("```html\n<b>x</b>\n```", '<pre><code class="language-html">&lt;b&gt;x&lt;/b&gt;</code></pre>'),
    ('```" onload="x\nc\n```', "<pre><code>c</code></pre>"),
    ("1. a\n  - b", "<ol><li>a<ul><li>b</li></ul></li></ol>"),  # models indent by two where CommonMark wants three
]


@needs_node
def test_our_own_rules(tmp_path: Path) -> None:
    assert NODE is not None
    trees = parse_all(NODE, FOLDER / "markdown.js", [text for text, _ in OWN], tmp_path)
    for (text, wanted), tree in zip(OWN, trees, strict=True):
        assert html_of(tree) == wanted, text


@needs_node
def test_hostile_texts_take_no_long_time(tmp_path: Path) -> None:
    """Each is 200 kB of what makes careless parsers quadratic or worse, or deep; no stack overflows either."""
    n = 200_000
    pieces = [
        "*", "**a ", "_a ", "*a _b ", "**a** ", "*a*", "~~", "`", "`a``", "[", "[]", "](", "[](", "[a](b", "![", "(",
        "\\", "> ", "- ", "1. ", "- a\n", "- a\n\n", "  - a\n", "|", "a|", "-|", "|-\n", "#", "http://", "<br",
        "\n", " ", "```\n",
    ]  # fmt: skip
    texts = [piece * (n // len(piece)) for piece in pieces]
    texts += ["a|" * 1000 + "\n" + "-|" * 1000 + "\n" + "|\n" * 50_000, "".join("  " * i + "- a\n" for i in range(600))]
    texts += ["".join("`" * (1 + i % 300) + "a" for i in range(1300)), "".join(">" * i + "a\n" for i in range(600))]
    assert NODE is not None
    assert len(parse_all(NODE, FOLDER / "markdown.js", texts, tmp_path, timeout=120)) == len(texts)
