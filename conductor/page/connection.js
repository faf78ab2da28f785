// The stream of looks at the cluster. It comes back by itself, and rests while nobody looks.

import { eventsOf } from "./events.js";
import { authorization } from "./key.js";
import { pauseAfter } from "./pause.js";

const SILENCE_MS = 6000; // a tick is a second: whoever is silent for so long is gone
const FIRST_PAUSE_MS = 500;
const LAST_PAUSE_MS = 10000;
const LOCKED = "locked"; // another key is needed, and no use in trying before
const FORBIDDEN = "forbidden";

export class Connection {
  /** `on.look(snapshot)`, `on.state(name, why)`; names are those of WORDS in app.js. */
  constructor(on) {
    this.on = on;
    this.abort = null; // of the connection that is there
    this.wake = null; // ends a pause
    this.failures = 0;
    document.addEventListener("visibilitychange", () => this.#turn());
  }

  /** Until the page goes. */
  async run() {
    for (;;) {
      if (document.hidden) {
        this.on.state("paused", "");
        await this.#pause(null);
        continue;
      }
      const why = await this.#follow();
      if (document.hidden) continue;
      if (why === LOCKED || why === FORBIDDEN) {
        this.on.state(why, "");
        await this.#pause(null);
        continue;
      }
      this.failures += 1;
      this.on.state("reconnecting", why);
      await this.#pause(pauseAfter(this.failures, FIRST_PAUSE_MS, LAST_PAUSE_MS));
    }
  }

  /** At once, for instance with another key. */
  retry() {
    this.failures = 0;
    this.wake?.();
  }

  /** One connection, to its end; says why it ended. */
  async #follow() {
    const abort = new AbortController();
    this.abort = abort;
    let watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await fetch("live", {
        headers: authorization(),
        cache: "no-store",
        signal: abort.signal,
      });
      if (response.status === 401) return LOCKED;
      if (response.status === 403) return FORBIDDEN;
      if (!response.ok) return `the conductor answered with status ${response.status}`;
      for await (const event of eventsOf(response)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
        if (event.type === "end") return "the conductor has stopped";
        this.failures = 0;
        this.on.state("live", "");
        this.on.look(JSON.parse(event.data));
      }
      return "the connection ended";
    } catch {
      return "the conductor cannot be reached";
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
  }

  #turn() {
    if (document.hidden) this.abort?.abort();
    else this.retry();
  }

  #pause(milliseconds) {
    return new Promise((resolve) => {
      const timer = milliseconds === null ? null : setTimeout(resolve, milliseconds);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
