// The fleet: a card for each worker and store, in its pool.

import { byId, h, keyed, setAttribute, setText } from "./dom.js";
import { FlowMap } from "./flows.js";
import * as format from "./format.js";

const MANY = 6; // cards of a pool, from where on they are small
const BLOCK_STATES = ["active", "leased", "quarantined", "cached", "free"];
const TIER_NAMES = { cpu: "memory", nvme: "NVMe" };
const ICONS = { live: "●", joining: "◌", draining: "◐", suspect: "▲", dead: "✕" };

/** A state in words, with a sign that does not need its colour. */
export function stateBadge() {
  const icon = h("span", { class: "icon", "aria-hidden": "true" });
  return h("span", { class: "state" }, icon, h("span"));
}

export function showState(badge, state, icon = ICONS[state] ?? "?") {
  setAttribute(badge, "data-state", state);
  setText(badge.firstElementChild, icon);
  setText(badge.lastElementChild, state);
}

export class Fleet {
  constructor() {
    this.flows = new FlowMap(byId("fleet"), byId("flows"));
  }

  show(look) {
    const byName = (one, other) => one.name.localeCompare(other.name, "en", { numeric: true });
    const workers = [...look.workers].sort(byName);
    const stores = [...look.stores].sort(byName);
    const split = workers.some((worker) => worker.role === "prefill");
    byId("fleet").classList.toggle("coupled", !split);
    setText(byId("decode-title"), split ? "Decode" : "Prefill and decode");
    for (const role of ["prefill", "decode"]) {
      const members = workers.filter((worker) => worker.role === role);
      byId(role).classList.toggle("many", members.length > MANY);
      keyed(byId(role), members, (each) => each.name, workerCard, showWorker);
    }
    byId("store-pool").hidden = stores.length === 0;
    keyed(byId("store"), stores, (each) => each.name, storeCard, showStore);
    setText(byId("fleet-summary"), summary(look));
    this.flows.show(look.flows);
  }
}

/** Of all members, also of those for which there is no card. */
function summary({ pools, workers, stores, refused }) {
  const parts = [];
  for (const [role, name] of [["prefill", "prefill"], ["decode", "decode"], ["store", "store"]]) {
    const { members, states } = pools[role];
    if (!members) continue;
    const ill = members - (states.live ?? 0);
    parts.push(`${format.count(members)} ${name}${ill ? ` (${ill} not live)` : ""}`);
  }
  const hidden = ["prefill", "decode", "store"].reduce((sum, role) => sum + pools[role].members, 0)
    - workers.length - stores.length;
  if (hidden > 0) parts.push(`${format.count(hidden)} more than are shown`);
  if (refused.length) parts.push(`${format.count(refused.length)} refused`);
  return parts.join(" · ") || "nobody has joined yet";
}

function card(member) {
  const name = h("h4", {}, member.name);
  const head = h("div", { class: "card-head" }, name, stateBadge());
  const where = h("p", { class: "hint where" });
  return h("li", { class: "card", "data-member": member.name }, head, where);
}

function workerCard(worker) {
  const node = card(worker);
  const bar = h("div", { class: "bar", role: "img" });
  for (const state of BLOCK_STATES) bar.append(h("span", { class: state }));
  node.append(h("p", { class: "load" }), bar, h("p", { class: "hint blocks" }));
  return node;
}

function showWorker(node, worker) {
  showHead(node, worker);
  const queue = worker.load.waiting_tokens;
  const prompts = queue ? ` · ${format.plural(queue, "prompt token")} to compute` : "";
  setText(
    node.querySelector(".load"),
    `${format.count(worker.running)} running · ${format.count(worker.waiting)} waiting${prompts}`,
  );
  const total = Object.values(worker.blocks).reduce((sum, blocks) => sum + blocks, 0);
  const bar = node.querySelector(".bar");
  for (const span of bar.children) {
    const share = total ? (worker.blocks[span.className] ?? 0) / total : 0;
    span.style.flexGrow = share;
  }
  const held = BLOCK_STATES.filter((state) => worker.blocks[state])
    .map((state) => `${format.count(worker.blocks[state])} ${state}`)
    .join(" · ");
  setText(node.querySelector(".blocks"), held || "no report yet");
  setAttribute(bar, "aria-label", `KV blocks of ${worker.name}: ${held || "no report yet"}`);
}

function storeCard(store) {
  const node = card(store);
  node.append(h("div", { class: "tiers" }));
  return node;
}

function showStore(node, store) {
  showHead(node, store);
  const tiers = store.store?.tiers ?? [];
  keyed(node.querySelector(".tiers"), tiers, (tier) => tier.tier, tierLine, showTier);
}

function tierLine() {
  const bar = h("div", { class: "bar", role: "img" }, h("span", { class: "active" }), h("span"));
  return h("div", { class: "tier" }, h("p", { class: "load" }), bar, h("p", { class: "hint" }));
}

function showTier(node, tier) {
  const [title, bar, more] = node.children;
  const name = TIER_NAMES[tier.tier] ?? tier.tier;
  const text = `${name} ${format.bytes(tier.bytes)} of ${format.bytes(tier.capacity_bytes)}`;
  setText(title, tier.state === "on" ? text : `${text} · ${tier.state}`);
  const share = tier.capacity_bytes ? tier.bytes / tier.capacity_bytes : 0;
  bar.firstElementChild.style.flexGrow = share;
  bar.lastElementChild.style.flexGrow = 1 - share;
  setAttribute(bar, "aria-label", `${text}, ${format.percent(share)} full`);
  const hits = `${format.plural(tier.blocks, "block")} · ${format.plural(tier.hits, "hit")}`;
  setText(more, tier.why ? `${hits} · ${tier.why}` : hits);
}

function showHead(node, member) {
  showState(node.querySelector(".state"), member.state);
  setAttribute(node, "data-state", member.state);
  const where = [`pid ${member.pid}`, member.address, member.device, member.transport];
  setText(node.querySelector(".where"), where.filter((each) => each).join(" · "));
}
