// One request's timeline: what happened where, as bars over the same time.

import { h } from "./dom.js";
import * as format from "./format.js";

const LEAST_S = 5e-6; // what takes less has not taken place: a queue without anybody in it
const COLOURS = 5; // classes `c0` … of sources
// Of stages: what the conductor does, what waits, what loads, what computes, the way back.
const STAGES = { queue: 3, adopt: 3, prefix_load: 4, prefill: 1, return: 2, deliver: 2, retries: 5 };

/** Of the answer of `GET /trace/ID`. */
export function waterfall(trace) {
  const spans = trace.spans.filter((span) => span.end_s - span.start_s > LEAST_S);
  const begin = Math.min(trace.received_s, ...spans.map((span) => span.start_s));
  const end = Math.max(...spans.map((span) => span.end_s), begin + 1e-6);
  const sources = [...new Set(spans.map((span) => span.source))];
  const rows = spans.map((span) => row(span, begin, end, sources.indexOf(span.source)));
  const head = h("tr", {}, ...["Where", "What", "When", "Takes"].map((name, at) =>
    h("th", { scope: "col", class: at === 3 ? "number" : null }, name)));
  const caption = h("caption", { class: "unseen" }, `Timeline of ${trace.request_id}`);
  const table = h("table", { class: "waterfall" }, caption, h("thead", {}, head), h("tbody", {}, ...rows));
  const scale = h("p", { class: "hint" }, `from 0 to ${format.duration(end - begin)}`);
  return h("div", { class: "timeline" }, ...texts(trace), ...stages(trace), table, scale);
}

function row(span, begin, end, colour) {
  const bar = h("span", { class: `c${colour % COLOURS}` });
  const share = (moment) => (100 * (moment - begin)) / (end - begin);
  bar.style.left = `${Math.min(share(span.start_s), 99.5)}%`;
  bar.style.width = `${Math.max(share(span.end_s) - share(span.start_s), 0.5)}%`;
  const when = `begins after ${format.duration(span.start_s - begin)}`;
  return h("tr", {},
    h("td", {}, span.source),
    h("td", {}, words(span.name)),
    h("td", { class: "when" }, h("div", { class: "track", role: "img", "aria-label": when, title: when }, bar)),
    h("td", { class: "number" }, format.duration(span.end_s - span.start_s)));
}

/** The whole id, why these workers were chosen, and how attempts ended. */
function texts(trace) {
  const lines = [h("p", {}, h("code", {}, trace.request_id))];
  if (trace.error) lines.push(h("p", { class: "error" }, trace.error));
  for (const attempt of trace.attempts ?? []) {
    const way = [attempt.prefill, attempt.decode].filter((name) => name).join(" → ");
    const number = trace.attempts.length > 1 ? `${attempt.attempt}: ` : "";
    const ended = attempt.ended && attempt.ended !== "complete" ? ` · ended: ${attempt.ended}` : "";
    lines.push(h("p", { class: "hint" }, `${number}${way} · ${(attempt.reasons ?? []).join("; ")}${ended}`));
  }
  return lines;
}

/** Where the time to the first token went, and what the second one waited for. */
function stages(trace) {
  const parts = trace.ttft_stages.filter((stage) => stage.seconds > 0);
  const total = parts.reduce((sum, stage) => sum + stage.seconds, 0);
  if (total === 0) return [];
  const bar = h("div", { class: "stages", "aria-hidden": "true" });
  const names = h("ol", { class: "stage-names", "aria-label": "Time to the first token, by stage" });
  for (const stage of parts) {
    const colour = { class: `c${STAGES[stage.name] ?? 0}` };
    const piece = h("span", colour);
    piece.style.flexGrow = stage.seconds / total;
    bar.append(piece);
    names.append(h("li", colour, told(stage)));
  }
  const second = trace.second_token_stages.map(told).join(" · ");
  const title = trace.ttft_s === null ? "No token so far" : `TTFT ${format.duration(trace.ttft_s)}`;
  const more = second === "" ? [] : [h("p", { class: "hint" }, `The second token: ${second}`)];
  return [h("p", {}, title), bar, names, ...more];
}

function told(stage) {
  return `${words(stage.name)} ${format.duration(stage.seconds)}`;
}

function words(name) {
  return name.replaceAll("_", " ");
}
