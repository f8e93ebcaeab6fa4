// One request of a form at a time, which can be stopped, and whose state is told.

import { setText } from "./dom.js";

/**
 * Run `work(signal, tell)` at each submit. `tell(text)` says what goes on; what `work` returns is
 * said at its end. The form has a `[data-stop]` button and a `[data-status]` element.
 */
export function runOnSubmit(form, work) {
  const submit = form.querySelector("[type=submit]");
  const stop = form.querySelector("[data-stop]");
  const status = form.querySelector("[data-status]");
  const tell = (text) => setText(status, text);
  let running = null;

  form.onsubmit = async (event) => {
    event.preventDefault();
    if (running !== null) return;
    running = new AbortController();
    submit.setAttribute("aria-disabled", "true");
    stop.disabled = false;
    tell("Sent…");
    try {
      tell((await work(running.signal, tell)) ?? "Done.");
    } catch (error) {
      tell(running.signal.aborted ? "Stopped." : `Failed: ${error.message}`);
    } finally {
      running = null;
      submit.removeAttribute("aria-disabled");
      stop.disabled = true;
    }
  };
  stop.onclick = () => {
    running?.abort();
    submit.focus(); // the button that had it is disabled now
  };
}
