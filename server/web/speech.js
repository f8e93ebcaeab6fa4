// Text spoken.

import { post } from "./api.js";
import { byId, setText } from "./dom.js";
import { runOnSubmit } from "./run.js";
import { startVoices } from "./voices.js";

export function startSpeech() {
  const form = byId("speech-form");
  const audio = byId("speech-audio");
  const listVoices = startVoices(
    byId("speech-model"),
    byId("speech-voice"),
    () => !byId("panel-speech").hidden,
    (text) => setText(form.querySelector("[data-status]"), text),
  );
  byId("panel-speech").addEventListener("show", listVoices);

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
