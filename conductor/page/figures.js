// The row of figures, each with what it was in the last five minutes.

import { h, s, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

const WIDTH = 120;
const HEIGHT = 28;
const TIERS = { own: "own pool", peer: "other pools", cpu: "memory", nvme: "NVMe" };

/** How each figure is read out of a look: its main value, and smaller ones below. */
const FIGURES = [
  { name: "TTFT", about: "to the first token, median", history: "ttft_s", read: (p) => percentiles(p.ttft_s) },
  { name: "TPOT", about: "per output token, median", history: "tpot_s", read: (p) => percentiles(p.tpot_s) },
  { name: "Goodput", about: "requests that kept the SLOs", history: "goodput_per_s", read: goodput },
  { name: "Hit rate", about: "of prompt tokens", history: "hit_rate", read: hitRate },
  { name: "Requests", about: "per second", history: "requests_per_s", read: requests },
  { name: "Tokens", about: "generated per second", history: "tokens_per_s", read: tokens },
];

export class Figures {
  constructor(parent) {
    this.cards = FIGURES.map((figure) => new Card(parent, figure));
  }

  show(look, periodS) {
    const period = look.periods.find((each) => each.period_s === periodS);
    for (const card of this.cards) card.show(look, period);
  }
}

class Card {
  constructor(parent, figure) {
    this.figure = figure;
    this.value = h("p", { class: "value" });
    this.more = h("p", { class: "hint" });
    this.line = s("polyline", { class: "line", "vector-effect": "non-scaling-stroke" });
    this.area = s("polygon", { class: "area" });
    const box = { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
    const spark = s("svg", { ...box, "aria-hidden": "true" }, this.area, this.line);
    const title = h("h3", {}, figure.name, h("small", {}, figure.about));
    parent.append(h("article", { class: "figure" }, title, this.value, this.more, spark));
  }

  show(look, period) {
    const [value, more] = this.figure.read(period, look);
    setText(this.value, value);
    setText(this.more, more);
    this.#draw(look.history[this.figure.history]);
  }

  /** One point for each slot that has a value; the axis begins at zero. */
  #draw(values) {
    const most = Math.max(...values.filter((value) => value !== null), 0);
    const points = [];
    values.forEach((value, at) => {
      if (value === null) return;
      const x = (WIDTH * at) / (values.length - 1);
      const y = HEIGHT - 1 - (HEIGHT - 3) * (most > 0 ? value / most : 0);
      points.push(`${x.toFixed(1)},${y.toFixed(1)}`);
    });
    setAttribute(this.line, "points", points.join(" "));
    const first = points[0]?.split(",")[0];
    const last = points.at(-1)?.split(",")[0];
    const closed = points.length ? `${first},${HEIGHT} ${points.join(" ")} ${last},${HEIGHT}` : "";
    setAttribute(this.area, "points", closed);
  }
}

function percentiles(values) {
  if (values === null) return ["–", "nothing yet"];
  const { p50, p90, p99 } = values;
  return [format.duration(p50), `p90 ${format.duration(p90)} · p99 ${format.duration(p99)}`];
}

function goodput(period, look) {
  const { ttft_s: ttft, tpot_s: tpot } = look.slos;
  if (ttft === null && tpot === null) return ["–", "no SLO is set"];
  const slos = [
    ttft === null ? null : `TTFT ≤ ${format.duration(ttft)}`,
    tpot === null ? null : `TPOT ≤ ${format.duration(tpot)}`,
  ];
  const within = slos.filter((slo) => slo !== null).join(" · ");
  return [`${format.rate(period.goodput_per_s)} /s`, within];
}

function hitRate(period) {
  if (!period.prompt_tokens) return ["–", "no prompt was computed"];
  const places = Object.entries(period.hits).filter(([, tokens]) => tokens > 0);
  const total = places.reduce((sum, [, tokens]) => sum + tokens, 0);
  const parts = places.map(
    ([place, tokens]) => `${TIERS[place] ?? place} ${format.percent(tokens / period.prompt_tokens)}`,
  );
  return [format.percent(total / period.prompt_tokens), parts.join(" · ") || "nothing was found"];
}

function requests(period, look) {
  const failed = period.failed ? ` · ${format.count(period.failed)} not answered` : "";
  const running = look.conductors[0]?.running ?? 0;
  return [
    `${format.rate(look.now.requests_per_s)} /s`,
    `${format.count(running)} running · ${format.plural(period.requests, "request")}${failed}`,
  ];
}

function tokens(period, look) {
  return [`${format.rate(look.now.tokens_per_s)} /s`, `${format.rate(period.tokens_per_s)} /s on average`];
}
