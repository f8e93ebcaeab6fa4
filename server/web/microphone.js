// The microphone, in pieces that the realtime protocol takes.

const WHY = {
  NotAllowedError: "this page may not use it. Allow it beside the address of the page.",
  NotFoundError: "this device has none.",
  NotReadableError: "another program uses it, or it does not work.",
};

/** Which microphone: speakers must not be heard as speech, or each answer would interrupt itself. */
const WANTED = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };

/** An open microphone. `close` gives it back. */
export class Microphone {
  /**
   * Ask for it. `onPiece({pcm, level})` gets 40 ms each time: 16 bits, 24 kHz, and the loudness from
   * 0 to 1. `onLost()` is called if it is taken away. Throws Error with words for its user.
   */
  static async open(onPiece, onLost) {
    if (!navigator.mediaDevices?.getUserMedia || !globalThis.AudioWorkletNode) {
      throw new Error("No microphone: open this page by https or on this machine.");
    }
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: WANTED });
    } catch (error) {
      throw new Error(`No microphone: ${WHY[error.name] ?? error.message}`);
    }
    const microphone = new Microphone(stream, onLost);
    try {
      await microphone.listen(onPiece);
    } catch (error) {
      microphone.close();
      throw new Error(`No microphone: ${error.message}`);
    }
    return microphone;
  }

  constructor(stream, onLost) {
    this.stream = stream;
    this.context = new AudioContext();
    for (const track of stream.getTracks()) track.onended = onLost; // not by our own `stop`
  }

  async listen(onPiece) {
    await this.context.audioWorklet.addModule(new URL("microphone_worklet.js", import.meta.url));
    await this.context.resume();
    // One channel: what has more is mixed. The output is silence; without one some browsers stop.
    const options = { channelCount: 1, channelCountMode: "explicit", outputChannelCount: [1] };
    this.capture = new AudioWorkletNode(this.context, "capture", options);
    this.capture.port.onmessage = ({ data }) => onPiece(data);
    this.context.createMediaStreamSource(this.stream).connect(this.capture);
    this.capture.connect(this.context.destination);
  }

  /** While muted, it hears silence. */
  mute(muted) {
    for (const track of this.stream.getTracks()) track.enabled = !muted;
  }

  close() {
    for (const track of this.stream.getTracks()) track.stop(); // puts the microphone's light out
    if (this.capture) this.capture.port.onmessage = null;
    this.context.close();
  }
}
