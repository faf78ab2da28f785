// KV on its way: a line for each pair of workers, as thick as much flows, over the cards.

import { byId, h, keyed, s, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

const MOST_LABELS = 8; // with more of them, the list says it better
const LABEL_PLACES = [0.5, 0.35, 0.65, 0.22, 0.78]; // along a line
const KINDS = { handoff: "handoff", fetch: "fetched prefix", offer: "into the store" };

export class FlowMap {
  constructor(fleet, drawing) {
    this.fleet = fleet;
    this.drawing = drawing;
    this.lines = s("g");
    drawing.append(arrows(), this.lines);
    this.flows = [];
    new ResizeObserver(() => this.#draw()).observe(fleet);
  }

  show(flows) {
    this.flows = flows;
    this.#draw();
    this.#list();
  }

  /** From where the cards are now. */
  #draw() {
    const places = new Map();
    const frame = this.fleet.getBoundingClientRect();
    for (const card of this.fleet.querySelectorAll("[data-member]")) {
      places.set(card.dataset.member, placeOf(card, frame));
    }
    setAttribute(this.drawing, "viewBox", `0 0 ${frame.width} ${frame.height}`);
    const drawn = this.flows
      .map((flow) => ({ ...flow, from: places.get(flow.source), to: places.get(flow.target) }))
      .filter(({ from, to }) => from && to);
    const labelled = drawn.filter((flow) => flow.bytes_per_s > 0).length <= MOST_LABELS;
    const taken = []; // places of labels
    keyed(this.lines, drawn, keyOf, makeLine, (line, flow) => {
      showLine(line, flow);
      showLabel(line, labelled ? flow : null, taken);
    });
  }

  #list() {
    const now = this.flows.reduce((sum, flow) => sum + flow.bytes_per_s, 0);
    const text = this.flows.length
      ? `KV moved between ${format.plural(this.flows.length, "pair")}, ${format.bytes(now)}/s now`
      : "No KV moved in the last minute";
    setText(byId("flow-summary"), text);
    keyed(byId("flow-rows"), this.flows, keyOf, makeRow, showRow);
  }
}

function keyOf(flow) {
  return `${flow.kind} ${flow.source} ${flow.target}`;
}

function placeOf(card, frame) {
  const box = card.getBoundingClientRect();
  const left = box.left - frame.left;
  const top = box.top - frame.top;
  const role = card.closest(".pool").dataset.role;
  return { role, left, top, right: left + box.width, bottom: top + box.height,
    x: left + box.width / 2, y: top + Math.min(box.height / 2, 34) };
}

function makeLine(flow) {
  const end = `url(#arrow-${flow.kind})`;
  const path = s("path", { class: "wire", "marker-end": end });
  return s("g", { class: `flow ${flow.kind}` }, path, s("path", { class: "pulse" }), s("text"));
}

function showLine(line, flow) {
  const [wire, pulse] = line.children;
  const path = curve(flow.from, flow.to, flow.kind);
  setAttribute(wire, "d", path);
  setAttribute(pulse, "d", path);
  const going = flow.bytes_per_s > 0;
  line.classList.toggle("going", going);
  // Thicker by a pixel for every tenfold: from kilobytes to gigabytes a second.
  const width = going ? Math.min(Math.max(Math.log10(flow.bytes_per_s) - 2.5, 1.5), 7) : 1;
  line.style.setProperty("--width", `${width.toFixed(1)}px`);
}

/** How much flows, at the first place along the line where no other label is. */
function showLabel(line, flow, taken) {
  const [wire, , label] = line.children;
  const length = wire.getTotalLength();
  const free = flow?.bytes_per_s > 0
    ? LABEL_PLACES.map((share) => wire.getPointAtLength(share * length)).find((point) =>
        taken.every(({ x, y }) => Math.abs(point.x - x) > 70 || Math.abs(point.y - y) > 16))
    : undefined;
  setText(label, free ? `${format.bytes(flow.bytes_per_s)}/s` : "");
  if (!free) return;
  taken.push(free);
  setAttribute(label, "x", free.x.toFixed(0));
  setAttribute(label, "y", (free.y - 6).toFixed(0));
}

/** A path from card to card. */
function curve(from, to, kind) {
  if (from.left === to.left) return aside(from, to);
  const rightwards = from.x < to.x;
  const start = { x: rightwards ? from.right : from.left, y: from.y + (kind === "offer" ? 14 : 0) };
  if (to.role === "store" || from.role === "store") return bend(from, to, start, rightwards);
  const end = { x: (rightwards ? to.left : to.right) + (rightwards ? -5 : 5), y: to.y };
  const middle = (start.x + end.x) / 2;
  return `M${start.x},${start.y}C${middle},${start.y} ${middle},${end.y} ${end.x},${end.y}`;
}

/** Between cards of one column: out of it, along its side, and in again. */
function aside(from, to) {
  const far = from.right + 20;
  const end = to.right + 5;
  return `M${from.right},${from.y}C${far},${from.y} ${far},${to.y} ${end},${to.y}`;
}

/** Between a worker and a store below: through the lane between the columns. */
function bend(from, to, start, rightwards) {
  const down = to.role === "store";
  const [worker, store] = down ? [from, to] : [to, from];
  const right = worker.x < store.x;
  const side = { x: right ? worker.right : worker.left, y: worker.y + (down ? 16 : 30) };
  const top = { x: store.x + (right ? -1 : 1) * (down ? 34 : 14), y: store.top };
  const lane = `${top.x},${side.y}`;
  const low = `${top.x},${Math.max(top.y - 60, side.y)}`;
  return down
    ? `M${side.x},${side.y}C${lane} ${low} ${top.x},${top.y - 5}`
    : `M${top.x},${top.y}C${low} ${lane} ${side.x + (right ? 5 : -5)},${side.y}`;
}

function arrows() {
  const shape = { viewBox: "0 0 6 6", refX: "3", refY: "3", orient: "auto",
    markerWidth: "7", markerHeight: "7", markerUnits: "userSpaceOnUse" };
  const all = Object.keys(KINDS).map((kind) =>
    s("marker", { id: `arrow-${kind}`, class: kind, ...shape }, s("path", { d: "M0,0 6,3 0,6z" })),
  );
  return s("defs", {}, ...all);
}

function makeRow(flow) {
  const cells = [flow.source, flow.target, KINDS[flow.kind] ?? flow.kind];
  const figures = [h("td", { class: "number" }), h("td", { class: "number" })];
  return h("tr", {}, ...cells.map((text) => h("td", {}, text)), ...figures);
}

function showRow(row, flow) {
  setText(row.children[3], format.bytes(flow.bytes));
  setText(row.children[4], `${format.bytes(flow.bytes_per_s)}/s`);
}
