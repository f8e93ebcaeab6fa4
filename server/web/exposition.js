// Reading `GET /metrics`.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** The samples of a document in Prometheus' text format: `{name, labels, value}`. */
export function* samples(text) {
  for (const line of text.split("\n")) {
    const match = SAMPLE.exec(line); // comments begin with #, so they do not match
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    yield { name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) };
  }
}
