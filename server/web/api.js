// Requests to the server that this page came from, with the key that the user gave.

// A proxy may serve this page below a prefix: the server begins where the folder of this file is.
export const ROOT = new URL("..", import.meta.url);

const KEY_ITEM = "roundhouse-api-key";

/** Tells `unauthorized` when the server wants a key or another one, and `key` when one is given. */
export const access = new EventTarget();

/**
 * An answer that is not a success; `message` is the server's own, `status` the HTTP status, 0 where
 * there was no answer at all.
 */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function currentKey() {
  return sessionStorage.getItem(KEY_ITEM) ?? "";
}

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY_ITEM, key);
  else sessionStorage.removeItem(KEY_ITEM);
  access.dispatchEvent(new Event("key"));
}

/** `options`: what `fetch` takes, such as `signal` and `headers`. Throws ApiError. */
export function get(path, options = {}) {
  return send("GET", path, options);
}

/** `body`: FormData, or what becomes JSON, or nothing. Throws ApiError. */
export function post(path, body = undefined, options = {}) {
  const ready = body === undefined || body instanceof FormData;
  if (ready) return send("POST", path, { ...options, body });
  const headers = { ...options.headers, "Content-Type": "application/json" };
  return send("POST", path, { ...options, headers, body: JSON.stringify(body) });
}

/** Throws ApiError. */
export function remove(path) {
  return send("DELETE", path, {});
}

/**
 * A WebSocket of the server. A browser sets no headers of one, so the key is a subprotocol.
 * Throws ApiError for a key that cannot be one.
 */
export function openSocket(path) {
  const url = new URL(path.slice(1), ROOT);
  url.protocol = url.protocol.replace("http", "ws");
  const key = currentKey();
  try {
    return new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
  } catch {
    throw new ApiError("A browser cannot send this key to talk: it may have letters, digits, - and _ only.", 0);
  }
}

async function send(method, path, options) {
  const key = currentKey();
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const url = new URL(path.slice(1), ROOT);
    response = await fetch(url, { ...options, method, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (response.ok) return response;
  // Not when another key was given meanwhile.
  const refused = response.status === 401 && key === currentKey();
  if (refused) access.dispatchEvent(new Event("unauthorized"));
  throw new ApiError(await messageOf(response), response.status);
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    // A proxy before the server answers in its own words.
    return `${response.status} ${response.statusText}`;
  }
}
