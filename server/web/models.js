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
}

function createCard(model, onOrder) {
  const swatch = element("span", { className: "swatch block" });
  swatch.style.setProperty("--hue", model.hue);
  const outcome = element("p", { className: "outcome" });
  outcome.setAttribute("role", "status");
  const buttons = element("div", { className: "buttons" });
  buttons.setAttribute("role", "group");
  buttons.setAttribute("aria-label", `Orders to ${model.id}`);
  for (const name of Object.keys(ORDERS)) {
    const button = element("button", { type: "button", textContent: name });
    button.onclick = () => give(name, model.id, button, outcome, onOrder);
    buttons.append(button);
  }
  return element(
    "li",
    { className: "card" },
    element("h3", {}, swatch, model.id),
    element("p", { className: "state" }),
    element("p", { className: "numbers" }),
    element("ul", { className: "parts" }),
    element("p", { className: "error" }),
    buttons,
    outcome,
  );
}

async function give(name, id, button, outcome, onOrder) {
  // Not `disabled`, which would take the focus away.
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  setText(outcome, `${name}…`);
  try {
    await ORDERS[name](id);
    setText(outcome, `${name}: done`);
  } catch (error) {
    setText(outcome, `${name}: ${error.message}`);
  } finally {
    button.removeAttribute("aria-disabled");
  }
  onOrder();
}

function fillCard(card, model) {
  const part = (name) => card.querySelector(`.${name}`);
  const names = model.aliases.length > 0 ? `; also ${model.aliases.join(", ")}` : "";
  setText(
    part("state"),
    `${model.state}${model.pinned ? ", pinned" : ""}: ${model.task} by ${model.runtime}${names}`,
  );
  setText(part("numbers"), numbers(model).join(" · "));
  keyed(
    part("parts"),
    model.blocks,
    (block) => block.name,
    () => element("li"),
    (entry, block) => setText(entry, `${block.name}: ${formatBytes(block.nbytes)} (${block.tier})`),
  );
  setText(part("error"), model.last_error ?? "");
  card.dataset.state = model.state;
}

function numbers(model) {
  const told = [`${model.leases} running`, `${model.waiting} waiting`];
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
  return told;
}
