// Anthropic's SDK for Node.js.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { City, hello, model, url } from "./starter.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const weather = {
  name: "get_weather",
  input_schema: {
    type: "object",
    properties: { city: { type: "string", pattern: "^[a-z]{1,10}$" } },
    required: ["city"],
  },
};

test("message whole and streamed", async () => {
  const whole = await client.messages.create({ model, messages: hello, max_tokens: 8 });
  assert.equal(whole.content[0].type, "text");
  const stream = client.messages.stream({ model, messages: hello, max_tokens: 8 });
  const final = await stream.finalMessage();
  assert.ok(["end_turn", "max_tokens"].includes(final.stop_reason));
  assert.ok(final.usage.output_tokens > 0);
});

test("forced tool, and its result", async () => {
  const tool_choice = { type: "any" };
  const asked = { model, max_tokens: 500, tools: [weather] };
  const answer = await client.messages.stream({ ...asked, messages: hello, tool_choice })
    .finalMessage();
  assert.equal(answer.stop_reason, "tool_use");
  const uses = answer.content.filter((block) => block.type === "tool_use");
  for (const use of uses) City.parse(use.input);
  const results = uses.map((use) => ({
    type: "tool_result", tool_use_id: use.id, content: "Rain",
  }));
  const again = await client.messages.create({
    ...asked,
    max_tokens: 8,
    messages: [
      ...hello,
      { role: "assistant", content: answer.content },
      { role: "user", content: results },
    ],
  });
  assert.equal(again.role, "assistant");
});

test("errors", async () => {
  await assert.rejects(
    client.messages.create({ model: "tiny-qwem", messages: hello, max_tokens: 1 }),
    (error) => error instanceof Anthropic.NotFoundError && /tiny-qwem/.test(error.message),
  );
});
