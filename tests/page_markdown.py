"""The page's Markdown parser run under Node, its trees written as HTML, to be compared with another parser's."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

RUN = """
import { parse } from "./markdown.mjs";
let text = "";
for await (const piece of process.stdin) text += piece;
console.log(JSON.stringify(JSON.parse(text).map(parse)));
"""


Tree = list[dict[str, Any]]


def parse_all(node: str, source: Path, texts: list[str], folder: Path, timeout: float = 60) -> list[Tree]:
    """The block trees of texts."""
    shutil.copy(source, folder / "markdown.mjs")
    (folder / "run.mjs").write_text(RUN, encoding="utf-8")
    done = subprocess.run(
        [node, str(folder / "run.mjs")], input=json.dumps(texts), capture_output=True, text=True, timeout=timeout,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trees: list[Tree] = json.loads(done.stdout)
    return trees


def html_of(blocks: Tree, tight: bool = False) -> str:
    """A tree as HTML in the form that markdown-it writes, less white space between blocks."""
    return "".join(_block(block, tight) for block in blocks)


def _block(block: dict[str, Any], tight: bool) -> str:
    kind = block["type"]
    if kind == "p":
        return _inline(block["inline"]) if tight else f"<p>{_inline(block['inline'])}</p>"
    if kind == "h":
        return f"<h{block['level']}>{_inline(block['inline'])}</h{block['level']}>"
    if kind == "hr":
        return "<hr />"
    if kind == "quote":
        return f"<blockquote>{html_of(block['blocks'])}</blockquote>"
    if kind == "code":
        label = f' class="language-{block["lang"]}"' if block["lang"] else ""
        return f"<pre><code{label}>{escape(block['text'], quote=True)}</code></pre>"
    if kind == "list":
        items = "".join(f"<li>{html_of(item, not block['loose'])}</li>" for item in block["items"])
        start = f' start="{block["start"]}"' if block["ordered"] and block["start"] != 1 else ""
        return f"<ol{start}>{items}</ol>" if block["ordered"] else f"<ul>{items}</ul>"
    assert kind == "table"

    def row(cells: list[Any], name: str) -> str:
        styles = [f' style="text-align:{align}"' if align else "" for align in block["align"]]
        written = (f"<{name}{style}>{_inline(cell)}</{name}>" for cell, style in zip(cells, styles, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    body = "".join(row(cells, "td") for cells in block["rows"])
    return f"<table><thead>{row(block['head'], 'th')}</thead>" + (f"<tbody>{body}</tbody>" if body else "") + "</table>"


def _inline(nodes: list[Any]) -> str:
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += escape(node, quote=True)
        elif node["type"] == "br":
            out += "<br />"
        elif node["type"] == "code":
            out += f"<code>{escape(node['text'], quote=True)}</code>"
        else:
            name = {"del": "s"}.get(node["type"], node["type"])
            link = f' href="{escape(node["href"], quote=True)}"' if name == "a" else ""
            out += f"<{name}{link}>{_inline(node['inline'])}</{name}>"
    return out
