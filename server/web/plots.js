// Line plots of the history, as SVG.

import { byId, element, keyed, setText } from "./dom.js";
import { KEPT_S } from "./history.js";
import { formatSeconds, hueOf } from "./units.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [600, 120];

const perSecond = (value) => `${value >= 10 ? value.toFixed(0) : value.toFixed(2)}/s`;

const PLOTS = [
  { plot: "tokens", title: "Tokens per second, by model", format: perSecond, byModel: true },
  { plot: "requests", title: "Requests per second, by model", format: perSecond, byModel: true },
  { plot: "phases", title: "Request time, 95th percentile", format: formatSeconds },
  { plot: "tokens_s", title: "Token time, 95th percentile", format: formatSeconds },
];

/** Draw all curves of a `History` up to `nowS`, a model's in its colour: its place in `models`. */
export function showPlots(history, nowS, models) {
  const parent = byId("plots-figures");
  keyed(parent, PLOTS, ({ plot }) => plot, createFigure, (figure, { plot, format, byModel }) => {
    const hue = (name, index) => {
      const place = byModel ? models.indexOf(name) : index;
      return hueOf(place === -1 ? models.length + index : place);
    };
    drawCurves(figure, [...history.curves.get(plot)], hue, format, nowS);
  });
}

function drawCurves(figure, all, hueOfCurve, format, nowS) {
  const curves = all
    .filter(([, points]) => points.some(([, value]) => value))
    .map(([name, points], index) => ({ name, points, hue: hueOfCurve(name, index) }));
  const values = curves.flatMap(({ points }) => points.map(([, value]) => value ?? 0));
  const top = ceiling(Math.max(0, ...values));
  setText(figure.querySelector(".top"), top > 0 ? format(top) : "nothing yet");
  const paths = curves.map(({ points, hue }) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", pathOf(points, nowS, top));
    path.style.setProperty("--hue", hue);
    return path;
  });
  figure.querySelector("svg").replaceChildren(...paths);
  const keyOf = ({ name, hue }) => `${name} ${hue}`;
  keyed(figure.querySelector(".legend"), curves, keyOf, createEntry, (entry, { name, points }) => {
    const [, last] = points.at(-1);
    setText(entry.lastChild, `${name}: ${last === null ? "–" : format(last)}`);
  });
}

function createEntry({ hue }) {
  const swatch = element("span", { className: "swatch line" });
  swatch.style.setProperty("--hue", hue);
  return element("li", {}, swatch, element("span"));
}

function createFigure({ title }) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true"); // the legend has the numbers
  return element(
    "figure",
    {},
    element("figcaption", { textContent: title }),
    element("p", { className: "axis top" }),
    svg,
    element(
      "p",
      { className: "axis" },
      element("span", { textContent: `${KEPT_S / 60} min ago` }),
      element("span", { textContent: "now" }),
    ),
    element("ul", { className: "legend" }),
  );
}

/** A line through the points, broken where there was nothing to measure. */
function pathOf(points, nowS, top) {
  let command = "M";
  const steps = [];
  for (const [atS, value] of points) {
    if (value === null) {
      command = "M";
      continue;
    }
    const x = WIDTH * (1 - (nowS - atS) / KEPT_S);
    const y = HEIGHT * (1 - value / (top || 1));
    // A point alone is a line of no length, which round caps make visible.
    steps.push(`${command}${x.toFixed(1)} ${y.toFixed(1)}`, `L${x.toFixed(1)} ${y.toFixed(1)}`);
    command = "L";
  }
  return steps.join("");
}

/** The next 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  if (value === 0) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((factor) => factor * power >= value) * power;
}
