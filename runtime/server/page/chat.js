// The page: which conversation is shown, and the answers that are being written.

import { answer, ApiError, modelIds } from "./api.js";
import { copy, element, icon, iconButton, showMarkdown } from "./draw.js";
import { askForKey, parameters, settingsAreValid, startPanel } from "./panel.js";
import { conversations, forget, keep, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const input = $("input");
const runs = new Map(); // conversation id -> {conversation, message, controller, waiting}: one answer each at most
const problems = new Map(); // conversation id -> what went wrong with its last answer
const nodes = new WeakMap(); // message -> its node
let current = fresh();
let editing = null; // the user message that is being edited
let following = true; // whether the end of the conversation stays in view

function fresh() {
  // no crypto.randomUUID: browsers keep it from pages that came over plain http
  return { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 10), changed: Date.now(), messages: [] };
}

const status = (text) => void ($("status").textContent = text);

// ---- the conversation on view

function noteOf({ tokens, seconds, wait, finish, model }) {
  const parts = [];
  if (tokens !== null && tokens !== undefined) parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (tokens > 1 && seconds > 0) {
    const speed = (tokens - 1) / seconds;
    parts.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tok/s`);
  }
  if ($("model").options.length > 1 && model) parts.push(model);
  if (finish === "length") parts.push("ended at the token limit");
  if (finish === "stopped") parts.push("stopped");
  if (finish === "lost") parts.push("broke off");
  return element("span", [parts.join(" · ")], {
    className: "note",
    title: wait === undefined ? "" : `first token after ${Number(wait).toFixed(2)} s`,
  });
}

function messageNode(message) {
  let node = nodes.get(message);
  if (!node) {
    const name = element("h2", [message.role === "user" ? "You" : "Answer"], { className: "hidden" });
    const parts = [name, element("div", [], { className: "body" }), element("footer")];
    node = element("article", parts, { className: message.role });
    nodes.set(message, node);
    drawBody(message);
  }
  return node;
}

function drawBody(message) {
  const body = nodes.get(message).querySelector(".body");
  if (message.role === "assistant") showMarkdown(body, message.content);
  else if (editing === message) body.replaceChildren(editor(message));
  else body.textContent = message.content;
}

function drawFooter(message, run) {
  const footer = nodes.get(message).querySelector("footer");
  const last = message === current.messages.at(-1);
  const lastAsked = message === current.messages.findLast((m) => m.role === "user");
  nodes.get(message).classList.toggle("writing", run?.message === message);
  nodes.get(message).classList.toggle("last", last);
  if (run?.message === message || editing === message) return footer.replaceChildren();
  const buttons = [iconButton("copy", "Copy", (button) => copy(message.content, button, status))];
  if (!run && last && message.role === "assistant") buttons.push(iconButton("again", "Answer again", again));
  if (!run && lastAsked) buttons.push(iconButton("edit", "Edit", () => edit(message)));
  footer.replaceChildren(...buttons, ...(message.note ? [noteOf(message.note)] : []));
}

/** Show the current conversation as it is now. */
function draw() {
  const run = runs.get(current.id);
  const wanted = current.messages.map(messageNode);
  const problem = problems.get(current.id);
  if (run?.waiting) wanted.push(element("p", [run.waiting], { className: "problem" }));
  if (problem) {
    const retry = element("button", [icon("again"), "Try again"], { type: "button" });
    retry.addEventListener("click", again);
    wanted.push(element("p", [element("span", [problem]), retry], { className: "problem" }));
  }
  const log = $("log");
  if (wanted.length !== log.childNodes.length || wanted.some((node, i) => node !== log.childNodes[i])) {
    log.replaceChildren(...wanted);
  }
  for (const message of current.messages) drawFooter(message, run);
  $("welcome").hidden = current.messages.length > 0;
  log.setAttribute("aria-busy", String(run !== undefined));
  $("stop").hidden = run === undefined;
  $("send").hidden = run !== undefined;
  document.title = current.messages.length ? `${titleOf(current)} · hotcold` : "hotcold";
  follow();
}

function follow() {
  const view = $("scroll");
  if (following) view.scrollTop = view.scrollHeight;
  $("jump").hidden = following;
}

// ---- the list of conversations

function titleOf(conversation) {
  const asked = conversation.messages.find((m) => m.role === "user")?.content.trim() ?? "";
  return asked.slice(0, 80).split("\n", 1)[0] || "New chat";
}

function drawList() {
  const items = conversations().map((conversation) => {
    const title = titleOf(conversation);
    const open = element("button", [title], { type: "button", className: "title", title });
    if (conversation.id === current.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => show(runs.get(conversation.id)?.conversation ?? conversation));
    const remove = iconButton("close", `Delete “${title}”`, () => {
      if (!confirm(`Delete “${title}”?`)) return;
      runs.get(conversation.id)?.controller.abort();
      forget(conversation.id);
      if (conversation.id === current.id) show(fresh());
      drawList();
    });
    return element("li", [open, remove]);
  });
  $("list").replaceChildren(...items);
}

function show(conversation) {
  current = conversation;
  editing = null;
  following = true;
  openSide(false);
  // the address names the conversation: reloading the page and going back find it
  const hash = conversation.messages.length ? `#${conversation.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  draw();
  drawList();
  if (matchMedia("(pointer: fine)").matches) input.focus(); // elsewhere it would bring up a keyboard
}

function showAddressed() {
  const id = location.hash.slice(1);
  const found = runs.get(id)?.conversation ?? conversations().find((conversation) => conversation.id === id);
  show(found ?? fresh());
}

function openSide(shown) {
  $("side").classList.toggle("open", shown);
  $("side-open").setAttribute("aria-expanded", String(shown));
}

// ---- asking

/** What the server is asked: neighbours of one role, left by an answer that never came, become one message. */
function requestOf(conversation) {
  const { system, sampling } = parameters();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of conversation.messages) {
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
    else if (content) messages.push({ role, content });
  }
  return { model: $("model").value || undefined, messages, ...sampling };
}

