// The Vercel AI SDK with its three providers that take a base URL, over four endpoints.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError, Output, embedMany, generateObject, generateText, stepCountIs, streamObject,
  streamText, tool,
} from "ai";
import { City, Person, embed, model, url } from "./starter.mjs";

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "roundhouse",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  "openai, responses": (name) => openai(name),
  "openai, chat": (name) => openai.chat(name),
  "openai-compatible": (name) => compatible(name),
  anthropic: (name) => anthropic(name),
};
// By default the second turn refers to items of the first, which the server has kept.
const asked = { prompt: "Hello", maxRetries: 0 };
const ends = ["stop", "length"];

for (const [name, make] of Object.entries(models)) {
  test(`${name}: text whole and streamed`, async () => {
    const whole = await generateText({ ...asked, model: make(model), maxOutputTokens: 16 });
    assert.ok(ends.includes(whole.finishReason));
    assert.ok(whole.usage.outputTokens > 0);
    const stream = streamText({ ...asked, model: make(model), maxOutputTokens: 16 });
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert.equal(text, await stream.text);
    assert.ok(ends.includes(await stream.finishReason));
    assert.ok((await stream.usage).outputTokens > 0);
    const again = await generateText({
      model: make(model), maxOutputTokens: 16, maxRetries: 0,
      messages: [
        { role: "user", content: "Hello" },
        ...whole.response.messages,
        { role: "user", content: "More" },
      ],
    });
    assert.ok(ends.includes(again.finishReason));
  });

  test(`${name}: a forced tool runs and its result goes back`, async () => {
    const cities = [];
    const weather = tool({
      inputSchema: City,
      execute: async ({ city }) => {
        cities.push(city);
        return "Rain";
      },
    });
    const answer = await generateText({
      ...asked,
      model: make(model),
      maxOutputTokens: 500,
      tools: { weather },
      toolChoice: "required",
      prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {}),
      stopWhen: stepCountIs(2),
    });
    assert.equal(answer.steps[0].finishReason, "tool-calls");
    assert.ok(cities.length);
    assert.equal(answer.steps.length, 2);
    const stream = streamText({
      ...asked,
      model: make(model),
      maxOutputTokens: 500,
      tools: { weather },
      toolChoice: { type: "tool", toolName: "weather" },
    });
    const [call] = await stream.toolCalls;
    City.parse(call.input);
  });

  test(`${name}: tools that are not forced`, async () => {
    const weather = tool({ inputSchema: City });
    const answer = await generateText({
      ...asked, model: make(model), maxOutputTokens: 16, tools: { weather },
    });
    assert.ok(answer.finishReason);
  });

  test(`${name}: structured output`, async () => {
    const person = await generateObject({
      ...asked, model: make(model), maxOutputTokens: 300, schema: Person,
    });
    Person.parse(person.object);
    const { output } = await generateText({
      ...asked,
      model: make(model),
      maxOutputTokens: 300,
      output: Output.object({ schema: Person }),
    });
    Person.parse(output);
    const stream = streamObject({
      ...asked, model: make(model), maxOutputTokens: 300, schema: Person,
    });
    for await (const part of stream.partialObjectStream) assert.equal(typeof part, "object");
    Person.parse(await stream.object);
  });

  test(`${name}: errors`, async () => {
    await assert.rejects(
      generateText({ ...asked, model: make("tiny-qwem") }),
      (error) => APICallError.isInstance(error) && error.statusCode === 404
        && /tiny-qwem/.test(error.message),
    );
  });
}

test("turns of what is kept, and of what is not", async () => {
  const first = await generateText({ ...asked, model: openai(model), maxOutputTokens: 16 });
  const previousResponseId = first.providerMetadata.openai.responseId;
  for (const options of [{ previousResponseId }, { previousResponseId, store: false }]) {
    const second = await generateText({
      ...asked, model: openai(model), maxOutputTokens: 16, providerOptions: { openai: options },
    });
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  }
  const alone = await generateText({
    ...asked, model: openai(model), maxOutputTokens: 16, prompt: undefined,
    messages: [
      { role: "user", content: "Hello" },
      ...first.response.messages,
      { role: "user", content: "More" },
    ],
    providerOptions: { openai: { store: false } },
  });
  assert.ok(alone.usage.inputTokens > first.usage.inputTokens);
});

for (const provider of [openai, compatible]) {
  test("embeddings", async () => {
    const { embeddings } = await embedMany({
      model: provider.textEmbeddingModel(embed), values: ["one", "two"], maxRetries: 0,
    });
    assert.equal(embeddings.length, 2);
  });
}
