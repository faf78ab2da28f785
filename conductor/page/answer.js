// One answer as it comes. Where its connection breaks, another one brings the rest: from the
// conductor when it is back, or from whoever has its place. What came before does not come again.

import { eventsOf, messageOf } from "./events.js";
import { authorization } from "./key.js";
import { pause, pauseAfter } from "./pause.js";

const RECONNECTS = 10; // in a row without a new event, until the answer is given up
const FIRST_PAUSE_MS = 250;
const LAST_PAUSE_MS = 5000;
const PASSING = [409, 429, 502, 503, 504]; // statuses that say nothing against another try
const PASSING_TYPE = "service_unavailable_error"; // a conductor that stops says it in the stream

/** What the cluster has to say against the request. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Another connection may bring what this one did not. */
class Broken extends Error {}

/**
 * The chunks of the answer to `body`, each once. `onBreak(why)` is told before another connection
 * is tried; that happens only when something has come: nobody knows the request otherwise.
 */
export async function* chunksOf(path, body, signal, onBreak) {
  let last = ""; // the id of the newest event
  let failures = 0;
  for (;;) {
    try {
      for await (const { id, data } of eventsAfter(last, path, body, signal)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw failureOf(chunk.error);
        last = id || last;
        failures = 0;
        yield chunk;
      }
      throw new Broken("the connection broke before the answer was complete");
    } catch (error) {
      failures += 1;
      const mayGoOn = error instanceof Broken && last !== "" && failures <= RECONNECTS;
      if (signal.aborted || !mayGoOn) throw error;
      onBreak(error.message);
    }
    await pause(pauseAfter(failures, FIRST_PAUSE_MS, LAST_PAUSE_MS), signal);
  }
}

/** Of one connection. The body must be the same each time: the id belongs to it. */
async function* eventsAfter(last, path, body, signal) {
  const headers = { "Content-Type": "application/json", ...authorization() };
  if (last !== "") headers["Last-Event-ID"] = last;
  const response = await orBroken(
    fetch(path, { method: "POST", headers, body, signal }),
    "the conductor cannot be reached",
  );
  if (!response.ok) {
    const message = await messageOf(response);
    const passes = PASSING.includes(response.status);
    throw passes ? new Broken(message) : new Refused(message, response.status);
  }
  const events = eventsOf(response);
  try {
    for (;;) {
      const { value, done } = await orBroken(events.next(), "the connection broke");
      if (done) return;
      yield value;
    }
  } finally {
    events.return(); // lets the connection go
  }
}

function failureOf(error) {
  return error.type === PASSING_TYPE ? new Broken(error.message) : new Refused(error.message, 0);
}

async function orBroken(work, why) {
  try {
    return await work;
  } catch {
    throw new Broken(why);
  }
}