async function run(conversation) {
  const asked = requestOf(conversation);
  const message = { role: "assistant", content: "" };
  const writing = { conversation, message, controller: new AbortController(), waiting: "" };
  runs.set(conversation.id, writing);
  problems.delete(conversation.id);
  conversation.messages.push(message);
  conversation.changed = Date.now();
  keep({ ...conversation, messages: conversation.messages.slice(0, -1) });
  following = true;
  if (conversation === current) show(conversation);
  status("Answering");
  try {
    const { finish, ...note } = await answerWithPatience(asked, writing);
    message.note = { ...note, finish, model: asked.model };
    if (!message.content) problems.set(conversation.id, "The answer was empty.");
    status(`The answer is complete${note.tokens === null ? "" : `, ${note.tokens} tokens`}`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    message.note = { finish: stopped ? "stopped" : "lost", model: asked.model };
    const problem = stopped ? "Stopped before the first word." : error.message;
    if (!stopped || !message.content) problems.set(conversation.id, problem);
    status(stopped ? "Stopped" : problem);
  }
  runs.delete(conversation.id);
  if (!message.content) conversation.messages.pop();
  else if (nodes.has(message)) drawBody(message);
  conversation.changed = Date.now();
  if (conversations().some((kept) => kept.id === conversation.id) && !keep(conversation)) {
    status("This browser has no room to keep the conversation");
  }
  drawList();
  if (conversation === current) draw();
}

/** The answer, also if the server must first load its model or has no room yet, or wants a key. */
async function answerWithPatience(asked, writing) {
  const { message, controller, conversation } = writing;
  const redraw = () => conversation === current && draw();
  let frame = 0;
  const onText = (text) => {
    message.content += text;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (conversation !== current || !nodes.has(message)) return;
      drawBody(message);
      follow();
    });
  };
  for (;;) {
    try {
      return await answer(asked, controller.signal, onText);
    } catch (error) {
      if (!(error instanceof ApiError) || message.content) throw error;
      if (error.status === 401 && (await askForKey())) {
        findModels();
        continue;
      }
      if (error.status !== 429 && error.status !== 503) throw error;
      for (let left = Math.max(1, Math.ceil(error.retryAfter ?? 2)); left > 0; left--) {
        const then = `trying again in ${left} s`;
        writing.waiting = error.status === 503 ? `The server is not ready: ${then}.` : `The server is busy: ${then}.`;
        redraw();
        await pause(1000, controller.signal);
      }
      writing.waiting = "";
      redraw();
    }
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

function send(text) {
  if (!text.trim() || runs.has(current.id) || !settingsAreValid()) return;
  if (editing) stopEditing();
  current.messages.push({ role: "user", content: text.trim() });
  input.value = "";
  fit(input);
  run(current);
}

function again() {
  if (runs.has(current.id) || !settingsAreValid()) return;
  if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  run(current);
}

function stop() {
  runs.get(current.id)?.controller.abort();
}

// ---- editing the last question

function edit(message) {
  editing = message;
  drawBody(message);
  draw();
  nodes.get(message).querySelector("textarea").focus();
}

function stopEditing() {
  const message = editing;
  editing = null;
  drawBody(message);
  draw();
  input.focus();
}

function editor(message) {
  const field = element("textarea", [], { value: message.content, rows: 1 });
  field.setAttribute("aria-label", "Edit the message");
  const cancel = element("button", ["Cancel"], { type: "button" });
  const buttons = element("div", [cancel, element("button", ["Send"], { className: "strong" })], { className: "row" });
  const form = element("form", [field, buttons]);
  cancel.addEventListener("click", stopEditing);
  sendsOnEnter(field, form);
  field.addEventListener("keydown", (event) => event.key === "Escape" && stopEditing());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim() || !settingsAreValid()) return;
    editing = null;
    current.messages.length = current.messages.indexOf(message);
    send(field.value);
  });
  requestAnimationFrame(() => fit(field));
  return form;
}

