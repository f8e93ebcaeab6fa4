// What the engine does and why, as it happens.

import { get } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { readEvents } from "./sse.js";
import { formatBytes } from "./units.js";

const KEPT = 200;

/** The list of events, newest first, and the id to go on after when the connection breaks. */
export class EventFeed {
  constructor() {
    this.list = byId("events-list");
    this.state = byId("events-state");
    this.lastId = null;
    const grants = byId("events-grants");
    // Grants are many: who listens to the page instead of looking at it must not hear each.
    grants.onchange = () => this.list.classList.toggle("with-grants", grants.checked);
  }

  /** Show the newest events, then each as it comes, until the stream ends or fails. */
  async follow() {
    try {
      if (this.lastId === null) {
        const page = await (await get("/v1/engine/events?limit=100")).json();
        for (const event of page.data) this.add(event);
        this.lastId = page.last_id;
      }
      const response = await get(`/v1/engine/events?stream=true&after=${this.lastId}`);
      setText(this.state, "Live");
      for await (const { comment, data, id } of readEvents(response)) {
        if (comment !== undefined) continue;
        if (id) this.lastId = id;
        this.add(JSON.parse(data));
      }
    } finally {
      setText(this.state, "Not connected");
    }
  }

  add(event) {
    this.list.prepend(event.type === "lost" ? lostEntry(event) : entry(event));
    while (this.list.children.length > KEPT) this.list.lastElementChild.remove();
  }
}

/** Tell of `restarts`, a part of a document of `GET /v1/engine`. */
export function showRestarts({ count, reason, at }) {
  const line = byId("restarts");
  line.hidden = count === 0;
  if (line.hidden) return;
  const times = count === 1 ? "once" : `${count} times`;
  setText(line, `Restarted ${times}, last at ${new Date(at * 1000).toLocaleString()}: ${reason}`);
}

function entry(event) {
  const at = new Date(event.at * 1000);
  const kind = event.type.replaceAll("_", " ");
  const [granted, capacity] = [event.granted_bytes, event.capacity_bytes].map(formatBytes);
  return element(
    "li",
    { className: `event ${event.type}`, title: event.request_id ?? "" },
    element("time", { dateTime: at.toISOString(), textContent: at.toLocaleTimeString() }),
    " ",
    element("strong", { textContent: `${kind} ${event.model}` }),
    event.reason ? `: ${event.reason} ` : " ",
    element("small", { textContent: `(${granted} of ${capacity} granted)` }),
  );
}

function lostEntry({ count }) {
  const textContent = `${count ?? "Some"} events are missing here.`;
  return element("li", { className: "event lost", textContent });
}
