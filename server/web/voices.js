// Choosing a voice of a speech model.

import { get } from "./api.js";
import { element } from "./dom.js";

/**
 * Offer in the select `voice` what the model that the select `model` has chosen can speak with.
 * `isShown()` says whether somebody sees it: to list a model's voices, its files may have to be
 * fetched. `tell(text)` says what went wrong. Returns what to call when it comes to be seen.
 */
export function startVoices(model, voice, isShown, tell) {
  let listed = null;

  async function list() {
    const chosen = model.value;
    if (!isShown() || !chosen || chosen === listed) return;
    listed = chosen;
    voice.replaceChildren(element("option", { value: "", textContent: "its usual one" }));
    try {
      const response = await get(`/v1/audio/voices?model=${encodeURIComponent(chosen)}`);
      const { data } = await response.json();
      if (listed !== chosen) return; // another one was chosen meanwhile
      for (const { id, name, language } of data) {
        const textContent = language === null ? name : `${name} (${language})`;
        voice.append(element("option", { value: id, textContent }));
      }
    } catch (error) {
      listed = null;
      tell(`No voices: ${error.message}`);
    }
  }

  model.addEventListener("change", list);
  return list;
}