function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function sendsOnEnter(field, form) {
  field.addEventListener("input", () => fit(field));
  field.addEventListener("keydown", (event) => {
    // Enter also confirms what an input method offers; 229 is how Safari says so
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

// ---- models

let looking = 0;

/** Fill the list of models; where the server is not ready, look again until it is. */
async function findModels() {
  clearTimeout(looking);
  const picker = $("model");
  try {
    const ids = await modelIds();
    picker.replaceChildren(...ids.map((id) => element("option", [id], { value: id })));
    picker.value = ids.includes(settings.get().model) ? settings.get().model : (ids[0] ?? "");
    picker.disabled = ids.length === 0;
  } catch (error) {
    if (error.status === 401) return (await askForKey()) ? findModels() : undefined;
    const loading = error.status === 503;
    picker.replaceChildren(element("option", [loading ? "Loading the model…" : "No server"], { value: "" }));
    picker.disabled = true;
    looking = setTimeout(findModels, loading ? 1000 : 3000);
  }
}

// ---- the start

function start() {
  startPanel(findModels);
  sendsOnEnter(input, $("composer"));
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(input.value);
  });
  $("stop").addEventListener("click", stop);
  for (const id of ["new", "new-top"]) $(id).addEventListener("click", () => show(fresh()));
  $("side-open").addEventListener("click", () => openSide(true));
  $("side-close").addEventListener("click", () => openSide(false));
  $("model").addEventListener("change", () => settings.set({ ...settings.get(), model: $("model").value }));
  for (const idea of $("ideas").children) idea.addEventListener("click", () => send(idea.textContent));
  $("log").addEventListener("click", ({ target }) => {
    const button = target.closest(".copy-code");
    if (button) copy(button.closest(".code").querySelector("code").textContent, button, status);
  });
  $("jump").addEventListener("click", () => {
    following = true;
    follow();
  });
  const view = $("scroll");
  view.addEventListener("scroll", () => {
    following = view.scrollHeight - view.scrollTop - view.clientHeight < 48;
    $("jump").hidden = following;
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("ask-key").open) return;
    if ($("side").classList.contains("open")) openSide(false);
    else stop();
  });
  addEventListener("storage", drawList);
  addEventListener("popstate", showAddressed);
  addEventListener("pagehide", () => runs.forEach(({ conversation }) => keep(conversation)));
  showAddressed();
  findModels();
}

start();
