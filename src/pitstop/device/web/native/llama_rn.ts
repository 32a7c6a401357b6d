/**
 * The engine of a native app: llama.rn. It has one state for all conversations, which survives a change of adapters and
 * would be answered from; so every swap clears it, and reads the conversation anew.
 */

import type { CompletionParams, ContextParams, LlamaContext, NativeCompletionResult } from "llama.rn";

import { EngineError, stopTexts, Turns, withSystem } from "../engine/engine.js";
import type { Ask, Engine, Prompting, Usage } from "../engine/engine.js";

/** A file of the app's own store. */
export interface NativeFile {
  sha256: string;
  path: string;
  baseSha256?: string; // of an adapter: the base its manifest names; llama.rn cannot read it from the file
}

/** llama.rn's `initLlama`. */
export type OpenContext = (params: ContextParams) => Promise<LlamaContext>;

interface Base {
  context: LlamaContext;
  sha256: string;
  prompting: Prompting;
}

interface Adapter {
  path: string;
  scale: number;
  prompting: Prompting;
}

export class NativeEngine implements Engine<NativeFile> {
  readonly #open: OpenContext;
  readonly #adapters = new Map<string, Adapter>();
  readonly #turns = new Turns();
  #base: Base | null = null;
  #applied: Adapter | null | "unknown" = null; // what llama.rn computes under now

  constructor(open: OpenContext) {
    this.#open = open;
  }

  memory(): number {
    return this.#base?.context.model.size ?? 0;
  }

  async load(base: NativeFile, prompting: Prompting, contextLength: number): Promise<void> {
    await this.#alone(async () => {
      await this.#unload();
      const context = await told("the base cannot be loaded", this.#open({ model: base.path, n_ctx: contextLength }));
      this.#base = { context, sha256: base.sha256, prompting };
      this.#applied = null;
    });
  }

  async addAdapter(name: string, file: NativeFile, scale: number, prompting: Prompting): Promise<void> {
    await this.#alone(async () => {
      const base = this.#loaded();
      if (this.#adapters.has(name)) throw new EngineError(`an adapter ${name} is loaded already: remove it first`);
      if (!Number.isFinite(scale)) throw new EngineError(`the scale of ${name} must be a finite number, not ${scale}`);
      if (file.baseSha256 !== base.sha256) {
        const bases = `the base ${file.baseSha256?.slice(0, 12)}…, the base here is ${base.sha256.slice(0, 12)}…`;
        throw new EngineError(`the adapter ${name} was trained on ${bases}: install the base it was trained on`);
      }
      const adapter = { path: file.path, scale, prompting };
      await told(`the adapter ${name} cannot be loaded`, this.#apply(base, adapter));
      this.#adapters.set(name, adapter);
    });
  }

  async removeAdapter(name: string): Promise<void> {
    await this.#alone(async () => {
      const adapter = this.#adapter(name);
      const base = this.#loaded();
      if (this.#applied === adapter) await told(`the adapter ${name} cannot be removed`, this.#apply(base, null));
      this.#adapters.delete(name);
    });
  }

  async *generate(ask: Ask): AsyncGenerator<string, Usage> {
    const begun = performance.now();
    const release = await this.#turns.take();
    try {
      const base = this.#loaded();
      const adapter = ask.adapter === null ? null : this.#adapter(ask.adapter);
      const params = completion(adapter?.prompting ?? base.prompting, ask);
      if (this.#applied !== adapter) await told("the adapter cannot be changed", this.#apply(base, adapter));
      const pieces = new Pieces();
      const stop = () => void base.context.stopCompletion();
      const working = base.context.completion(params, (data) => pieces.add(data.token)).finally(() => pieces.end());
      working.catch(() => {}); // its failure is told below, when all pieces are read
      ask.signal?.addEventListener("abort", stop);
      try {
        if (ask.signal?.aborted) stop();
        yield* pieces;
        return usage(await told("no answer", working), begun, pieces);
      } finally {
        // Also when the reader left in the middle: the next request must find the context at rest.
        ask.signal?.removeEventListener("abort", stop);
        if (!pieces.ended) stop();
        await working.then(null, () => {});
      }
    } finally {
      release();
    }
  }

  async close(): Promise<void> {
    await this.#alone(() => this.#unload());
  }

  async #unload(): Promise<void> {
    this.#adapters.clear();
    const base = this.#base;
    this.#base = null;
    await base?.context.release();
  }

  /** Compute under an adapter, or the plain base, from now on; nothing of what was computed before is left. */
  async #apply(base: Base, adapter: Adapter | null): Promise<void> {
    this.#applied = "unknown";
    if (adapter === null) await base.context.removeLoraAdapters();
    else await base.context.applyLoraAdapters([{ path: adapter.path, scaled: adapter.scale }]);
    await base.context.clearCache(false);
    this.#applied = adapter;
  }

  #loaded(): Base {
    if (this.#base === null) throw new EngineError("no base is loaded");
    return this.#base;
  }

  #adapter(name: string): Adapter {
    const adapter = this.#adapters.get(name);
    if (adapter !== undefined) return adapter;
    const have = [...this.#adapters.keys()].join(", ") || "none";
    throw new EngineError(`no adapter ${name} is loaded; there are: ${have}`);
  }

  async #alone(call: () => Promise<void>): Promise<void> {
    const release = await this.#turns.take();
    try {
      await call();
    } finally {
      release();
    }
  }
}

/** Pieces as they come from a callback, to be read one after the other. */
class Pieces implements AsyncIterable<string> {
  ended = false;
  first = 0; // when they began and ended to come
  last = 0;
  #waiting: string[] = [];
  #wake = () => {};

  add(text: string): void {
    this.last = performance.now();
    this.first ||= this.last;
    this.#waiting.push(text);
    this.#wake();
  }

  end(): void {
    this.ended = true;
    this.#wake();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<string, void> {
    for (;;) {
      while (this.#waiting.length > 0) yield this.#waiting.shift()!;
      if (this.ended) return;
      await new Promise<void>((wake) => (this.#wake = wake));
    }
  }
}

function completion(prompting: Prompting, ask: Ask): CompletionParams {
  const format = { type: "json_schema", json_schema: { schema: ask.schema ?? {} } } as const;
  return {
    messages: withSystem(prompting, ask.messages),
    chat_template: prompting.chat_template,
    jinja: true,
    add_generation_prompt: true,
    force_pure_content: true,
    n_predict: ask.maxTokens,
    temperature: ask.temperature ?? 0,
    top_k: 0,
    top_p: 1,
    min_p: 0,
    penalty_repeat: 1,
    seed: ask.seed ?? 0,
    stop: stopTexts(prompting, ask),
    ...(ask.schema && { response_format: format }),
  };
}

function usage(result: NativeCompletionResult, begun: number, pieces: Pieces): Usage {
  const limited = result.stopped_limit > 0 || result.context_full;
  return {
    promptTokens: result.tokens_evaluated,
    reusedTokens: result.tokens_evaluated - result.timings.prompt_n,
    completionTokens: result.tokens_predicted,
    firstTokenSeconds: Math.max(0, pieces.first - begun) / 1000,
    decodeSeconds: (pieces.last - pieces.first) / 1000,
    finishReason: result.interrupted ? "cancelled" : limited ? "length" : "stop",
  };
}

/** Wait for llama.rn, and say in a sentence what failed. */
async function told<Result>(what: string, work: Promise<Result>): Promise<Result> {
  try {
    return await work;
  } catch (error) {
    throw new EngineError(`${what}: ${error instanceof Error ? error.message : String(error)}`);
  }
}
