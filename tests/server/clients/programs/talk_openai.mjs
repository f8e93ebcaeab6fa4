// A conversation by voice, through OpenAI's SDK for Node.js.

import assert from "node:assert/strict";
import net from "node:net";
import { test } from "node:test";
import OpenAI, { toFile } from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

const url = process.env.ROUNDHOUSE_URL;
const rate = 24_000;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

// The SDK always asks for TLS, which a proxy before the server would end. Here is none.
const { hostname: host, port } = new URL(url);
const options = { createConnection: () => net.connect({ host, port }) };

// A connection, and all its events. `until` waits for the next event of a kind.
async function connect() {
  const talk = await OpenAIRealtimeWS.create(client, { model: "gpt-realtime", options });
  const events = [];
  let seen = 0;
  let wake = () => {};
  let failure;
  talk.on("event", (event) => {
    events.push(event);
    wake();
  });
  talk.on("error", (error) => {
    failure = error;
    wake();
  });
  async function until(kind) {
    for (;;) {
      if (failure) throw failure;
      while (seen < events.length) if (events[seen++].type === kind) return events[seen - 1];
      await new Promise((resolve) => (wake = resolve));
    }
  }
  await until("session.created");
  return { talk, events, until };
}

async function speak(text) {
  const speech = await client.audio.speech.create({
    model: "tts-1", voice: "alloy", input: text, response_format: "pcm",
  });
  return Buffer.from(await speech.arrayBuffer());
}

function wav(pcm) {
  const head = Buffer.alloc(44);
  head.write("RIFF", 0);
  head.writeUInt32LE(36 + pcm.length, 4);
  head.write("WAVEfmt ", 8);
  head.writeUInt32LE(16, 16);
  head.writeUInt16LE(1, 20);
  head.writeUInt16LE(1, 22);
  head.writeUInt32LE(rate, 24);
  head.writeUInt32LE(2 * rate, 28);
  head.writeUInt16LE(2, 32);
  head.writeUInt16LE(16, 34);
  head.write("data", 36);
  head.writeUInt32LE(pcm.length, 40);
  return Buffer.concat([head, pcm]);
}

const words = (text) => text.toLowerCase().match(/[a-z0-9']+/g) ?? [];
const message = (text) => ({
  type: "conversation.item.create",
  item: { type: "message", role: "user", content: [{ type: "input_text", text }] },
});

test("a question is answered and interrupts a story", async () => {
  const question = Buffer.concat([
    await speak("What is the capital of France?"), Buffer.alloc(2 * rate * 5),
  ]);
  const { talk, events, until } = await connect();
  const ask = () => {
    for (let begin = 0; begin < question.length; begin += rate / 5) {
      const audio = question.subarray(begin, begin + rate / 5).toString("base64");
      talk.send({ type: "input_audio_buffer.append", audio });
    }
  };
  talk.send({
    type: "session.update",
    session: {
      type: "realtime", max_output_tokens: 20,
      audio: { input: { transcription: { model: "whisper-1" } }, output: { voice: "cedar" } },
    },
  });
  ask();
  const answer = (await until("response.done")).response;
  assert.ok(["completed", "incomplete"].includes(answer.status));
  const of = (kind) => events.filter((event) => event.type === kind);
  const [heard] = of("conversation.item.input_audio_transcription.completed");
  assert.match(heard.transcript, /capital of france/i);
  const audio = of("response.output_audio.delta");
  const pcm = Buffer.concat(audio.map((event) => Buffer.from(event.delta, "base64")));
  const { text } = await client.audio.transcriptions.create({
    model: "whisper-1", file: await toFile(wav(pcm), "answer.wav"), language: "en",
  });
  const said = words(answer.output[0].content[0].transcript);
  const again = words(text);
  assert.ok(again.includes("paris"), text);
  assert.ok(said.filter((word) => again.includes(word)).length >= 0.8 * said.length, text);

  talk.send(message("Tell me a long story about a train."));
  talk.send({ type: "response.create", response: { max_output_tokens: 200 } });
  const story = await until("response.output_audio.delta");
  ask();
  const cancelled = (await until("response.done")).response;
  const end = events.length;
  assert.equal(cancelled.id, story.response_id);
  assert.equal(cancelled.status, "cancelled");
  assert.equal(cancelled.status_details.reason, "turn_detected");
  talk.send({
    type: "conversation.item.truncate",
    item_id: story.item_id, content_index: 0, audio_end_ms: 300,
  });
  await until("conversation.item.truncated");
  talk.send({ type: "conversation.item.retrieve", item_id: story.item_id });
  const kept = (await until("conversation.item.retrieved")).item.content[0].transcript;
  assert.ok(words(kept).length < 6, kept);
  const later = events.slice(end).filter((event) => event.type === "response.output_audio.delta");
  assert.ok(later.every((event) => event.response_id !== story.response_id), "the story goes on");
  talk.close();
});

test("a function is called", async () => {
  const { talk, until } = await connect();
  const parameters = {
    type: "object",
    properties: { city: { type: "string", maxLength: 20 } },
    required: ["city"],
    additionalProperties: false,
  };
  talk.send({
    type: "session.update",
    session: {
      type: "realtime", output_modalities: ["text"], max_output_tokens: 60,
      tools: [{ type: "function", name: "get_weather", parameters }],
      tool_choice: { type: "function", name: "get_weather" },
    },
  });
  talk.send(message("What is the weather in Paris?"));
  talk.send({ type: "response.create" });
  const [call] = (await until("response.done")).response.output;
  assert.equal(call.name, "get_weather");
  assert.equal(typeof JSON.parse(call.arguments).city, "string");
  talk.send({
    type: "conversation.item.create",
    item: { type: "function_call_output", call_id: call.call_id, output: "Rain" },
  });
  talk.send({
    type: "response.create", response: { tool_choice: "none", max_output_tokens: 16 },
  });
  const answer = (await until("response.done")).response;
  assert.ok(answer.output[0].content[0].text);
  talk.close();
});
