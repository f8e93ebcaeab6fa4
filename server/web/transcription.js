// Speech written down, from a file or the microphone.

import { post } from "./api.js";
import { byId, setText } from "./dom.js";
import { runOnSubmit } from "./run.js";
import { readDocuments } from "./sse.js";

export function startTranscription() {
  const recorder = new Recorder();
  const text = byId("transcription-text");

  runOnSubmit(byId("transcription-form"), async (signal, tell) => {
    const file = recorder.file ?? byId("transcription-file").files[0];
    if (file === undefined) throw new Error("choose a file or record something first.");
    const form = new FormData();
    form.set("model", byId("transcription-model").value);
    form.set("file", file);
    form.set("stream", "true");
    const language = byId("transcription-language").value;
    if (language) form.set("language", language);
    text.replaceChildren();
    const response = await post("/v1/audio/transcriptions", form, { signal });
    for await (const event of readDocuments(response, tell)) {
      if (event.type === "transcript.text.delta") text.append(event.delta);
      else setText(text, event.text);
    }
    return text.textContent ? "Done." : "Done: nothing was said.";
  });
  byId("transcription-file").onchange = () => recorder.forget();
}

/** The microphone; `file` is the last recording, null without one. */
class Recorder {
  constructor() {
    this.file = null;
    this.recording = null;
    this.button = byId("record-toggle");
    this.state = byId("record-state");
    this.time = byId("record-time"); // no live region: each second would be read out
    this.audio = byId("record-audio");
    // Browsers give the microphone to pages of https and of this machine only.
    const possible = Boolean(navigator.mediaDevices?.getUserMedia && globalThis.MediaRecorder);
    this.button.disabled = !possible;
    if (!possible) setText(this.state, "To record, open this page by https or on this machine.");
    this.button.onclick = () => (this.recording === null ? this.start() : this.recording.stop());
  }

  async start() {
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      setText(this.state, `No microphone: ${error.message}`);
      return;
    }
    this.forget();
    const pieces = [];
    this.recording = new MediaRecorder(stream);
    this.recording.ondataavailable = ({ data }) => pieces.push(data);
    this.recording.onstop = () => {
      for (const track of stream.getTracks()) track.stop(); // puts the microphone's light out
      this.keep(new File(pieces, "recording", { type: this.recording.mimeType }));
    };
    const beganMs = performance.now();
    const tick = () => setText(this.time, `${Math.floor((performance.now() - beganMs) / 1000)} s`);
    this.ticking = setInterval(tick, 250);
    tick();
    this.recording.start();
    this.button.setAttribute("aria-pressed", "true");
    setText(this.button, "Stop recording");
    setText(this.state, "Recording…");
  }

  keep(file) {
    clearInterval(this.ticking);
    setText(this.time, "");
    this.recording = null;
    this.file = file;
    this.audio.src = URL.createObjectURL(file);
    this.audio.hidden = false;
    this.button.setAttribute("aria-pressed", "false");
    setText(this.button, "Record");
    setText(this.state, "Recorded; it is used instead of the file.");
  }

  forget() {
    if (this.audio.src) URL.revokeObjectURL(this.audio.src);
    this.audio.removeAttribute("src");
    this.audio.hidden = true;
    this.file = null;
    if (this.recording === null && !this.button.disabled) setText(this.state, "");
  }
}
