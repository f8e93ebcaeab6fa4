// Speech that comes in pieces, played without gaps, and how much of it was heard.

const RATE = 24000;
/** The first piece, or one that came late, begins that much after now. */
const LEAD_S = 0.03;

/** What plays the items of a conversation, one after the other. `close` ends it. */
export class Playback {
  /** `onSilence()` is called when all that came was played. Begin it in a click. */
  constructor(onSilence) {
    // Of the rate of the speech: then no piece is resampled alone, which would be heard as clicks.
    this.context = new AudioContext({ sampleRate: RATE });
    this.onSilence = onSilence;
    this.nextFrame = 0;
    this.sources = new Set();
    this.items = new Map(); // by id: the pieces, as [start, end] in seconds of the context
  }

  /**
   * Queue base64 of 16-bit PCM at 24 kHz. Returns the time at which it is heard, in milliseconds of
   * `performance.now()`.
   */
  add(itemId, base64) {
    const samples = decode(base64);
    if (samples.length === 0) return null;
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    const soonest = Math.ceil((this.context.currentTime + LEAD_S) * RATE);
    const frame = Math.max(this.nextFrame, soonest);
    this.nextFrame = frame + samples.length;
    const startS = frame / RATE;
    source.start(startS);
    this.sources.add(source);
    source.onended = () => {
      this.sources.delete(source);
      if (this.sources.size > 0) return;
      this.items.clear(); // they were heard to the end
      this.onSilence();
    };
    if (!this.items.has(itemId)) this.items.set(itemId, []);
    this.items.get(itemId).push([startS, this.nextFrame / RATE]);
    return performance.now() + (startS - this.heardUntilS()) * 1000;
  }

  /** Fall silent at once. Returns `[item id, milliseconds heard]` of what was not heard to its end. */
  stop() {
    const untilS = this.heardUntilS();
    const cut = [];
    for (const [itemId, pieces] of this.items) {
      if (pieces.at(-1)[1] <= untilS) continue;
      const heardS = pieces.map(([startS, endS]) => Math.min(endS, Math.max(startS, untilS)) - startS);
      cut.push([itemId, Math.floor(heardS.reduce((sum, each) => sum + each) * 1000)]);
    }
    for (const source of this.sources) {
      source.onended = null;
      source.stop();
    }
    this.sources.clear();
    this.items.clear();
    this.nextFrame = 0;
    return cut;
  }

  /** The second of the context that leaves the speaker now. */
  heardUntilS() {
    return this.context.currentTime - (this.context.outputLatency ?? 0);
  }

  close() {
    this.stop();
    this.context.close();
  }
}

function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const samples = new Float32Array(bytes.length >> 1);
  for (let index = 0; index < samples.length; index += 1) {
    samples[index] = view.getInt16(2 * index, true) / 32768;
  }
  return samples;
}
