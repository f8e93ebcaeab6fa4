// Text spoken.

import { get, post } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { runOnSubmit } from "./run.js";

export function startSpeech() {
  const form = byId("speech-form");
  const audio = byId("speech-audio");
  let listed = null;

  async function listVoices() {
    const model = byId("speech-model").value;
    // Only once it is seen: to list a model's voices, its files may have to be fetched.
    if (byId("panel-speech").hidden || !model || model === listed) return;
    listed = model;
    const select = byId("speech-voice");
    select.replaceChildren(element("option", { value: "", textContent: "its usual one" }));
    try {
      const response = await get(`/v1/audio/voices?model=${encodeURIComponent(model)}`);
      const { data } = await response.json();
      if (listed !== model) return; // another one was chosen meanwhile
      for (const { id, name, language } of data) {
        const textContent = language === null ? name : `${name} (${language})`;
        select.append(element("option", { value: id, textContent }));
      }
    } catch (error) {
      listed = null;
      setText(form.querySelector("[data-status]"), `No voices: ${error.message}`);
    }
  }

  byId("panel-speech").addEventListener("show", listVoices);
  byId("speech-model").onchange = listVoices;

  runOnSubmit(form, async (signal, tell) => {
    const voice = byId("speech-voice").value;
    const response = await post(
      "/v1/audio/speech",
      {
        model: byId("speech-model").value,
        input: byId("speech-input").value,
        ...(voice && { voice }),
        speed: byId("speech-speed").valueAsNumber,
        response_format: byId("speech-format").value,
      },
      { signal },
    );
    tell("Speaking…");
    const blob = await response.blob();
    if (audio.src) URL.revokeObjectURL(audio.src);
    audio.src = URL.createObjectURL(blob);
    audio.hidden = false;
    try {
      await audio.play();
    } catch {
      return "Done. Press play to hear it."; // the browser wants a click first
    }
    return "Done.";
  });
}
