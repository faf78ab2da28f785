// The API key, where the cluster asks for one. It stays in this tab.

import { byId } from "./dom.js";

const NAME = "baton-api-key";

/** Headers that every request of this page has. */
export function authorization() {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The form that asks for a key; `onKey` is called when there is another one. */
export class KeyForm {
  constructor(onKey) {
    this.form = byId("key-form");
    this.input = byId("key");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(NAME, this.input.value.trim());
      this.input.value = "";
      this.form.hidden = true;
      onKey();
    });
  }

  ask() {
    const refused = sessionStorage.getItem(NAME) !== null;
    sessionStorage.removeItem(NAME);
    byId("key-why").textContent = refused
      ? "The cluster does not know this API key."
      : "This cluster asks for an API key.";
    this.form.hidden = false;
    this.input.focus();
  }
}
