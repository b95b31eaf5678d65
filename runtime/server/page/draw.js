// Nodes of the page: what an answer looks like. Text goes in as text nodes and properties, never as markup.

import { parse } from "./markdown.js";

/** A new element with its children (nodes or texts) and properties. */
export function element(name, children = [], properties = {}) {
  const node = document.createElement(name);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

/** A copy of one of the page's symbols. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, whose name is for those who do not see it, and for those who hover. */
export function iconButton(name, label, action) {
  const button = element("button", [icon(name)], { type: "button", className: "icon", title: label });
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => action(button));
  return button;
}

/** Put a text on the clipboard, and say on the button whether that worked. */
export async function copy(text, button, status) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyByHand(text)) return status("The browser does not let this page copy");
  }
  status("Copied");
  const before = [...button.childNodes];
  button.replaceChildren(before[0].nodeType === Node.TEXT_NODE ? "Copied" : icon("check"));
  setTimeout(() => button.replaceChildren(...before), 1500);
}

/** The old way, for pages that came over plain http from another machine: browsers give those no clipboard. */
function copyByHand(text) {
  const back = document.activeElement;
  const field = element("textarea", [], { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  back?.focus();
  return copied;
}

const drawn = new WeakMap(); // element -> its blocks as JSON

/** Make `parent` show a Markdown text; blocks that it shows already stay, with their selection and scroll position. */
export function showMarkdown(parent, text) {
  const blocks = parse(text);
  const before = drawn.get(parent) ?? [];
  const now = blocks.map((block) => JSON.stringify(block));
  now.forEach((key, i) => {
    if (key === before[i]) return;
    const old = parent.childNodes[i];
    if (old === undefined) parent.append(blockNode(blocks[i]));
    else if (!grown(old, blocks[i])) old.replaceWith(blockNode(blocks[i]));
  });
  while (parent.childNodes.length > blocks.length) parent.lastChild.remove();
  drawn.set(parent, now);
}

/** Whether `node` was the block's beginning, a code block still being written, and now shows all of it. */
function grown(node, block) {
  if (block.type !== "code" || node.className !== "code" || node.dataset.lang !== block.lang) return false;
  node.querySelector("code").textContent = block.text;
  return true;
}

function blockNode(block) {
  switch (block.type) {
    case "p":
      return element("p", inlineNodes(block.inline));
    case "h": // the page's own headings are h1 and h2
      return element(`h${Math.min(6, block.level + 2)}`, inlineNodes(block.inline), { className: `h${block.level}` });
    case "hr":
      return element("hr");
    case "quote":
      return element("blockquote", block.blocks.map(blockNode));
    case "code":
      return codeNode(block);
    case "list": {
      const items = block.items.map((blocks) => element("li", blocks.map(blockNode)));
      const list = element(block.ordered ? "ol" : "ul", items, { className: block.loose ? "loose" : "tight" });
      if (block.ordered && block.start !== 1) list.start = block.start;
      return list;
    }
    default:
      return tableNode(block);
  }
}

function codeNode({ lang, text }) {
  const button = element("button", ["Copy"], { type: "button", className: "copy-code" });
  const head = element("div", [element("span", [lang || "text"]), button], { className: "code-head" });
  const body = element("pre", [element("code", [text])], { tabIndex: 0 }); // focusable, to be scrolled with keys
  const node = element("div", [head, body], { className: "code" });
  node.dataset.lang = lang;
  return node;
}

function tableNode({ align, head, rows }) {
  const cell = (name) => (inline, i) => element(name, inlineNodes(inline), { className: align[i] });
  const body = rows.map((cells) => element("tr", cells.map(cell("td"))));
  const table = element("table", [element("thead", [element("tr", head.map(cell("th")))]), element("tbody", body)]);
  return element("div", [table], { className: "table", tabIndex: 0 });
}

function inlineNodes(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return document.createTextNode(node);
    if (node.type === "br") return element("br");
    if (node.type === "code") return element("code", [node.text]);
    const children = inlineNodes(node.inline);
    if (node.type !== "a") return element(node.type, children);
    const rel = "noopener noreferrer nofollow";
    return element("a", children, { href: node.href, title: node.href, target: "_blank", rel });
  });
}
