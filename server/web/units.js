// Bytes, seconds, money and colours as people read them.

const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Binary units, as the configuration writes them. */
export function formatBytes(nbytes) {
  let value = nbytes;
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < BYTE_UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || Math.abs(value) >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${BYTE_UNITS[unit]}`;
}

/** Seconds; null, which the server sends where nothing tells, is "unknown". */
export function formatSeconds(seconds) {
  if (seconds === null) return "unknown";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Dollars with cents, or with as many digits as a small amount needs. */
export function formatDollars(amount) {
  const size = Math.abs(amount);
  const digits = size === 0 || size >= 0.1 ? 2 : size >= 0.001 ? 4 : 6;
  return `${amount < 0 ? "-" : ""}$${size.toFixed(digits)}`;
}

/** A hue in degrees for the index of a model; by the golden angle neighbours differ most. */
export function hueOf(index) {
  return (250 + index * 137.5) % 360;
}
