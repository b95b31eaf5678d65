// What the browser keeps: conversations and settings (localStorage), and the API key (sessionStorage: this tab only).
//
// A conversation is {id, changed (ms), messages: [{role, content, note?}]}, each under a key of its own, so that two
// tabs do not overwrite each other's. There are bounds, since a browser gives a site about 5 MB: the oldest go first.

const PREFIX = "hotcold.chat.";
const SETTINGS = "hotcold.settings";
const KEY = "hotcold.key";
const MAX_CONVERSATIONS = 100;
const MAX_CHARS = 2_000_000;

/** A storage of the browser's, or one for as long as the page is open where the browser refuses. */
function storage(name) {
  try {
    const found = window[name];
    found.getItem(PREFIX);
    return found;
  } catch {
    const kept = new Map();
    return {
      get length() {
        return kept.size;
      },
      key: (i) => [...kept.keys()][i] ?? null,
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => void kept.set(key, value),
      removeItem: (key) => void kept.delete(key),
    };
  }
}

const lasting = storage("localStorage");
const passing = storage("sessionStorage");

function read(key) {
  try {
    return JSON.parse(lasting.getItem(key));
  } catch {
    return null;
  }
}

function isConversation(found) {
  return (
    typeof found?.id === "string" &&
    typeof found.changed === "number" &&
    Array.isArray(found.messages) &&
    found.messages.every((m) => (m?.role === "user" || m?.role === "assistant") && typeof m.content === "string")
  );
}

/** All conversations that are kept, the latest first. */
export function conversations() {
  const keys = Array.from({ length: lasting.length }, (_, i) => lasting.key(i));
  const found = keys.filter((key) => key?.startsWith(PREFIX)).map(read);
  return found.filter(isConversation).sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation; the oldest others make room. False if it cannot be kept at all. */
export function keep(conversation) {
  const text = JSON.stringify(conversation);
  const others = conversations().filter((other) => other.id !== conversation.id);
  let chars = text.length;
  others.forEach((other, i) => {
    chars += JSON.stringify(other).length;
    if (i >= MAX_CONVERSATIONS - 1 || chars > MAX_CHARS) forget(other.id);
  });
  for (;;) {
    try {
      lasting.setItem(PREFIX + conversation.id, text);
      return true;
    } catch {
      const oldest = conversations().findLast((other) => other.id !== conversation.id);
      if (!oldest) return false;
      forget(oldest.id);
    }
  }
}

export function forget(id) {
  lasting.removeItem(PREFIX + id);
}

/** Settings as texts, by the names of the form's fields; `model` too. */
export const settings = {
  get: () => {
    const found = read(SETTINGS);
    return found && typeof found === "object" ? found : {};
  },
  set: (values) => {
    try {
      lasting.setItem(SETTINGS, JSON.stringify(values));
    } catch {
      // they hold for this page all the same: the form has them
    }
  },
};

export const apiKey = {
  get: () => passing.getItem(KEY) ?? "",
  set: (key) => (key ? passing.setItem(KEY, key) : passing.removeItem(KEY)),
};
