// The settings beside the conversation, and the API key.

import { apiKey, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const form = $("params");

/** The settings as a request has them: the system prompt, and those numbers that are filled in. */
export function parameters() {
  const numbers = [...form.elements].filter((field) => field.type === "number" && field.value !== "");
  return {
    system: form.elements.system.value.trim(),
    sampling: Object.fromEntries(numbers.map((field) => [field.name, field.valueAsNumber])),
  };
}

/** Whether every setting can be sent; shows the first that cannot. */
export function settingsAreValid() {
  // a field with letters in it has the value "" and says so in its validity
  const wrong = [...form.elements].find((field) => !field.checkValidity());
  if (!wrong) return true;
  open(true);
  wrong.focus();
  wrong.reportValidity();
  return false;
}

function open(shown) {
  $("settings").hidden = !shown;
  $("settings-open").setAttribute("aria-expanded", String(shown));
  if (shown) {
    $("key").value = apiKey.get();
    form.elements.system.focus();
  } else {
    $("settings-open").focus();
  }
}

function keep() {
  const values = Object.fromEntries([...form.elements].filter((f) => f.name).map((f) => [f.name, f.value]));
  settings.set({ ...settings.get(), ...values });
}

/** Ask for the API key; resolves to whether one was given. */
export function askForKey() {
  const dialog = $("ask-key");
  if (!dialog.open) {
    $("ask-key-why").hidden = !apiKey.get();
    $("asked-key").value = "";
    dialog.returnValue = "";
    dialog.showModal();
  }
  return new Promise((resolve) => {
    const closed = () => {
      const given = dialog.returnValue === "ok";
      if (given) apiKey.set($("asked-key").value.trim());
      resolve(given);
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

/** Wire the panel; changedKey is called when another key was entered. */
export function startPanel(changedKey) {
  for (const field of form.elements) {
    if (field.name) field.value = settings.get()[field.name] ?? field.defaultValue;
    field.addEventListener("input", () => field.setAttribute("aria-invalid", String(!field.checkValidity())));
  }
  form.addEventListener("input", keep);
  form.addEventListener("submit", (event) => event.preventDefault());
  $("defaults").addEventListener("click", () => {
    form.reset();
    for (const field of form.elements) field.removeAttribute("aria-invalid");
    keep();
  });
  $("settings-open").addEventListener("click", () => open($("settings").hidden));
  $("settings-close").addEventListener("click", () => open(false));
  $("settings").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    open(false);
  });
  $("key-form").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("change", () => {
    apiKey.set($("key").value.trim());
    changedKey();
  });
  $("ask-key-cancel").addEventListener("click", () => $("ask-key").close(""));
}
