/** What becomes of an answer's tokens: whole characters, stop texts, an end. The Python device does the same. */

/** Passes text on as far as no stop text can begin in it; the one that is complete first ends the answer. */
export class StopText {
  stopped = false;
  #held = ""; // the end of the text, where a stop text may have begun

  constructor(private readonly stops: readonly string[]) {}

  /** Take more text and return what is certain now; nothing after a stop. */
  feed(text: string): string {
    if (this.stopped) return "";
    const held = this.#held + text;
    const found = this.stops.map((stop) => ({ begin: held.indexOf(stop), size: stop.length }));
    const first = found
      .filter((one) => one.begin >= 0)
      .sort((one, other) => one.begin + one.size - other.begin - other.size || one.begin - other.begin)[0];
    if (first !== undefined) {
      this.stopped = true;
      this.#held = "";
      return held.slice(0, first.begin);
    }
    const keep = Math.max(0, ...this.stops.map((stop) => overlap(held, stop)));
    this.#held = held.slice(held.length - keep);
    return held.slice(0, held.length - keep);
  }

  /** Return what was held back: no stop text will come. */
  finish(): string {
    const held = this.#held;
    this.#held = "";
    return held;
  }
}

/** How many characters at the end of the text are a beginning of the stop text. */
function overlap(text: string, stop: string): number {
  let size = Math.min(text.length, stop.length - 1);
  while (size > 0 && !text.endsWith(stop.slice(0, size))) size--;
  return size;
}

/** Turns the tokens of one answer into its pieces, and says when and why it ended. */
export class Wording {
  finish: "stop" | "length" | null;
  completionTokens = 0;
  #stop: StopText;
  #decoder = new TextDecoder(); // a character is passed on when all its bytes are there

  /** `limit`: tokens the answer may have, the end-of-generation token included. */
  constructor(
    private readonly limit: number,
    stops: readonly string[],
  ) {
    this.finish = limit < 1 ? "length" : null;
    this.#stop = new StopText(stops);
  }

  /** Take the bytes of the next token, or null if it ends the answer; return the text that became certain with it. */
  take(bytes: Uint8Array | null): string {
    this.completionTokens++;
    let text = bytes === null ? "" : this.#stop.feed(this.#decoder.decode(bytes, { stream: true }));
    if (bytes === null || this.#stop.stopped) this.finish = "stop";
    else if (this.completionTokens === this.limit) this.finish = "length";
    if (this.finish !== null) {
      text += this.#stop.feed(this.#decoder.decode());
      if (this.#stop.stopped) this.finish = "stop";
      text += this.#stop.finish();
    }
    return text;
  }
}
