// The memory of the device and the host copies, drawn to one scale, and larger where it is little.

import { byId, element, keyed, setText } from "./dom.js";
import { formatBytes, hueOf } from "./units.js";

/** What the ledger's entries are, in words, by their kind. */
const KINDS = {
  block: (name) => name,
  reservation: () => "being loaded",
  lease: (name) => `working memory of ${name}`,
};
/** What the models have is drawn once more, enlarged, while it is a smaller share than this. */
const ENLARGED_BELOW = 1 / 3;

/** Draw a document of `GET /v1/engine`. */
export function showMemory(engine) {
  const device = deviceParts(engine);
  const host = hostParts(engine);
  const totals = [engine.ledger.total_bytes, sum(device), sum(host)];
  const scaleBytes = Math.max(...totals, 1);
  drawBar(byId("device-bar"), device, scaleBytes);
  drawBar(byId("host-bar"), host, scaleBytes);
  byId("host-bar").hidden = host.length === 0;
  const ours = device.filter(({ kind }) => kind in KINDS);
  const oursBytes = Math.max(sum(ours), sum(host));
  const times = oursBytes < scaleBytes * ENLARGED_BELOW ? scaleBytes / oursBytes : 1;
  const enlarged = [
    [byId("device-enlarged"), byId("device-enlarged-title"), ours, "What models have"],
    [byId("host-enlarged"), byId("host-enlarged-title"), host, "Copies and prefix caches"],
  ];
  for (const [bar, title, parts, what] of enlarged) {
    bar.hidden = title.hidden = times === 1 || parts.length === 0;
    if (bar.hidden) continue;
    setText(title, `${what}, enlarged ${times.toFixed(times < 10 ? 1 : 0)} times:`);
    drawBar(bar, parts, oursBytes);
  }
  const { granted_bytes: granted, free_bytes: free, external_bytes: foreign } = engine.ledger;
  setText(
    byId("device-summary"),
    `${formatBytes(granted)} granted, ${formatBytes(Math.max(0, free))} free, ` +
      `${formatBytes(foreign)} used by others, of ${formatBytes(engine.ledger.total_bytes)}`,
  );
  setText(
    byId("host-summary"),
    host.length === 0
      ? "None: a model that leaves the device is read from disk again."
      : `${formatBytes(sum(host))} of at most ${formatBytes(engine.host.budget_bytes)}, ` +
          "on the same scale",
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
        name: `${model.id}: ${KINDS[entry.kind](entry.name)}`,
        kind: entry.kind,
        nbytes: entry.nbytes,
        hue: hueOf(index),
        shade,
      });
    }
  }
  const beyondBytes = ledger.total_bytes - ledger.external_bytes - ledger.capacity_bytes;
  parts.push(
    { key: "foreign", name: "used by others", kind: "foreign", nbytes: ledger.external_bytes },
    { key: "beyond", name: "beyond the budget", kind: "beyond", nbytes: beyondBytes },
    { key: "free", name: "free", kind: "free", nbytes: ledger.free_bytes },
  );
  return parts.filter((part) => part.nbytes > 0);
}

/** The host copies by model; which parts need theirs now is in the name. Then kept prefixes. */
function hostParts({ models, host }) {
  return models.flatMap((model, index) => {
    const prefixes = {
      key: `prefixes ${model.id}`,
      name: `${model.id}: prefix cache`,
      kind: "copy",
      nbytes: host.prefix_bytes[model.id] ?? 0,
      hue: hueOf(index),
      shade: 1,
    };
    const kept = prefixes.nbytes > 0 ? [prefixes] : [];
    if (model.host_bytes === 0) return kept;
    const parked = model.blocks.filter(({ tier }) => tier === "host").map(({ name }) => name);
    const use = parked.length > 0 ? `parked: ${parked.join(", ")}` : "all of it is on the device";
    const kind = parked.length > 0 ? "block" : "copy";
    return [
      {
        key: `${kind} ${model.id}`, // another one once it is parked, for it is painted but once
        name: `${model.id} (${use})`,
        kind,
        nbytes: model.host_bytes,
        hue: hueOf(index),
        shade: 0,
      },
      ...kept,
    ];
  });
}

function drawBar(bar, parts, scaleBytes) {
  keyed(bar, parts, (part) => part.key, createSegment, (segment, part) => {
    segment.style.width = `${(100 * part.nbytes) / scaleBytes}%`;
    segment.title = describe(part);
    setText(segment, describe(part));
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
