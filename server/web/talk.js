// The section in which one talks with a language model: its fields, the transcript, the latency.

import { Call } from "./call.js";
import { byId, element, setText } from "./dom.js";
import { formatSeconds } from "./units.js";
import { startVoices } from "./voices.js";

const TASKS = { answers: "answers", hears: "transcribes speech", speaks: "speaks" };
const STEPS = ["transcript_ms", "first_token_ms", "first_audio_ms", "heard_ms"];
/** The meter begins at -60 dB: quiet speech has some -40. */
const QUIETEST_DB = -60;

export function startTalk() {
  const section = byId("talk");
  const toggle = byId("talk-toggle");
  const mute = byId("talk-mute");
  const input = byId("talk-input");
  const view = new View();
  let call = null;

  const listVoices = startVoices(
    byId("talk-speaks"),
    byId("talk-voice"),
    () => section.dataset.seen === "true",
    (text) => view.tell(text),
  );
  // Only once it is seen or used: to list voices, files may have to be fetched.
  section.addEventListener("focusin", () => {
    section.dataset.seen = "true";
    listVoices();
  });

  view.onEnd = () => {
    call = null;
  };
  toggle.onclick = () => {
    if (call !== null) {
      call.hangUp();
      return;
    }
    view.begin();
    const models = {
      answers: byId("talk-answers").value,
      hears: byId("talk-hears").value,
      speaks: byId("talk-speaks").value,
    };
    const missing = Object.keys(TASKS).find((kind) => !models[kind]);
    if (missing) {
      view.ended(`The server has no model that ${TASKS[missing]}.`);
      return;
    }
    const instructions = byId("talk-instructions").value;
    call = new Call(models, byId("talk-voice").value, instructions, view);
    call.start();
  };
  mute.onclick = () => {
    const muted = mute.getAttribute("aria-pressed") !== "true";
    mute.setAttribute("aria-pressed", String(muted));
    call.mute(muted);
  };
  byId("talk-form").onsubmit = (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (!text) return;
    input.value = "";
    call.say(text);
  };
}

/** What a call shows. */
class View {
  constructor() {
    this.toggle = byId("talk-toggle");
    this.mute = byId("talk-mute");
    this.log = byId("talk-log");
    this.entries = byId("talk-entries");
    this.meter = byId("talk-level");
    this.turns = 0;
    this.onEnd = () => {};
  }

  begin() {
    this.entries.replaceChildren();
    byId("talk-rows").replaceChildren();
    byId("talk-latency").hidden = true;
    this.turns = 0;
    this.alarm("");
    setText(this.toggle, "Hang up");
    byId("talk-options").disabled = true;
  }

  talking(canHear) {
    this.tell(canHear ? "Connected: speak, or write below." : "Connected: write below.");
    this.mute.disabled = !canHear;
    byId("talk-writing").disabled = false;
  }

  ended(text) {
    this.onEnd();
    this.tell(text);
    this.phase("");
    this.level(0);
    this.log.removeAttribute("aria-busy");
    const focused = document.activeElement;
    setText(this.toggle, "Talk");
    this.mute.disabled = true;
    this.mute.setAttribute("aria-pressed", "false");
    byId("talk-writing").disabled = true;
    byId("talk-options").disabled = false;
    // What had the focus may be disabled now.
    if (focused === this.mute || byId("talk-form").contains(focused)) this.toggle.focus();
  }

  tell(text) {
    setText(byId("talk-status"), text);
  }

  alarm(text) {
    setText(byId("talk-error"), text);
  }

  phase(text) {
    setText(byId("talk-phase"), text);
  }

  /** The root mean square of some audio, from 0 to 1. */
  level(value) {
    const db = 20 * Math.log10(value);
    this.meter.value = Math.max(0, 1 - db / QUIETEST_DB);
  }

  grow(entry, delta) {
    // Told at once, each word would be read out alone.
    this.log.setAttribute("aria-busy", "true");
    this.textOf(entry).append(delta);
    this.scroll();
  }

  write(entry, text) {
    setText(this.textOf(entry), text);
    this.scroll();
  }

  scroll() {
    this.log.scrollTop = this.log.scrollHeight; // the log's own: the page stays where the reader is
  }

  /** Nothing more is to come for an entry; `note` says what became of it. */
  settle(entry, note = "") {
    const told = this.nodeOf(entry).querySelector(".note");
    if (!told.textContent.startsWith(note)) setText(told, note); // it may say more already
    this.scroll();
    this.log.removeAttribute("aria-busy");
  }

  /** Mark what lies behind `text`: the conversation goes on without it. */
  keep(entry, text) {
    const node = this.textOf(entry);
    const words = node.textContent.match(/\s*\S+/g) ?? [];
    const kept = (text.match(/\S+/g) ?? []).length;
    if (kept >= words.length) return;
    const unheard = element("s", { textContent: words.slice(kept).join("") });
    node.replaceChildren(words.slice(0, kept).join(""), unheard);
  }

  /** A row of the table: milliseconds from the end of speech to each step, null for none. */
  timings(steps) {
    this.turns += 1;
    byId("talk-latency").hidden = false;
    const cells = STEPS.map((step) =>
      element("td", { textContent: steps[step] == null ? "–" : formatSeconds(steps[step] / 1000) }),
    );
    const head = element("th", { scope: "row", textContent: String(this.turns) });
    byId("talk-rows").prepend(element("tr", {}, head, ...cells));
  }

  textOf(entry) {
    return this.nodeOf(entry).querySelector(".text");
  }

  nodeOf({ id, mine }) {
    const known = [...this.entries.children].find((node) => node.dataset.item === id);
    if (known) return known;
    const node = element(
      "li",
      { className: `message ${mine ? "mine" : "theirs"}` },
      element("strong", { textContent: mine ? "You" : byId("talk-answers").value }),
      element("p", { className: "text" }),
      element("p", { className: "note" }),
    );
    node.dataset.item = id;
    this.entries.append(node);
    return node;
  }
}
