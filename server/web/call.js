// One conversation by voice: the microphone, the connection, and what is played.

import { openSocket, post } from "./api.js";
import { Microphone } from "./microphone.js";
import { Playback } from "./playback.js";
import { formatSeconds } from "./units.js";

const RATE = 24000;
/** Audio that waits in the browser: some 16 seconds. */
const MAX_WAITING_BYTES = 2 ** 20;
const NORMAL_CLOSE = 1000;
const RESTART_CLOSE = 1012;

/**
 * A call, from `start` to `hangUp` or an end that comes from elsewhere. `view` is told all of it:
 * `tell(text)` and `alarm(text)` in words, `phase(text)` whose turn it is, `level(value)`,
 * `grow(entry, delta)`, `write(entry, text)`, `settle(entry, note)`, `keep(entry, text)`,
 * `timings(steps)` of a spoken turn, `talking(canHear)` once it is connected, and `ended(text)`.
 * An entry is `{id, mine}`.
 */
export class Call {
  /** `models`: the ids of those that answer, hear and speak. `voice` and `instructions` may be "". */
  constructor(models, voice, instructions, view) {
    this.models = models;
    this.voice = voice;
    this.instructions = instructions;
    this.view = view;
    this.over = false;
    this.microphone = null;
    this.socket = null;
    this.sentSamples = 0;
    this.hearsSinceMs = Infinity; // by `performance.now()`: when the first sample that was sent began
    this.silenceMs = 0; // that ends a turn
    this.inTurn = false; // from the begin of speech to the response
    this.responseId = null; // of the response under way
    this.turns = new Map(); // by response id: `{speechEndMs, heardMs}`
    this.speechEndMs = null; // of what was said last, until a response takes it
    this.silenced = new Set(); // responses that were interrupted: their audio may still be coming
  }

  async start() {
    // In the click, as browsers let no page begin to sound otherwise.
    this.playback = new Playback(() => this.rest());
    this.playback.context.resume();
    this.view.tell("Asking for the microphone…");
    try {
      const microphone = await Microphone.open(
        (piece) => this.onPiece(piece),
        () => this.view.alarm("The microphone was taken away. You can still write."),
      );
      if (this.over) microphone.close();
      else this.microphone = microphone;
    } catch (error) {
      this.view.alarm(`${error.message} You can write instead.`);
    }
    if (this.over) return;
    this.view.tell("Connecting…");
    const plan = await this.plan();
    if (this.over) return;
    if (plan.refused) return this.end(plan.refused);
    if (plan.waits) this.view.tell(plan.waits);
    this.connect();
  }

  /** What the server would do for this call. A browser is not told why a WebSocket is refused. */
  async plan() {
    const { answers, hears, speaks } = this.models;
    let plan;
    try {
      const body = { model: answers, further_models: [hears, speaks] };
      plan = await (await post("/v1/engine/plan", body)).json();
    } catch (error) {
      // A key may be for conversations alone.
      return error.status === 403 ? {} : { refused: error.message };
    }
    if (!plan.fits) return { refused: `These models never fit together: ${plan.reason}.` };
    const after = plan.eta_s >= 1 ? `, in about ${formatSeconds(plan.eta_s)}` : "";
    const waits = plan.tier !== "device" ? `Connecting: the models are brought in${after}…` : "";
    const roomBytes = plan.evictions.reduce((sum, { nbytes }) => sum + nbytes, plan.free_bytes);
    return { waits, busy: plan.wanted_bytes > roomBytes, reason: plan.reason, after };
  }

  connect() {
    try {
      this.socket = openSocket(`/v1/realtime?model=${encodeURIComponent(this.models.answers)}`);
    } catch (error) {
      this.end(error.message);
      return;
    }
    this.socket.onmessage = ({ data }) => this.onEvent(JSON.parse(data));
    let opened = false;
    this.socket.onopen = () => {
      opened = true;
    };
    this.socket.onclose = async ({ code, reason }) => {
      if (this.over) return;
      this.end(opened ? whyClosed(code, reason) : await this.whyRefused());
    };
  }

  async whyRefused() {
    const plan = await this.plan();
    if (plan.refused) return plan.refused;
    if (plan.busy) {
      return `There is no room for these models now: ${plan.reason}. Try again${plan.after || " later"}.`;
    }
    return (
      "The server refuses the conversation. The key may not talk," +
      " or a proxy before the server passes no WebSockets on."
    );
  }

  hangUp() {
    this.end("You hung up.");
  }

  /** Give all back. */
  end(text) {
    if (this.over) return;
    this.over = true;
    this.microphone?.close();
    this.playback.close();
    this.socket?.close(NORMAL_CLOSE);
    this.view.ended(text);
  }

  mute(muted) {
    this.microphone?.mute(muted);
  }

  /** Say something in writing. */
  say(text) {
    if (this.responseId !== null) this.send("response.cancel", { event_id: "cancel" });
    this.interrupt();
    const id = `item_${crypto.getRandomValues(new BigUint64Array(1))[0].toString(36)}`;
    const content = [{ type: "input_text", text }];
    this.send("conversation.item.create", {
      item: { id, type: "message", role: "user", content },
    });
    this.send("response.create", {});
    this.speechEndMs = null;
    this.view.write({ id, mine: true }, text);
    this.view.settle({ id, mine: true });
  }

  send(type, fields) {
    this.socket.send(JSON.stringify({ type, ...fields }));
  }

