// Server-sent events out of a response's bytes. EventSource cannot send a key, nor a request.

/** Each event as it comes: `{ type, id, data }`. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = parse(part);
        if (event.data !== "") yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading lets the connection go
  }
}

/** What went wrong, in the server's words: its errors have OpenAI's shape. */
export async function messageOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? response.statusText;
  } catch {
    return `the cluster answered with status ${response.status}`;
  }
}

function parse(text) {
  const event = { type: "message", id: "", data: "" };
  for (const line of text.split("\n")) {
    if (line.startsWith("data:")) event.data += line.slice(5).trimStart();
    else if (line.startsWith("event:")) event.type = line.slice(6).trim();
    else if (line.startsWith("id:")) event.id = line.slice(3).trim();
  }
  return event;
}
