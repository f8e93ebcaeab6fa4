// On the audio thread: what the microphone hears becomes 16-bit PCM at 24 kHz.

const RATE = 24000;
/** Samples of a message: 40 ms. */
const SIZE = 960;
const ALMOST_NOTHING = 1e-9;

/**
 * Posts `{pcm, level}`: an ArrayBuffer of `SIZE` samples, and their root mean square, 0 to 1.
 *
 * Each sample of the output is the mean of the input during its time. That is a weak low-pass, but
 * speech has little above 12 kHz. Browsers would resample better, but Firefox does not: it connects
 * no microphone to a context of another rate.
 */
class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.span = sampleRate / RATE; // of one output sample, in input samples
    this.filled = 0; // of that span
    this.sum = 0;
    this.begin();
  }

  begin() {
    this.pcm = new Int16Array(SIZE);
    this.count = 0;
    this.energy = 0;
  }

  process([channels]) {
    for (const sample of channels[0] ?? []) this.take(sample);
    return true;
  }

  take(sample) {
    let left = 1;
    while (left > ALMOST_NOTHING) {
      const part = Math.min(left, this.span - this.filled);
      this.sum += sample * part;
      this.filled += part;
      left -= part;
      if (this.span - this.filled > ALMOST_NOTHING) continue;
      this.put(Math.max(-1, Math.min(1, this.sum / this.span)));
      this.filled = 0;
      this.sum = 0;
    }
  }

  put(value) {
    this.pcm[this.count] = Math.round(value * 32767);
    this.count += 1;
    this.energy += value * value;
    if (this.count < SIZE) return;
    const level = Math.sqrt(this.energy / SIZE);
    this.port.postMessage({ pcm: this.pcm.buffer, level }, [this.pcm.buffer]);
    this.begin();
  }
}

registerProcessor("capture", Capture);