  /** Fall silent, and let the conversation have only what was heard. */
  interrupt() {
    if (this.responseId !== null) this.silenced.add(this.responseId);
    for (const turn of this.turns.values()) {
      if (turn.heardMs > performance.now()) turn.heardMs = null; // it never was
    }
    for (const [itemId, heardMs] of this.playback.stop()) {
      this.send("conversation.item.truncate", {
        item_id: itemId,
        content_index: 0,
        audio_end_ms: heardMs,
      });
    }
  }

  onPiece({ pcm, level }) {
    this.view.level(level);
    if (this.over || !this.ready) return;
    if (this.socket.bufferedAmount > MAX_WAITING_BYTES) {
      this.end("The connection is too slow for speech.");
      return;
    }
    this.sentSamples += pcm.byteLength / 2;
    // Pieces may come late here, but never early.
    const beganMs = performance.now() - (this.sentSamples * 1000) / RATE;
    this.hearsSinceMs = Math.min(this.hearsSinceMs, beganMs);
    this.send("input_audio_buffer.append", { audio: encode(pcm) });
  }

  onEvent(event) {
    if (!this.over) this.handlers[event.type]?.call(this, event);
  }

  handlers = {
    "session.created"() {
      const { hears, speaks } = this.models;
      const session = {
        type: "realtime",
        instructions: this.instructions,
        audio: {
          input: { transcription: { model: hears } },
          output: { model: speaks, ...(this.voice && { voice: this.voice }) },
        },
      };
      this.send("session.update", { event_id: "configure", session });
    },

    "session.updated"({ session }) {
      this.silenceMs = session.audio.input.turn_detection.silence_duration_ms;
      this.ready = true;
      this.view.talking(this.microphone !== null);
      this.rest();
    },

    "input_audio_buffer.speech_started"({ item_id: id }) {
      this.interrupt();
      this.inTurn = true;
      this.view.phase("You speak");
      this.view.grow({ id, mine: true }, "");
    },

    "input_audio_buffer.speech_stopped"({ audio_end_ms: endMs }) {
      // By the clock of this page: what the user waits is more than the server can know.
      this.speechEndMs = this.hearsSinceMs + endMs - this.silenceMs;
      this.view.phase("Understanding");
    },

    "conversation.item.input_audio_transcription.delta"({ item_id: id, delta }) {
      this.view.grow({ id, mine: true }, delta);
    },

    "conversation.item.input_audio_transcription.completed"({ item_id: id, transcript }) {
      this.view.write({ id, mine: true }, transcript);
      this.view.settle({ id, mine: true }, transcript ? "" : "nothing was understood");
    },

    "conversation.item.input_audio_transcription.failed"({ item_id: id, error }) {
      this.view.settle({ id, mine: true }, `not understood: ${error.message}`);
    },

    "response.created"({ response }) {
      this.inTurn = false;
      this.responseId = response.id;
      this.turns.set(response.id, { speechEndMs: this.speechEndMs, heardMs: null });
      this.speechEndMs = null;
      this.view.phase("Thinking");
    },

    "response.output_audio_transcript.delta"({ item_id: id, delta }) {
      this.view.grow({ id, mine: false }, delta);
    },

    "response.output_audio.delta"({ response_id: responseId, item_id: itemId, delta }) {
      if (this.silenced.has(responseId)) return;
      const heardMs = this.playback.add(itemId, delta);
      const turn = this.turns.get(responseId);
      if (turn.heardMs !== null || heardMs === null) return;
      turn.heardMs = heardMs;
      this.view.phase("Answering");
    },

    "response.output_audio_transcript.done"({ item_id: id, transcript }) {
      this.view.keep({ id, mine: false }, transcript);
    },

    "response.done"({ response }) {
      if (this.responseId === response.id) this.responseId = null;
      this.onResponse(response);
    },

    "conversation.item.truncated"({ item_id: id, audio_end_ms: heardMs }) {
      this.view.settle({ id, mine: false }, `interrupted after ${formatSeconds(heardMs / 1000)}`);
      this.send("conversation.item.retrieve", { item_id: id });
    },

    "conversation.item.retrieved"({ item }) {
      this.view.keep({ id: item.id, mine: false }, item.content[0].transcript);
    },

    error({ error }) {
      if (error.event_id === "cancel") return; // its answer was done just before
      if (error.event_id === "configure") this.end(error.message);
      else this.view.alarm(error.message);
    },
  };

  onResponse({ id, status, status_details: details, output, roundhouse }) {
    const note = status === "cancelled" ? "interrupted" : "";
    for (const item of output) {
      if (item.type === "message") this.view.settle({ id: item.id, mine: false }, note);
    }
    if (status === "failed") this.view.alarm(`No answer: ${details.error.message}`);
    const { speechEndMs, heardMs } = this.turns.get(id);
    this.turns.delete(id);
    this.silenced.delete(id);
    if (roundhouse !== undefined) {
      const here = speechEndMs === null || heardMs === null ? null : heardMs - speechEndMs;
      this.view.timings({ ...roundhouse, heard_ms: here });
    }
    this.rest();
  }

  /** Say that nobody speaks, if that is so. */
  rest() {
    if (this.inTurn || this.responseId !== null || this.playback.sources.size > 0) return;
    this.view.phase(this.microphone === null ? "" : "Listening");
  }
}

function whyClosed(code, reason) {
  if (code === NORMAL_CLOSE) return "The server ended the conversation.";
  if (code === RESTART_CLOSE) return "The server restarts. Talk again in a moment.";
  return reason ? `The conversation broke off: ${reason}` : "The connection broke off.";
}

function encode(pcm) {
  return btoa(String.fromCharCode(...new Uint8Array(pcm)));
}
