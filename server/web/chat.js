// A conversation with a language model, streamed.

import { post } from "./api.js";
import { byId, element } from "./dom.js";
import { runOnSubmit } from "./run.js";
import { readDocuments } from "./sse.js";
import { formatSeconds } from "./units.js";

export function startChat() {
  const log = byId("chat-log");
  const list = byId("chat-messages");
  const prompt = byId("chat-prompt");
  let messages = [];

  runOnSubmit(byId("chat-form"), async (signal, tell) => {
    const conversation = messages;
    const question = { role: "user", content: prompt.value };
    const asked = addMessage(list, "You", question.content);
    const answer = addMessage(list, byId("chat-model").value, "");
    const grow = (delta) => {
      answer.text.append(delta);
      log.scrollTop = log.scrollHeight; // the log's own: the page stays where the reader is
    };
    grow("");
    prompt.value = "";
    // Told at once, each token would be read out alone.
    log.setAttribute("aria-busy", "true");
    try {
      const { content, told } = await ask([...conversation, question], grow, signal, tell);
      conversation.push(question, { role: "assistant", content });
      return told;
    } catch (error) {
      // What was not answered is not part of the conversation: it can be sent again.
      if (answer.text.textContent === "") answer.entry.remove();
      asked.entry.classList.add("failed");
      if (prompt.value === "") prompt.value = question.content;
      throw error;
    } finally {
      log.removeAttribute("aria-busy");
    }
  });

  prompt.onkeydown = (event) => {
    if (event.key === "Enter" && event.ctrlKey) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  };
  byId("chat-clear").onclick = () => {
    messages = [];
    list.replaceChildren();
    prompt.focus();
  };
}

/** Stream an answer, piece by piece, to `grow`; returns its text and what it took, in words. */
async function ask(messages, grow, signal, tell) {
  const system = byId("chat-system").value;
  const temperature = byId("chat-temperature").value;
  const began = performance.now();
  const response = await post(
    "/v1/chat/completions",
    {
      model: byId("chat-model").value,
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      max_completion_tokens: byId("chat-max-tokens").valueAsNumber,
      ...(temperature === "" ? {} : { temperature: Number(temperature) }),
      stream: true,
      stream_options: { include_usage: true },
    },
    { signal },
  );
  let firstS = null;
  let content = "";
  let tokens = null;
  for await (const { choices, usage } of readDocuments(response, tell)) {
    const delta = choices?.[0]?.delta ?? {};
    if (delta.reasoning ?? delta.reasoning_content) tell("Thinking…");
    if (delta.content) {
      firstS ??= (performance.now() - began) / 1000;
      content += delta.content;
      grow(delta.content);
      tell("Answering…");
    }
    tokens = usage?.completion_tokens ?? tokens;
  }
  const tookS = (performance.now() - began) / 1000;
  const told = [`${formatSeconds(tookS)} in all`];
  if (tokens !== null) told.push(`${tokens} tokens`);
  if (firstS !== null) told.push(`${formatSeconds(firstS)} to the first`);
  if (firstS !== null && tokens > 1 && tookS > firstS) {
    told.push(`${((tokens - 1) / (tookS - firstS)).toFixed(1)} tokens a second`);
  }
  return { content, told: `${told.join(", ")}.` };
}

function addMessage(list, who, content) {
  const text = element("p", { className: "text", textContent: content });
  const speaker = element("strong", { textContent: who });
  const entry = element("li", { className: "message" }, speaker, text);
  list.append(entry);
  return { entry, text };
}
