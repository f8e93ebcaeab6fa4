// Each model's state, and the orders that can be given to it.

import { post } from "./api.js";
import { byId, element, keyed, setText } from "./dom.js";
import { formatBytes, formatSeconds, hueOf } from "./units.js";

const ORDERS = {
  Load: (id) => post(`/v1/engine/models/${encodeURIComponent(id)}/load`),
  Park: (id) => post(`/v1/engine/models/${encodeURIComponent(id)}/park`),
  Unload: (id) => post(`/v1/engine/models/${encodeURIComponent(id)}/unload`),
  Pin: (id) => post(`/v1/engine/models/${encodeURIComponent(id)}/pin`),
  Unpin: (id) => post(`/v1/engine/models/${encodeURIComponent(id)}/unpin`),
};
/** Each model's buttons: the order that one gives, and whether that would change anything. */
const BUTTONS = {
  load: { order: () => "Load", useful: ({ state }) => state !== "resident" },
  park: { order: () => "Park", useful: (model) => model.device_bytes > 0 },
  unload: { order: () => "Unload", useful: ({ state }) => state !== "absent" },
  pin: { order: ({ pinned }) => (pinned ? "Unpin" : "Pin"), useful: () => true },
};

/** Show the `models` of a document of `GET /v1/engine`; `onOrder` is called after each order. */
export function showModels(models, onOrder) {
  const items = models.map((model, index) => ({ ...model, hue: hueOf(index) }));
  keyed(
    byId("models-list"),
    items,
    (model) => model.id,
    (model) => createCard(model, onOrder),
    fillCard,
  );
  filter();
}

/** Show only the models in which all words of the filter are found. */
export function startFilter() {
  byId("models-filter").oninput = filter;
}

function filter() {
  const words = byId("models-filter").value.toLowerCase().split(/\s+/);
  const cards = [...byId("models-list").children];
  for (const card of cards) {
    card.hidden = !words.every((word) => card.dataset.found.includes(word));
  }
  const shown = cards.filter((card) => !card.hidden).length;
  setText(byId("models-count"), `${shown} of ${cards.length} shown`);
}

function createCard(model, onOrder) {
  const swatch = element("span", { className: "swatch block" });
  swatch.style.setProperty("--hue", model.hue);
  const outcome = element("p", { className: "outcome" });
  outcome.setAttribute("role", "status");
  const buttons = element("div", { className: "buttons" });
  buttons.setAttribute("role", "group");
  buttons.setAttribute("aria-label", `Orders to ${model.id}`);
  for (const className of Object.keys(BUTTONS)) {
    const button = element("button", { type: "button", className });
    button.onclick = () => give(model.id, button, outcome, onOrder);
    buttons.append(button);
  }
  return element(
    "li",
    { className: "card" },
    element(
      "div",
      { className: "head" },
      element("h3", {}, swatch, model.id),
      element("p", { className: "state" }),
    ),
    element("p", { className: "names" }),
    element("p", { className: "numbers" }),
    element("ul", { className: "parts" }),
    element("p", { className: "error" }),
    buttons,
    outcome,
  );
}

async function give(id, button, outcome, onOrder) {
  // Not `disabled`, which would take the focus away.
  if (button.getAttribute("aria-disabled") === "true") return;
  const name = button.textContent;
  button.dataset.given = name;
  button.setAttribute("aria-disabled", "true");
  setText(outcome, `${name}…`);
  try {
    await ORDERS[name](id);
    setText(outcome, `${name}: done`);
  } catch (error) {
    setText(outcome, `${name}: ${error.message}`);
  } finally {
    delete button.dataset.given;
  }
  onOrder();
}

function fillCard(card, model) {
  const part = (name) => card.querySelector(`.${name}`);
  setText(part("state"), model.pinned ? `${model.state}, pinned` : model.state);
  const names = model.aliases.length > 0 ? `; also ${model.aliases.join(", ")}` : "";
  setText(part("names"), `${model.task} by ${model.runtime}${names}`);
  setText(part("numbers"), numbers(model).join(" · "));
  keyed(
    part("parts"),
    model.blocks,
    (block) => block.name,
    () => element("li"),
    (entry, block) => setText(entry, `${block.name}: ${formatBytes(block.nbytes)} (${block.tier})`),
  );
  setText(part("error"), model.last_error ?? "");
  for (const [className, { order, useful }] of Object.entries(BUTTONS)) {
    const button = part(className);
    if (button.dataset.given) continue; // until it was carried out
    setText(button, order(model));
    button.setAttribute("aria-disabled", String(!useful(model)));
  }
  card.dataset.state = model.state;
  card.dataset.found = [model.id, part("names").textContent, part("state").textContent]
    .join(" ")
    .toLowerCase();
}

function numbers(model) {
  const told = [];
  if (model.leases > 0) told.push(`${model.leases} running`);
  if (model.holds > 0) told.push(`kept by ${model.holds} sessions`);
  if (model.waiting > 0) told.push(`${model.waiting} waiting`);
  if (model.device_bytes > 0) told.push(`${formatBytes(model.device_bytes)} on the device`);
  else if (model.estimated_bytes !== null) told.push(`needs ${formatBytes(model.estimated_bytes)}`);
  if (model.host_bytes > 0) told.push(`host copy ${formatBytes(model.host_bytes)}`);
  const times = [
    ["wakes in", model.estimated_wake_s],
    ["loads in", model.estimated_load_s],
    ["idle for", model.idle_s],
  ];
  for (const [what, seconds] of times) {
    if (seconds !== null) told.push(`${what} ${formatSeconds(seconds)}`);
  }
  if (model.random_weights) told.push("random weights: its answers mean nothing");
  if (model.outdated) told.push("newer files are here");
  return told;
}
