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

  /** For a key, or another one. */
  ask() {
    const refused = sessionStorage.getItem(NAME) !== null;
    sessionStorage.removeItem(NAME);
    this.#show(refused ? "The cluster does not know this API key." : "This cluster asks for an API key.");
    this.input.focus();
  }

  /** For an admin's key: the one that there is may send prompts, but not see those of others. */
  askForAdmin() {
    this.#show("Prompts can be sent with this API key. To watch the cluster, use an admin's.");
  }

  #show(why) {
    byId("key-why").textContent = why;
    this.form.hidden = false;
  }
}
