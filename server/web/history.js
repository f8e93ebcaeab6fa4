// The last minutes of the counters, as rates and quantiles.

import { samples } from "./exposition.js";

export const KEPT_S = 300;
/** Over how long a rate or a quantile is taken: several scrapes, so that curves do not flicker. */
const WINDOW_S = 30;

const RATES = {
  "vllm:generation_tokens_total": (labels) => ["tokens", labels.model_name],
  roundhouse_request_seconds_count: (labels) =>
    labels.phase === "run" ? ["requests", labels.model] : null,
};
const HISTOGRAMS = {
  roundhouse_request_seconds_bucket: (labels) => ["phases", labels.phase],
  "vllm:time_to_first_token_seconds_bucket": () => ["tokens_s", "to the first token"],
  "vllm:inter_token_latency_seconds_bucket": () => ["tokens_s", "between tokens"],
};

/**
 * Curves by plot and name, `curves.get(plot).get(name)`: arrays of `[at_s, value]`, where the value
 * is null while there was nothing to measure. Plots: `tokens` and `requests` (a second, by model),
 * `phases` and `tokens_s` (95th percentiles in seconds).
 */
export class History {
  constructor() {
    this.snapshots = [];
    const plots = ["tokens", "requests", "phases", "tokens_s"];
    this.curves = new Map(plots.map((plot) => [plot, new Map()]));
  }

  /** Take a document of `GET /metrics` that was read at `atS`, seconds of any clock. */
  push(atS, text) {
    const now = { atS, counters: readCounters(text) };
    this.snapshots = this.snapshots.filter((snapshot) => atS - snapshot.atS <= WINDOW_S);
    const before = this.snapshots[0];
    this.snapshots.push(now);
    if (before === undefined) return;
    for (const { plot, name, buckets, total } of now.counters.values()) {
      const old = before.counters.get(keyOf(plot, name));
      const value =
        buckets === undefined
          ? increase(old?.total, total) / (atS - before.atS)
          : quantile(0.95, increases(old?.buckets, buckets));
      const curves = this.curves.get(plot);
      const curve = curves.get(name) ?? [];
      curve.push([atS, value]);
      curves.set(name, curve.filter(([at]) => atS - at <= KEPT_S));
    }
  }
}

/** The counters that are drawn, summed over the labels that are not. */
export function readCounters(text) {
  const counters = new Map();
  const counter = ([plot, name], empty) => {
    const key = keyOf(plot, name);
    if (!counters.has(key)) counters.set(key, { plot, name, ...empty });
    return counters.get(key);
  };
  for (const { name, labels, value } of samples(text)) {
    const rate = RATES[name]?.(labels);
    if (rate) counter(rate, { total: 0 }).total += value;
    const histogram = HISTOGRAMS[name]?.(labels);
    if (histogram) {
      const { buckets } = counter(histogram, { buckets: new Map() });
      const le = Number(labels.le.replace("Inf", "Infinity"));
      buckets.set(le, (buckets.get(le) ?? 0) + value);
    }
  }
  return counters;
}

/**
 * The q-quantile of cumulative buckets `[upper bound, count]`, interpolated within its bucket as
 * Prometheus' histogram_quantile does; null without observations.
 */
export function quantile(q, cumulative) {
  const ordered = [...cumulative].sort(([one], [other]) => one - other);
  const total = ordered.at(-1)?.[1] ?? 0;
  if (total === 0) return null;
  let [lower, below] = [0, 0];
  for (const [upper, count] of ordered) {
    if (count >= q * total) {
      if (upper === Infinity) return lower;
      return lower + ((upper - lower) * (q * total - below)) / (count - below);
    }
    [lower, below] = [upper, count];
  }
  return lower;
}

/** A counter that fell began anew: the server was restarted. */
function increase(before = 0, after) {
  return after < before ? after : after - before;
}

function increases(before, after) {
  return [...after].map(([bound, count]) => [bound, increase(before?.get(bound), count)]);
}

function keyOf(plot, name) {
  return `${plot}\n${name}`;
}
