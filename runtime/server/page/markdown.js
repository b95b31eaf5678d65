// Markdown as models write it: text -> a tree of plain objects, which draw.js makes nodes of.
//
// What a model says is hostile input. HTML stays text; a link is made for http and https only; an image becomes a
// link, since fetching it would tell its host who reads. Nesting and the looking ahead are bounded, so that no text,
// however made, takes more than time in proportion to its length.

const MAX_DEPTH = 10; // quotes and lists within each other
const MAX_OPEN = 24; // emphasis within each other
const MAX_URL = 2048;
const MAX_PARENS = 4; // open ones within an address
const MAX_COLUMNS = 64;

const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const ITEM = /^([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;

const indentOf = (line) => line.length - line.trimStart().length;
const isBlank = (line) => line.trim() === "";

function isRule(line) {
  const marks = line.replace(/[ \t]/g, "");
  return indentOf(line) < 4 && marks.length >= 3 && (/^-+$/.test(marks) || /^\*+$/.test(marks) || /^_+$/.test(marks));
}

function itemOf(line) {
  if (isRule(line)) return null;
  const indent = indentOf(line);
  const match = ITEM.exec(line.slice(indent));
  if (!match) return null;
  const [, mark, space = " ", text = ""] = match;
  const ordered = mark.length > 1;
  const width = mark.length + (space.length > 4 ? 1 : space.length);
  return { indent, width, mark: mark.at(-1), ordered, start: ordered ? parseInt(mark, 10) : 1, text };
}

// ---- blocks

/** The blocks of a Markdown text: {type, ...} objects, in order. */
export function parse(text) {
  return parseLines(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (isBlank(line)) {
      at++;
      continue;
    }
    const nested = () => (depth < MAX_DEPTH ? (quote(lines, at, depth) ?? list(lines, at, depth)) : null);
    const found = fenced(lines, at) ?? heading(line, at) ?? rule(line, at) ?? nested() ?? table(lines, at);
    if (found) {
      blocks.push(found.block);
      at = found.next;
      continue;
    }
    const start = at++;
    while (at < lines.length && !isBlank(lines[at]) && !interrupts(lines, at, depth)) at++;
    blocks.push({ type: "p", inline: inline(lines.slice(start, at).map((l) => l.trimStart()).join("\n")) });
  }
  return blocks;
}

function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || isRule(line)) return true;
  if (depth >= MAX_DEPTH) return false;
  if (line.trimStart().startsWith(">")) return true;
  const item = itemOf(line);
  // a line of prose may begin with a year and a full stop
  return (item !== null && item.text !== "" && (!item.ordered || item.start === 1)) || isTable(lines, at);
}

function fenced(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, indent, mark, info] = open;
  const body = [];
  let next = at + 1;
  let closed = false;
  for (; next < lines.length && !closed; next++) {
    const trimmed = lines[next].trim();
    closed = trimmed.length >= mark.length && trimmed === mark[0].repeat(trimmed.length);
    if (!closed) body.push(lines[next].slice(Math.min(indent.length, indentOf(lines[next]))));
  }
  const lang = /^[\w+#.-]{1,30}/.exec(info.trim());
  return { block: { type: "code", lang: lang ? lang[0] : "", text: body.join("\n") }, next };
}

function heading(line, at) {
  const match = HEADING.exec(line);
  if (!match) return null;
  let text = (match[2] ?? "").trimEnd();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end--;
  if (end < text.length && (end === 0 || text[end - 1] === " ")) text = text.slice(0, end).trimEnd();
  return { block: { type: "h", level: match[1].length, inline: inline(text) }, next: at + 1 };
}

function rule(line, at) {
  return isRule(line) ? { block: { type: "hr" }, next: at + 1 } : null;
}

function quote(lines, at, depth) {
  if (!lines[at].trimStart().startsWith(">")) return null;
  const body = [];
  let next = at;
  for (; next < lines.length && lines[next].trimStart().startsWith(">"); next++) {
    body.push(lines[next].trimStart().replace(/^> ?/, ""));
  }
  return { block: { type: "quote", blocks: parseLines(body, depth + 1) }, next };
}

