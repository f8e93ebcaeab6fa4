// Choosing a model: each select offers the models of its task.

import { element, keyed } from "./dom.js";

/** Fill all `select[data-task]` from the `models` of a document of `GET /v1/engine`. */
export function showPickers(models) {
  for (const select of document.querySelectorAll("select[data-task]")) {
    const ids = models.filter((model) => model.task === select.dataset.task).map(({ id }) => id);
    const before = select.value;
    const create = (id) => element("option", { value: id, textContent: id });
    keyed(select, ids, (id) => id, create, () => {});
    if (select.value !== before) select.dispatchEvent(new Event("change"));
  }
}
