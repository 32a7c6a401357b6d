/**
 * Which sequence a conversation is in, and what it holds: bookkeeping only, no model.
 *
 * State belongs to (adapter as it was loaded, conversation): nothing that was computed under one adapter is ever
 * continued under another one, not even a beginning that both have in common.
 */

export interface Sequence {
  readonly number: number;
  adapter: number | null; // the load of an adapter it was computed under; null: the plain base
  conversation: string | null; // null: there is nothing in it
  tokens: number[]; // exactly those whose state it holds
  used: number;
}

export class Conversations {
  readonly #all: Sequence[];
  #requests = 0;

  constructor(count: number) {
    const empty = { adapter: null, conversation: null, used: 0 };
    this.#all = Array.from({ length: count }, (_, number) => ({ ...empty, number, tokens: [] }));
  }

  /** Return the sequence of a conversation under an adapter; the least recently used one, emptied, if it has none. */
  take(adapter: number | null, conversation: string): Sequence {
    let sequence = this.#all.find((one) => one.conversation === conversation && one.adapter === adapter);
    if (sequence === undefined) {
      sequence = this.#all.reduce((oldest, one) => (one.used < oldest.used ? one : oldest));
      sequence.tokens = [];
      sequence.adapter = adapter;
      sequence.conversation = conversation;
    }
    sequence.used = ++this.#requests;
    return sequence;
  }

  /** Forget what a sequence holds: its state is not what its tokens say any more. */
  forget(sequence: Sequence): void {
    sequence.tokens = [];
    sequence.conversation = null;
    sequence.used = 0;
  }

  /** Forget all that was computed under an adapter. */
  forgetAdapter(adapter: number): void {
    this.#all.filter((one) => one.adapter === adapter && one.conversation !== null).forEach((one) => this.forget(one));
  }
}

/** How many tokens of a prompt a sequence can lend: its last one is evaluated anyway, for what comes next. */
export function common(held: readonly number[], prompt: readonly number[]): number {
  const most = Math.min(held.length, prompt.length - 1);
  let count = 0;
  while (count < most && held[count] === prompt[count]) count++;
  return count;
}
