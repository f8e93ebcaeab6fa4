// Choosing a model: each select offers the models of its task.

import { element, keyed } from "./dom.js";

/** Fill all `select[data-task]` from the `models` of a document of `GET /v1/engine`. */
export function showPickers(models) {
  for (const select of document.querySelectorAll("select[data-task]")) {
    const offered = models.filter((model) => model.task === select.dataset.task);
    const before = select.value;
    const create = (model) => element("option", { value: model.id, textContent: label(model) });
    keyed(select, offered, (model) => model.id, create, () => {});
    if (select.value !== before) select.dispatchEvent(new Event("change"));
  }
}

function label({ id, random_weights: random }) {
  return random ? `${id} (random weights)` : id;
}
