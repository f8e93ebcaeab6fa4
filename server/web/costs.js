// What requests cost and saved: today and in this month, in UTC as the budgets count.

import { get } from "./api.js";
import { byId, element, keyed, setText } from "./dom.js";
import { formatDollars } from "./units.js";

/** Ask for the usage of this month, and show it. */
export async function refreshCosts() {
  const today = new Date().toISOString().slice(0, 10);
  const first = `${today.slice(0, 7)}-01`;
  const response = await get(`/v1/engine/usage?by=day&since=${first}`);
  showCosts(await response.json(), today);
}

/** Show a document of `GET /v1/engine/usage?by=day` of this month. */
export function showCosts({ data, total, budgets }, today) {
  const ofToday = data.find(({ day }) => day === today) ?? { cost: 0, saved: 0, requests: 0 };
  fillRow(byId("costs-today"), ofToday);
  fillRow(byId("costs-month"), total);
  // By place: two budgets may be of the same key.
  const rows = budgets.map((budget, index) => ({ ...budget, index }));
  keyed(byId("costs-budgets"), rows, ({ index }) => index, () => element("li"), fillBudget);
}

function fillRow(row, { cost, saved, requests }) {
  const texts = [formatDollars(cost), formatDollars(saved), requests.toLocaleString()];
  for (const [index, text] of texts.entries()) setText(row.children[index + 1], text);
}

function fillBudget(item, { key, provider, period, spent, limit, when_spent: then }) {
  const whose = [];
  if (key !== null) whose.push(`key ${key}`);
  if (provider !== null) whose.push(`provider ${provider}`);
  const amounts = `${formatDollars(spent)} of ${formatDollars(limit)} a ${period}`;
  setText(item, `Budget, ${whose.join(", ") || "all"}: ${amounts}, then ${then}`);
}
