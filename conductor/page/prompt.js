// The box to send a prompt from, and its answer as it comes.

import { chunksOf, Refused } from "./answer.js";
import { byId, h } from "./dom.js";
import { messageOf } from "./events.js";
import * as format from "./format.js";
import { authorization } from "./key.js";

const LOCKED = 401;

export class PromptBox {
  /** `onTimeline(id)` shows a request's timeline; `onLocked()` asks for a key. */
  constructor(onTimeline, onLocked) {
    this.onTimeline = onTimeline;
    this.onLocked = onLocked;
    this.model = "";
    this.abort = null; // of the answer that is coming
    this.text = byId("prompt-text");
    this.answer = byId("answer");
    this.figures = byId("answer-figures");
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("prompt-stop").addEventListener("click", () => this.abort?.abort());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      byId("prompt-form").requestSubmit();
    });
  }

  async #send() {
    if (this.abort !== null) return;
    const abort = new AbortController();
    this.abort = abort;
    this.#setBusy(true);
    const run = { id: "", sent: performance.now(), first: null, last: null, usage: null, broken: false };
    this.answer.replaceChildren();
    const text = this.answer.appendChild(document.createTextNode(""));
    try {
      if (this.model === "") await this.#findModel(abort.signal);
      await this.#stream(run, text, abort.signal);
      this.#tell(run, "");
    } catch (error) {
      if (error.status === LOCKED) this.onLocked();
      this.#tell(run, abort.signal.aborted ? "stopped" : error.message);
    } finally {
      this.abort = null;
      this.#setBusy(false);
    }
  }

  async #stream(run, text, signal) {
    const kind = byId("prompt-kind").value;
    const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
    const body = JSON.stringify(this.#body(kind));
    const onBreak = (why) => {
      run.broken = true;
      this.#say(`▲ reconnecting: ${why}`, "reconnecting");
    };
    for await (const chunk of chunksOf(path, body, signal, onBreak)) this.#take(run, chunk, text);
  }

  /** For who may not watch the cluster: a look at it tells the model otherwise. */
  async #findModel(signal) {
    const response = await fetch("v1/models", { headers: authorization(), signal });
    if (!response.ok) throw new Refused(await messageOf(response), response.status);
    this.model = (await response.json()).data[0].id;
  }

  #body(kind) {
    const prompt = this.text.value;
    const content = kind === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    return {
      model: this.model,
      ...content,
      max_tokens: byId("prompt-max").valueAsNumber,
      temperature: byId("prompt-temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #take(run, chunk, text) {
    run.id = chunk.id ?? run.id;
    run.usage = chunk.usage ?? run.usage;
    if (run.broken) {
      run.broken = false;
      this.#tell(run, "");
    }
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    if (piece === "") return;
    run.last = performance.now();
    if (run.first === null) {
      run.first = run.last;
      this.#tell(run, "");
    }
    const atEnd = this.answer.scrollHeight - this.answer.scrollTop - this.answer.clientHeight < 8;
    text.appendData(piece);
    if (atEnd) this.answer.scrollTop = this.answer.scrollHeight;
  }

  /** What is known of the answer: times as this browser saw them. */
  #tell(run, ending) {
    const parts = [];
    if (run.first !== null) parts.push(`TTFT ${format.duration((run.first - run.sent) / 1e3)}`);
    if (run.usage !== null) parts.push(...ofUsage(run));
    if (ending !== "") parts.push(ending);
    this.#say(parts.join(" · "), "");
    // Who may not watch the cluster has no table in which it could be shown.
    if (run.id !== "" && document.body.dataset.connection !== "forbidden") this.figures.append(parts.length ? " · " : "", this.#link(run.id));
  }

  #say(text, state) {
    this.figures.textContent = text;
    this.figures.dataset.state = state;
  }

  #link(id) {
    const show = (event) => {
      event.preventDefault();
      this.onTimeline(id);
    };
    return h("a", { href: "#requests-title", click: show }, "timeline");
  }

  #setBusy(busy) {
    this.answer.setAttribute("aria-busy", busy); // it is read out when it is complete
    this.answer.classList.toggle("busy", busy);
    byId("prompt-send").disabled = busy;
    byId("prompt-stop").disabled = !busy;
    if (busy) this.#say("sent, waiting for the first token", "");
  }
}

function ofUsage({ usage, first, last }) {
  const { prompt_tokens: prompt, completion_tokens: made } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [`${format.plural(made, "token")} from ${format.count(prompt)}`];
  if (made > 1 && last > first) parts.push(`${format.rate(((made - 1) * 1e3) / (last - first))} tokens/s`);
  parts.push(`${format.count(cached)} cached`);
  return parts;
}
