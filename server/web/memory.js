// The memory of the device and the host copies, drawn to one scale.

import { byId, element, keyed, setText } from "./dom.js";
import { formatBytes, hueOf } from "./units.js";

const KINDS = { block: "", reservation: " (loading)", lease: " (working memory)" };

/** Draw a document of `GET /v1/engine`. */
export function showMemory(engine) {
  const device = deviceParts(engine);
  const host = hostParts(engine);
  const totals = [engine.ledger.total_bytes, sum(device), sum(host)];
  const scaleBytes = Math.max(...totals, 1);
  drawBar(byId("device-bar"), device, scaleBytes);
  drawBar(byId("host-bar"), host, scaleBytes);
  const { granted_bytes: granted, free_bytes: free, foreign_bytes: foreign } = engine.ledger;
  setText(
    byId("device-summary"),
    `${formatBytes(granted)} granted, ${formatBytes(Math.max(0, free))} free, ` +
      `${formatBytes(foreign)} used by others, of ${formatBytes(engine.ledger.total_bytes)}`,
  );
  setText(
    byId("host-summary"),
    host.length === 0
      ? "None: a model that leaves the device is read from disk again."
      : `${formatBytes(sum(host))}, on the same scale`,
  );
  listParts(byId("device-parts"), device);
  listParts(byId("host-parts"), host);
  setText(byId("transition"), engine.transition === null ? "" : `Now: ${engine.transition}`);
}

/** The ledger's entries by model, then what is not theirs; together the whole device. */
function deviceParts({ ledger, models }) {
  const parts = [];
  for (const [index, model] of models.entries()) {
    const entries = ledger.entries.filter((entry) => entry.owner === model.id);
    for (const [shade, entry] of entries.entries()) {
      parts.push({
        key: `${entry.kind} ${model.id} ${entry.name} ${shade}`,
        name: `${model.id}: ${entry.name}${KINDS[entry.kind]}`,
        kind: entry.kind,
        nbytes: entry.nbytes,
        hue: hueOf(index),
        shade,
      });
    }
  }
  const beyondBytes = ledger.total_bytes - ledger.foreign_bytes - ledger.capacity_bytes;
  parts.push(
    { key: "foreign", name: "used by others", kind: "foreign", nbytes: ledger.foreign_bytes },
    { key: "beyond", name: "beyond the budget", kind: "beyond", nbytes: beyondBytes },
    { key: "free", name: "free", kind: "free", nbytes: ledger.free_bytes },
  );
  return parts.filter((part) => part.nbytes > 0);
}

/** The host copies by model; which parts need theirs now is in the name. */
function hostParts({ models }) {
  return models.flatMap((model, index) => {
    if (model.host_bytes === 0) return [];
    const parked = model.blocks.filter(({ tier }) => tier === "host").map(({ name }) => name);
    const use = parked.length > 0 ? `parked: ${parked.join(", ")}` : "all of it is on the device";
    return [
      {
        key: model.id,
        name: `${model.id} (${use})`,
        kind: parked.length > 0 ? "block" : "copy",
        nbytes: model.host_bytes,
        hue: hueOf(index),
        shade: 0,
      },
    ];
  });
}

function drawBar(bar, parts, scaleBytes) {
  keyed(bar, parts, (part) => part.key, createSegment, (segment, part) => {
    segment.style.width = `${(100 * part.nbytes) / scaleBytes}%`;
    segment.title = describe(part);
    setText(segment, part.name);
  });
}

function createSegment(part) {
  return paint(element("span", { className: `segment ${part.kind}` }), part);
}

function listParts(list, parts) {
  keyed(list, parts, (part) => part.key, createEntry, (entry, part) => {
    setText(entry.lastChild, describe(part));
  });
}

function createEntry(part) {
  const swatch = paint(element("span", { className: `swatch ${part.kind}` }), part);
  return element("li", {}, swatch, element("span"));
}

function paint(node, { hue, shade }) {
  if (hue !== undefined) {
    node.style.setProperty("--hue", hue);
    node.style.setProperty("--shade", shade % 4);
  }
  return node;
}

function describe(part) {
  return `${part.name}: ${formatBytes(part.nbytes)}`;
}

function sum(parts) {
  return parts.reduce((nbytes, part) => nbytes + part.nbytes, 0);
}
