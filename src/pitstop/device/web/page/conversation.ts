/** The conversation: who said what, what it cost, and the swaps in between. */

import type { Message } from "../engine/engine.js";
import type { Answered } from "./client.js";
import { byId, element, milliseconds } from "./elements.js";

const SENTENCE = /^[\s\S]*?[.!?…:]\s|^[\s\S]*?\n/; // what is read aloud at once
const NEAR = 40; // pixels from the end that count as being there

/** An answer while it comes in. */
export interface Turn {
  piece(text: string): void;
  done(answered: Answered, swapped: boolean): void;
  failed(sentence: string): void;
}

export class Conversation {
  readonly name = crypto.randomUUID(); // under which the engine keeps what it has read of it
  #messages: Message[] = [];
  readonly #list = byId<HTMLOListElement>("conversation");
  readonly #spoken = byId("spoken");

  /** Begin; an earlier one is forgotten. */
  constructor() {
    this.#list.replaceChildren();
    this.#spoken.textContent = "";
  }

  get messages(): Message[] {
    return [...this.#messages];
  }

  /** Show what the person wrote, and a place for the answer. */
  begin(question: string, model: string): Turn {
    this.#messages.push({ role: "user", content: question });
    const text = element("p", { className: "text" });
    const cost = element("p", { className: "cost" });
    const turn = element("li", { className: "turn answer" }, element("p", { className: "who" }, model), text, cost);
    turn.setAttribute("aria-busy", "true");
    const mine = element("p", { className: "text" }, question);
    const you = element("p", { className: "who" }, "You");
    this.#list.append(element("li", { className: "turn user" }, you, mine), turn);
    this.#scroll();
    this.#spoken.textContent = "";
    return this.#turn(turn, text, cost, `${model}: `);
  }

  #turn(turn: HTMLElement, text: HTMLElement, cost: HTMLElement, opening: string): Turn {
    let unspoken = opening;
    const end = (words: string) => {
      const following = this.#atEnd();
      cost.textContent = words;
      turn.setAttribute("aria-busy", "false");
      this.#speak(unspoken);
      if (following) this.#scroll();
    };
    return {
      piece: (piece) => {
        const following = this.#atEnd();
        text.append(piece);
        unspoken = this.#speakSentences(unspoken + piece);
        if (following) this.#scroll();
      },
      done: (answered, swapped) => {
        this.#messages.push({ role: "assistant", content: text.textContent ?? "" });
        end(describe(answered, swapped));
      },
      failed: (sentence) => {
        this.#messages.pop(); // it may be asked again
        unspoken += sentence;
        end(sentence);
      },
    };
  }

  /** Read whole sentences aloud and return what is left: single tokens would be noise in a screen reader. */
  #speakSentences(text: string): string {
    for (let sentence = SENTENCE.exec(text); sentence !== null; sentence = SENTENCE.exec(text)) {
      this.#speak(sentence[0]);
      text = text.slice(sentence[0].length);
    }
    return text;
  }

  #speak(text: string): void {
    if (text.trim() !== "") this.#spoken.append(element("span", {}, text));
  }

  /** Whether the end is in view: who has scrolled up to read is left there. */
  #atEnd(): boolean {
    return this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < NEAR;
  }

  #scroll(): void {
    this.#list.scrollTop = this.#list.scrollHeight;
  }
}

/** What an answer cost, in one line. */
function describe({ usage }: Answered, swapped: boolean): string {
  const first = milliseconds(usage.firstTokenSeconds);
  const parts = [swapped ? `swapped, first token after ${first}` : `first token after ${first}`];
  if (usage.decodeSeconds > 0 && usage.completionTokens > 1) {
    parts.push(`${((usage.completionTokens - 1) / usage.decodeSeconds).toFixed(1)} tokens/s`);
  }
  parts.push(`${usage.completionTokens} tokens`);
  if (usage.reusedTokens > 0) parts.push(`${usage.reusedTokens} of ${usage.promptTokens} read before`);
  if (usage.finishReason === "cancelled") parts.push("stopped");
  if (usage.finishReason === "length") parts.push("cut at its longest");
  return parts.join(" · ");
}
