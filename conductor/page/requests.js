// The last requests, newest first; each opens to its timeline.

import { byId, h, keyed, setAttribute, setText } from "./dom.js";
import { messageOf } from "./events.js";
import { showState, stateBadge } from "./fleet.js";
import * as format from "./format.js";
import { authorization } from "./key.js";
import { waterfall } from "./waterfall.js";

const ICONS = { ok: "✓", running: "▶", cancelled: "■" };
const FEW = 8; // that are shown at first
const COLUMNS = ["Prompt", "Cached", "Output", "TTFT", "TPOT", "Time"];

export class Requests {
  constructor() {
    this.table = byId("requests");
    this.wanted = null; // a request whose timeline is to be shown as soon as it is in the table
    this.more = byId("requests-more");
    this.more.addEventListener("click", () => {
      this.all = !this.all;
      this.show(this.look);
    });
    this.all = false;
    this.look = null;
  }

  show(look) {
    this.look = look;
    const { requests } = look;
    byId("requests-empty").hidden = requests.length > 0;
    this.table.hidden = requests.length === 0;
    this.more.hidden = requests.length <= FEW;
    setText(this.more, this.all ? `Show the last ${FEW}` : `Show the last ${requests.length}`);
    keyed(this.table, requests.filter((each, at) => this.#isShown(each, at)), (each) => each.id, makeRows, (rows, request) =>
      showRows(rows, request, look.time_s),
    );
    if (this.wanted !== null) this.open(this.wanted);
  }

  /** A timeline that is open stays, as long as the cluster tells of its request. */
  #isShown({ id }, at) {
    return this.all || at < FEW || id === this.wanted || this.#buttonOf(id)?.ariaExpanded === "true";
  }

  #buttonOf(id) {
    return this.table.querySelector(`button[data-id="${CSS.escape(id)}"]`);
  }

  /** Open a request's timeline and go there. */
  open(id) {
    this.wanted = null;
    const button = this.#buttonOf(id);
    if (button === null) {
      this.wanted = id;
      return;
    }
    if (button.getAttribute("aria-expanded") === "false") button.click();
    button.focus();
    button.scrollIntoView({ block: "nearest" });
  }
}

/** Two rows in a body of their own: the figures, and room for the timeline. */
function makeRows({ id }) {
  const room = `timeline-${++rooms}`;
  const button = h("button", {
    type: "button", class: "plain", "data-id": id, "aria-expanded": "false", "aria-controls": room,
    "aria-label": `Timeline of ${id}`, title: id, click: () => toggle(body, button, id),
  }, h("span", { class: "chevron", "aria-hidden": "true" }), h("code", {}, short(id)));
  const cells = COLUMNS.map((name) => h("td", { role: "cell", class: "number", "data-label": name }));
  const row = h("tr", { role: "row" },
    h("th", { role: "rowheader", scope: "row" }, button),
    h("td", { role: "cell", "data-label": "State" }, stateBadge()),
    ...cells,
    h("td", { role: "cell", class: "path", "data-label": "Workers" }));
  const detail = h("td", { role: "cell", colspan: COLUMNS.length + 3 });
  const body = h("tbody", { role: "rowgroup" }, row,
    h("tr", { role: "row", id: room, class: "detail", hidden: "" }, detail));
  return body;
}

let rooms = 0;

function showRows(body, request, now) {
  const [row, detail] = body.children;
  const state = request.outcome;
  const kind = state === "ok" || state === "running" || state === "cancelled" ? state : "failed";
  const badge = row.children[1].firstElementChild;
  showState(badge, state, ICONS[state] ?? "✕");
  setAttribute(badge, "data-state", kind);
  const running = request.duration_s === null;
  const time = running ? Math.max(now - request.received_s, 0) : request.duration_s;
  const texts = [
    format.count(request.prompt_tokens),
    running ? "–" : format.count(request.cached_tokens),
    format.count(request.output_tokens),
    format.duration(request.ttft_s),
    format.duration(request.tpot_s),
    format.duration(time),
  ];
  texts.forEach((text, at) => setText(row.children[2 + at], text));
  setText(row.lastElementChild, path(request));
  // A timeline that was opened while its request ran is read once more at the end.
  const ended = String(!running);
  if (!detail.hidden && body.dataset.ended === "false" && ended === "true") load(body, request.id);
  body.dataset.ended = ended;
}

function path({ prefill, decode, attempts }) {
  const way = [prefill, decode].filter((name) => name !== null).join(" → ") || "–";
  return attempts > 1 ? `${way} (attempt ${attempts})` : way;
}

function toggle(body, button, id) {
  const detail = body.lastElementChild;
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", String(!detail.hidden));
  if (!detail.hidden) load(body, id);
}

async function load(body, id) {
  const room = body.lastElementChild.firstElementChild;
  if (!room.hasChildNodes()) room.textContent = "loading…";
  try {
    const headers = authorization();
    const response = await fetch(`trace/${encodeURIComponent(id)}`, { headers, cache: "no-store" });
    if (!response.ok) throw new Error(await messageOf(response));
    room.replaceChildren(waterfall(await response.json()));
  } catch (error) {
    room.textContent = `No timeline: ${error.message}`;
  }
}

/** Ids are long: their kind and their end tell them apart. */
function short(id) {
  return id.length <= 18 ? id : `${id.slice(0, 8)}…${id.slice(-6)}`;
}
