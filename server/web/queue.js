// Who waits, in the order of service.

import { byId, element, keyed, setText } from "./dom.js";
import { formatSeconds } from "./units.js";

/** Show the `queue` of a document of `GET /v1/engine`. */
export function showQueue(queue) {
  const waiting = queue.length === 1 ? "One request waits." : `${queue.length} requests wait.`;
  setText(byId("queue-summary"), queue.length === 0 ? "Nobody waits." : waiting);
  byId("queue-table").hidden = queue.length === 0;
  const ordered = [...queue].sort((one, other) => one.position - other.position);
  // By place: two orders to load one model have the same request id.
  const rows = ordered.map((ticket, index) => ({ ...ticket, index }));
  keyed(byId("queue-rows"), rows, ({ index }) => index, createRow, fillRow);
}

function createRow() {
  return element("tr", {}, ...Array.from({ length: 7 }, () => element("td")));
}

function fillRow(row, ticket) {
  const texts = [
    String(ticket.position),
    ticket.model,
    formatSeconds(ticket.eta_s),
    formatSeconds(ticket.waited_s),
    ticket.priority,
    ticket.operation,
    ticket.request_id,
  ];
  for (const [index, text] of texts.entries()) setText(row.children[index], text);
}
