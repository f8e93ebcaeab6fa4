// OpenAI's SDK for Node.js.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { toFile } from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { City, Person, embed, hello, model, url } from "./starter.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", pattern: "^[a-z]{1,10}$" } },
      required: ["city"],
    },
  },
};

test("chat whole", async () => {
  const answer = await client.chat.completions.create({ model, messages: hello, max_tokens: 8 });
  assert.ok(["stop", "length"].includes(answer.choices[0].finish_reason));
  assert.ok(answer.usage.completion_tokens <= 8);
});

test("chat streamed", async () => {
  const stream = await client.chat.completions.create({
    model, messages: hello, max_tokens: 8, stream: true, stream_options: { include_usage: true },
  });
  let reason, usage;
  for await (const chunk of stream) {
    reason = chunk.choices[0]?.finish_reason ?? reason;
    usage = chunk.usage ?? usage;
  }
  assert.ok(["stop", "length"].includes(reason));
  assert.ok(usage.completion_tokens <= 8);
});

test("chat parse", async () => {
  const answer = await client.chat.completions.parse({
    model, messages: hello, max_tokens: 200,
    response_format: zodResponseFormat(Person, "person"),
  });
  Person.parse(answer.choices[0].message.parsed);
});

test("tools, auto and forced", async () => {
  const auto = await client.chat.completions.create({
    model, messages: hello, tools: [weather], max_tokens: 8,
  });
  assert.ok(auto.choices[0].finish_reason);
  const forced = await client.chat.completions.create({
    model, messages: hello, tools: [weather], tool_choice: "required", max_tokens: 500,
  });
  const { message } = forced.choices[0];
  assert.ok(message.tool_calls.length);
  for (const call of message.tool_calls) City.parse(JSON.parse(call.function.arguments));
  const results = message.tool_calls.map((call) => ({
    role: "tool", tool_call_id: call.id, content: "Rain",
  }));
  const again = await client.chat.completions.create({
    model, messages: [...hello, message, ...results], tools: [weather], max_tokens: 8,
  });
  assert.equal(again.choices[0].message.role, "assistant");
});

test("tools streamed and parsed", async () => {
  const stream = client.chat.completions.stream({
    model, messages: hello, max_tokens: 200, parallel_tool_calls: false,
    tools: [zodFunction({ name: "get_weather", parameters: City })],
    tool_choice: { type: "function", function: { name: "get_weather" } },
  });
  const [call] = (await stream.finalMessage()).tool_calls;
  City.parse(call.function.parsed_arguments);
});

test("responses whole, streamed, parsed", async () => {
  const whole = await client.responses.create({ model, input: "Hello", max_output_tokens: 16 });
  assert.ok(["completed", "incomplete"].includes(whole.status));
  const types = [];
  const stream = client.responses.stream({ model, input: "Hello", max_output_tokens: 16 });
  for await (const event of stream) types.push(event.type);
  assert.equal(types[0], "response.created");
  assert.ok(["response.completed", "response.incomplete"].includes(types.at(-1)));
  const parsed = await client.responses.parse({
    model, input: "Hello", max_output_tokens: 200,
    text: { format: zodTextFormat(Person, "person") },
  });
  Person.parse(parsed.output_parsed);
});

test("embeddings", async () => {
  const answer = await client.embeddings.create({ model: embed, input: ["one", "two"] });
  assert.equal(answer.data.length, 2);
  const norm = Math.hypot(...answer.data[0].embedding);
  assert.ok(Math.abs(norm - 1) < 1e-3);
});

test("images", async () => {
  const answer = await client.images.generate({
    model: "gpt-image-1", prompt: "a red train", size: "128x128", quality: "low",
  });
  const png = Buffer.from(answer.data[0].b64_json, "base64");
  assert.equal(png.toString("latin1", 1, 4), "PNG");
});

test("speech and transcription", async () => {
  const speech = await client.audio.speech.create({
    model: "tts-1", voice: "alloy", input: "Hello.", response_format: "wav",
  });
  const bytes = Buffer.from(await speech.arrayBuffer());
  assert.equal(bytes.toString("latin1", 0, 4), "RIFF");
  const answer = await client.audio.transcriptions.create({
    model: "whisper-1", file: await toFile(bytes, "speech.wav"),
  });
  assert.equal(typeof answer.text, "string");
});

test("errors", async () => {
  await assert.rejects(
    client.chat.completions.create({ model: "tiny-qwem", messages: hello }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  await assert.rejects(
    client.chat.completions.create({ model, messages: hello, temperature: 9, stream: true }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
});
