// The server's API: which models there are, and answers as they come. Addresses are relative, so that the page works
// under any path that a proxy puts before it.

import { apiKey } from "./store.js";

/** What went wrong, in words for people; status is HTTP's, or 0 where there was no answer at all. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

const LOST = "The connection was lost before the answer ended.";
const UNREACHABLE = "The server cannot be reached. Is it still running?";

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(UNREACHABLE);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message ?? "";
  } catch {
    // a proxy's error page, say
  }
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const message = said || `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  return new ApiError(message, response.status, Number.isFinite(after) && after >= 0 ? after : null);
}

/** The ids of the server's models. */
export async function modelIds() {
  const list = await (await request("v1/models")).json();
  return (list.data ?? []).map((model) => String(model.id));
}

/**
 * An answer to a conversation: calls onText(text) as it comes, and returns {finish, tokens, seconds, wait}: why it
 * ended, how many tokens it has, the seconds from the first to the last of them, and those before the first.
 */
export async function answer(body, signal, onText) {
  const asked = performance.now();
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let first = null;
  let last = asked;
  let finish = null;
  let tokens = null;
  let done = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server gave up on this answer.");
    tokens = chunk.usage?.completion_tokens ?? tokens;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    if (choice.delta?.content) {
      last = performance.now();
      first ??= last;
      onText(choice.delta.content);
    }
  }
  if (!done && finish === null) throw new ApiError(LOST);
  first ??= last;
  return { finish, tokens, seconds: (last - first) / 1000, wait: (first - asked) / 1000 };
}

/** The data of each server-sent event of a body: https://html.spec.whatwg.org/multipage/server-sent-events.html */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // a "\r" at the end may be the first half of a "\r\n"
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}
