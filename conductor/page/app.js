// The live page: one stream of looks at the cluster, and the parts that show them.

import { Connection } from "./connection.js";
import { byId, setText } from "./dom.js";
import { Figures } from "./figures.js";
import { Fleet } from "./fleet.js";
import { KeyForm } from "./key.js";
import { PromptBox } from "./prompt.js";
import { Requests } from "./requests.js";

const WORDS = {
  live: "● live",
  reconnecting: "▲ reconnecting",
  paused: "◐ paused",
  locked: "✕ needs an API key",
  forbidden: "✕ needs an admin's API key",
};

const figures = new Figures(byId("figures"));
const fleet = new Fleet();
const requests = new Requests();
const keys = new KeyForm(() => connection.retry());
const prompts = new PromptBox((id) => requests.open(id), () => keys.ask());
const connection = new Connection({ look: show, state: showConnection });
let last = null; // the newest look

function show(look) {
  last = look;
  prompts.model = look.model;
  setText(byId("model"), look.model);
  const [state, words] = stateOf(look);
  byId("cluster-state").dataset.state = state;
  setText(byId("cluster-state"), words);
  document.title = `${look.model} – baton`;
  figures.show(look, period());
  fleet.show(look);
  requests.show(look);
}

function stateOf(look) {
  if (look.conductors[0].state === "draining") return ["draining", "◐ draining"];
  return look.ready ? ["ready", "● ready"] : ["unable", "✕ no worker can answer"];
}

function showConnection(state, why) {
  if (state === "locked") keys.ask();
  if (state === "forbidden") keys.askForAdmin();
  document.body.dataset.connection = state;
  setText(byId("connection"), why === "" ? WORDS[state] : `${WORDS[state]}: ${why}`);
}

function period() {
  return Number(document.querySelector('input[name="period"]:checked').value);
}

for (const choice of document.querySelectorAll('input[name="period"]')) {
  choice.addEventListener("change", () => last && figures.show(last, period()));
}
connection.run();