function list(lines, at, depth) {
  const first = itemOf(lines[at]);
  if (!first) return null;
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const item = itemOf(lines[next]);
    if (!item || item.mark !== first.mark || item.ordered !== first.ordered || item.indent > first.indent + 1) break;
    const body = [item.text];
    // models indent what belongs to "1." by two, three or four spaces
    const least = item.indent + Math.min(2, item.width);
    let blanks = 0;
    let inFence = FENCE.test(item.text);
    for (next++; next < lines.length; next++) {
      const line = lines[next];
      if (isBlank(line)) {
        blanks++;
        continue;
      }
      const inside = indentOf(line) >= least;
      const lazy = blanks === 0 && !inFence && !itemOf(line) && !interrupts(lines, next, depth);
      if (!inside && !lazy) break;
      if (blanks && !inFence) loose = true;
      for (; blanks > 0; blanks--) body.push("");
      const kept = line.slice(Math.min(indentOf(line), item.indent + item.width));
      if (FENCE.test(kept)) inFence = !inFence;
      body.push(kept);
    }
    items.push(parseLines(body, depth + 1));
    if (blanks && next < lines.length && itemOf(lines[next])?.mark === first.mark) loose = true;
  }
  return { block: { type: "list", ordered: first.ordered, start: first.start, loose, items }, next };
}

function cellsOf(line) {
  let text = line.trim();
  if (text.startsWith("|")) text = text.slice(1);
  if (text.endsWith("|") && !text.endsWith("\\|")) text = text.slice(0, -1);
  const cells = [""];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") cells[cells.length - 1] += text[++i];
    else if (text[i] === "|") cells.push("");
    else cells[cells.length - 1] += text[i];
  }
  return cells.map((cell) => cell.trim());
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cellsOf(lines[at + 1]);
  if (marks.length > MAX_COLUMNS || !marks.every((mark) => /^:?-+:?$/.test(mark))) return false;
  return cellsOf(lines[at]).length === marks.length;
}

function table(lines, at) {
  if (!isTable(lines, at)) return null;
  const align = cellsOf(lines[at + 1]).map((mark) => {
    if (!mark.endsWith(":")) return "";
    return mark.startsWith(":") ? "center" : "right";
  });
  const head = cellsOf(lines[at]).map((cell) => inline(cell));
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next++) {
    const cells = cellsOf(lines[next]);
    rows.push(align.map((_, i) => inline(cells[i] ?? "")));
  }
  return { block: { type: "table", align, head, rows }, next };
}

// ---- text within a block

/** An absolute http or https address as the browser writes it, or null. */
export function safeUrl(address) {
  if (!/^https?:\/\//i.test(address) || address.length > MAX_URL) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

const WORD = /[\p{L}\p{N}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const URL_HERE = /https?:\/\/[^\s<>"`]{1,2048}/iy;
const BREAK_HERE = /<br ?\/?>/iy;

/** Where each run of n backticks begins, by n, so that looking for a closing one never goes back. */
function backtickRuns(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, { at: [], seen: 0 });
    runs.get(match[0].length).at.push(match.index);
  }
  return runs;
}

/** For each "[" the place of its "]", found in one pass. */
function brackets(text) {
  const open = [];
  const closes = new Map();
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) closes.set(open.pop(), i);
  }
  return closes;
}

/** The address in "(address "title")" that begins at `at`, and where it ends; null if there is none. */
function target(text, at) {
  if (text[at] !== "(") return null;
  let depth = 0;
  const last = Math.min(text.length, at + MAX_URL);
  for (let i = at; i < last; i++) {
    if (text[i] === "\n") return null;
    if (text[i] === "(" && ++depth > MAX_PARENS) return null;
    if (text[i] === ")" && --depth === 0) {
      const address = text.slice(at + 1, i).trim().split(/\s/, 1)[0].replace(/^<|>$/g, "");
      return { address, end: i + 1 };
    }
  }
  return null;
}

function trimUrl(url) {
  let end = url.length;
  let balance = 0;
  for (const c of url) balance += c === "(" ? 1 : c === ")" ? -1 : 0;
  for (; end > 0; end--) {
    const c = url[end - 1];
    if (c === ")" && balance < 0) balance++;
    else if (!".,;:!?'*_~]}".includes(c)) break;
  }
  return url.slice(0, end);
}

/** The nodes of a line of text: strings, and {type, ...} objects. */
export function inline(text, links = true) {
  const out = [];
  const opened = []; // emphasis that may still be closed: {mark, n, canClose, at (index in out)}
  const runs = backtickRuns(text);
  const closes = links ? brackets(text) : new Map();
  let plain = "";
  const flush = () => {
    if (plain) out.push(plain);
    plain = "";
  };
  const put = (node) => {
    flush();
    out.push(node);
  };

  let i = 0;
  while (i < text.length) {
    const c = text[i];
    if (c === "\\" && i + 1 < text.length) {
      if (text[i + 1] === "\n") put({ type: "br" });
      else plain += ESCAPABLE.test(text[i + 1]) ? text[i + 1] : c + text[i + 1];
      i += 2;
    } else if (c === "\n") {
      plain = plain.trimEnd();
      put({ type: "br" });
      i++;
    } else if (c === "`") {
      let n = 1;
      while (text[i + n] === "`") n++;
      const run = runs.get(n) ?? { at: [], seen: 0 }; // an escaped backtick makes a run of another length
      while (run.seen < run.at.length && run.at[run.seen] < i + n) run.seen++;
      if (run.seen < run.at.length) {
        const end = run.at[run.seen];
        let code = text.slice(i + n, end).replace(/\n/g, " ");
        if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
        put({ type: "code", text: code });
        i = end + n;
      } else {
        plain += text.slice(i, i + n);
        i += n;
      }
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      const open = c === "!" ? i + 1 : i;
      const close = closes.get(open);
      const found = close === undefined ? null : target(text, close + 1);
      const href = found && safeUrl(found.address);
      if (href) {
        const label = inline(text.slice(open + 1, close), false);
        put({ type: "a", href, inline: label.length ? label : [href] });
        i = found.end;
      } else {
        plain += text.slice(i, open + 1);
        i = open + 1;
      }
    } else if (links && addressAt(text, i)) {
      const shown = trimUrl(matchAt(URL_HERE, text, i));
      const href = safeUrl(shown);
      if (href) put({ type: "a", href, inline: [shown] });
      else plain += shown;
      i += shown.length;
    } else if (c === "<" && matchAt(BREAK_HERE, text, i)) {
      put({ type: "br" });
      i += matchAt(BREAK_HERE, text, i).length;
    } else if (c === "*" || c === "_" || c === "~") {
      let n = 1;
      while (text[i + n] === c) n++;
      emphasis(c, n, text[i - 1] ?? " ", text[i + n] ?? " ");
      i += n;
    } else {
      plain += c;
      i++;
    }
  }
  flush();
  return out;

  function emphasis(mark, n, before, after) {
    const inWord = mark === "_" && WORD.test(before) && WORD.test(after);
    if (inWord || n > 3 || (mark === "~" && n !== 2)) {
      plain += mark.repeat(n);
      return;
    }
    const canClose = !/\s/.test(before) && !(mark === "_" && WORD.test(after));
    const canOpen = !/\s/.test(after) && !(mark === "_" && WORD.test(before));
    while (n > 0 && canClose) {
      // CommonMark's rule of three: what may open and close at once does not pair up to a multiple of three
      const fits = (o) => o.mark === mark && (!(canOpen || o.canClose) || (n + o.n) % 3 || !(n % 3));
      let which = opened.length - 1;
      while (which >= 0 && !fits(opened[which])) which--;
      if (which < 0) break;
      flush();
      const opener = opened[which];
      const inner = out.splice(opener.at + 1);
      const used = Math.min(2, n, opener.n);
      opened.length = which + 1;
      opener.n -= used;
      n -= used;
      if (opener.n) {
        out[opener.at] = mark.repeat(opener.n);
      } else {
        opened.pop();
        out.pop();
      }
      out.push({ type: mark === "~" ? "del" : used === 2 ? "strong" : "em", inline: inner });
    }
    if (n > 0 && canOpen && opened.length < MAX_OPEN) {
      put(mark.repeat(n));
      opened.push({ mark, n, canClose, at: out.length - 1 });
    } else if (n > 0) {
      plain += mark.repeat(n);
    }
  }
}

function matchAt(sticky, text, at) {
  sticky.lastIndex = at;
  return sticky.exec(text)?.[0] ?? null;
}

/** Whether a bare address begins here, and not in the middle of a word. */
function addressAt(text, at) {
  if (text[at] !== "h" && text[at] !== "H") return false;
  return !(at > 0 && WORD.test(text[at - 1])) && matchAt(URL_HERE, text, at) !== null;
}
