/** The page's engine: llama.cpp as wasm, in this worker. Decoding blocks it, but messages are let in at every token. */

import { Wording } from "./answer.js";
import { common, Conversations, type Sequence } from "./conversations.js";
import { EngineError, stopTexts, Turns, withSystem } from "./engine.js";
import type { Ask, Engine, Message, ModelFile, Prompting, Usage } from "./engine.js";
import { Module, words, type Placing } from "./module.js";

const BATCH = 64; // tokens evaluated at once: more of them cost memory and are hardly faster
const MOST_THREADS = 4;
const MOST_SEQUENCES = 8;
const CONVERSATIONS = 144 * 1024 * 1024; // bytes that conversations may take together, if that is enough for one
const MEMORY_LIMIT = 2 ** 31; // what wasm32 is linked for
const TOKEN_BYTES = 256; // of one token's text, at first
const NULL = 0;

interface Base {
  sha256: string;
  prompting: Prompting;
  contextLength: number;
}

interface Adapter {
  load: number; // no two loads have the same: a name that comes again is another adapter
  pointer: number;
  scale: number;
  prompting: Prompting;
}

export type Settings = Partial<Placing>;

/** Start the engine: with threads where the page is isolated, else without. Throws an EngineError. */
export async function openEngine(settings: Settings = {}): Promise<WasmEngine> {
  const files = settings.files ?? ((name: string) => new URL(name, import.meta.url));
  const threads = settings.threads ?? usableThreads();
  return new WasmEngine(await Module.start({ threads, files, memoryLimit: settings.memoryLimit ?? MEMORY_LIMIT }));
}

function usableThreads(): number {
  if (!globalThis.crossOriginIsolated) return 1;
  return Math.max(1, Math.min(MOST_THREADS, navigator.hardwareConcurrency - 1));
}

export class WasmEngine implements Engine {
  readonly #module: Module;
  readonly #adapters = new Map<string, Adapter>();
  #base: Base | null = null;
  #conversations = new Conversations(0);
  #loads = 0;
  readonly #turns = new Turns();
  #broken: string | null = null;

  constructor(module: Module) {
    this.#module = module;
  }

  /** How many threads it computes with. */
  get threads(): number {
    return this.#module.threads;
  }

  memory(): number {
    return this.#module.size;
  }

  async load(base: ModelFile, prompting: Prompting, contextLength: number): Promise<void> {
    await this.#alone(async () => {
      this.#unload();
      const { calls } = this.#module;
      try {
        const status = await this.#module.withFile(base, (path) => calls._engine_load(path));
        if (status !== 0) throw this.#failure("the base cannot be loaded");
        const each = Math.max(calls._engine_token_bytes(), 1) * contextLength;
        const count = Math.max(1, Math.min(MOST_SEQUENCES, Math.floor(CONVERSATIONS / each)));
        const opened = calls._engine_open(contextLength, count, BATCH, this.threads);
        if (opened !== 0) throw this.#failure("the base cannot be run");
        this.#conversations = new Conversations(count);
      } catch (error) {
        if (this.#broken === null && error instanceof EngineError) calls._engine_free();
        throw error;
      }
      this.#base = { sha256: base.sha256, prompting, contextLength };
    });
  }

  async addAdapter(name: string, file: ModelFile, scale: number, prompting: Prompting): Promise<void> {
    await this.#alone(async () => {
      const base = this.#loaded();
      if (this.#adapters.has(name)) throw new EngineError(`an adapter ${name} is loaded already: remove it first`);
      if (!Number.isFinite(scale)) throw new EngineError(`the scale of ${name} must be a finite number, not ${scale}`);
      const { calls } = this.#module;
      const pointer = await this.#module.withFile(file, (path) => calls._adapter_load(path));
      if (pointer === NULL) throw this.#failure(`the adapter ${name} cannot be loaded`);
      const problem = this.#misfit(name, pointer, base);
      if (problem !== null) {
        calls._adapter_free(pointer);
        throw new EngineError(problem);
      }
      this.#adapters.set(name, { load: ++this.#loads, pointer, scale, prompting });
    });
  }

  /** Why an adapter must not run on this base; null if it may. */
  #misfit(name: string, pointer: number, base: Base): string | null {
    const trainedOn = this.#module.text(this.#module.calls._adapter_base(pointer));
    if (trainedOn === "") return `the adapter ${name} does not say which base file it was trained on: export it again`;
    if (trainedOn !== base.sha256) {
      const bases = `the base ${trainedOn.slice(0, 12)}…, the base here is ${base.sha256.slice(0, 12)}…`;
      return `the adapter ${name} was trained on ${bases}: install the base it was trained on`;
    }
    if (this.#module.calls._adapter_is_activated(pointer)) {
      return `the adapter ${name} is an activated LoRA, which the page's engine cannot run: ask the publisher for a plain one`;
    }
    return null;
  }

  async removeAdapter(name: string): Promise<void> {
    await this.#alone(async () => {
      const adapter = this.#adapter(name);
      this.#adapters.delete(name);
      this.#conversations.forgetAdapter(adapter.load);
      this.#module.calls._adapter_free(adapter.pointer);
    });
  }

  async *generate(ask: Ask): AsyncGenerator<string, Usage> {
    const begun = performance.now();
    const release = await this.#take();
    let sampler = NULL;
    try {
      const adapter = ask.adapter === null ? null : this.#adapter(ask.adapter);
      const prompting = adapter?.prompting ?? this.#loaded().prompting;
      const prompt = this.tokenize(this.render(prompting, ask.messages));
      const wording = this.#wording(ask, prompting, prompt.length);
      sampler = this.#sampler(ask);
      const sequence = this.#conversations.take(adapter?.load ?? null, ask.conversation);
      const reused = this.#keep(sequence, prompt);
      const seconds = { first: 0, last: 0 };
      let waiting = prompt.slice(reused);
      while (wording.finish === null && !(await interrupted(ask.signal))) {
        this.#evaluate(sequence, adapter, waiting.splice(0, BATCH));
        if (waiting.length > 0) continue;
        const token = this.#choose(sampler);
        waiting = [token];
        const text = wording.take(this.#module.calls._token_ends(token) ? null : this.#bytes(token));
        seconds.last = (performance.now() - begun) / 1000;
        seconds.first ||= seconds.last;
        if (text !== "") yield text;
      }
      return {
        promptTokens: prompt.length,
        reusedTokens: reused,
        completionTokens: wording.completionTokens,
        firstTokenSeconds: seconds.first,
        decodeSeconds: seconds.last - seconds.first,
        finishReason: wording.finish ?? "cancelled",
      };
    } catch (error) {
      throw this.#told(error);
    } finally {
      if (sampler !== NULL && this.#broken === null) this.#module.calls._sampler_close(sampler);
      release();
    }
  }

  /** Return the logits of what follows the tokens, in a conversation that may hold a beginning of them. */
  async logits(adapter: string | null, conversation: string, tokens: readonly number[]): Promise<Float32Array> {
    return this.#alone(async () => {
      const used = adapter === null ? null : this.#adapter(adapter);
      const sequence = this.#conversations.take(used?.load ?? null, conversation);
      const waiting = tokens.slice(this.#keep(sequence, tokens));
      while (waiting.length > 0) this.#evaluate(sequence, used, waiting.splice(0, BATCH));
      return this.#module.floats(this.#module.calls._sequence_logits(), this.#module.calls._engine_vocabulary());
    });
  }

  /** Return the prompt of messages, by the template of the base or adapter they are for. */
  render(prompting: Prompting, messages: readonly Message[]): string {
    const names = {
      messages: withSystem(prompting, messages),
      add_generation_prompt: true,
      bos_token: prompting.bos_token,
      eos_token: prompting.eos_token,
    };
    const rendered = this.#module.withText(prompting.chat_template, (source) =>
      this.#module.withText(JSON.stringify(names), (values) =>
        this.#module.caught(() => this.#module.calls._template_render(source, values)),
      ),
    );
    if (rendered === NULL) throw this.#failure("the chat template refuses these messages");
    return this.#module.text(rendered);
  }

  /** Return the tokens of a text; special tokens written in it count as such, none is added. */
  tokenize(text: string): number[] {
    const { calls } = this.#module;
    this.#loaded();
    return this.#module.withText(text, (pointer, size) =>
      this.#module.withRoom(4 * (size + 8), (tokens) => {
        const count = calls._text_tokens(pointer, size, tokens, size + 8);
        if (count < 0) throw this.#failure("the text cannot be tokenized");
        return this.#module.tokens(tokens, count);
      }),
    );
  }

  async close(): Promise<void> {
    await this.#take();
    this.#broken ??= "it was closed";
    this.#module.close();
  }

  #wording(ask: Ask, prompting: Prompting, promptTokens: number): Wording {
    const room = this.#loaded().contextLength - promptTokens;
    if (promptTokens === 0) throw new EngineError("the prompt is empty: write a message");
    if (room < 1) {
      const length = this.#loaded().contextLength;
      throw new EngineError(`the conversation has ${promptTokens} tokens, it may have ${length}: begin a new one`);
    }
    return new Wording(Math.min(room, ask.maxTokens), stopTexts(prompting, ask));
  }

  /** Make what chooses the tokens of one answer. */
  #sampler(ask: Ask): number {
    const temperature = ask.temperature ?? 0;
    if (!(temperature >= 0 && temperature < Infinity)) {
      throw new EngineError(`temperature must be 0 or more, not ${temperature}`);
    }
    const { calls } = this.#module;
    let rules = "";
    if (ask.schema !== undefined) {
      const made = this.#module.withText(JSON.stringify(ask.schema), (from) => calls._schema_grammar(from));
      if (made === NULL) throw this.#failure("the JSON schema cannot be followed");
      rules = this.#module.text(made);
    }
    const seed = (ask.seed ?? 0) >>> 0;
    const sampler = this.#module.withText(rules, (from) => calls._sampler_open(temperature, seed, from));
    if (sampler === NULL) throw this.#failure("the JSON schema cannot be followed");
    return sampler;
  }

  #choose(sampler: number): number {
    const token = this.#module.calls._sampler_choose(sampler);
    if (token < 0) throw this.#failure("no token can be chosen");
    return token;
  }

  /** Shorten a sequence to what it has in common with a prompt; return how many tokens are left. */
  #keep(sequence: Sequence, prompt: readonly number[]): number {
    const kept = this.#module.calls._sequence_cut(sequence.number, common(sequence.tokens, prompt));
    sequence.tokens.length = kept;
    return kept;
  }

  #evaluate(sequence: Sequence, adapter: Adapter | null, tokens: readonly number[]): void {
    const { calls } = this.#module;
    const [pointer, scale] = adapter === null ? [NULL, 0] : [adapter.pointer, adapter.scale];
    const at = sequence.tokens.length;
    const status = this.#module.withTokens(tokens, (first) =>
      calls._sequence_decode(pointer, scale, sequence.number, at, first, tokens.length),
    );
    if (status !== 0) {
      calls._sequence_cut(sequence.number, 0);
      this.#conversations.forget(sequence);
      throw this.#failure(`evaluating failed (${status})`);
    }
    sequence.tokens.push(...tokens);
  }

  #bytes(token: number): Uint8Array {
    const { calls } = this.#module;
    for (let room = TOKEN_BYTES; ; ) {
      const bytes = this.#module.withRoom(room, (pointer) => {
        const count = calls._token_bytes(token, pointer, room);
        return count < 0 ? -count : this.#module.bytes.slice(pointer, pointer + count);
      });
      if (typeof bytes !== "number") return bytes;
      room = bytes;
    }
  }

  #unload(): void {
    this.#adapters.clear();
    this.#base = null;
    this.#module.calls._engine_free();
  }

  #loaded(): Base {
    if (this.#base === null) throw new EngineError("no base is loaded");
    return this.#base;
  }

  #adapter(name: string): Adapter {
    const adapter = this.#adapters.get(name);
    if (adapter === undefined) {
      const have = [...this.#adapters.keys()].join(", ") || "none";
      throw new EngineError(`no adapter ${name} is loaded; there are: ${have}`);
    }
    return adapter;
  }

  /** Wait for the turn; call what is returned to let the next one in. */
  async #take(): Promise<() => void> {
    const release = await this.#turns.take();
    if (this.#broken !== null) {
      release();
      throw new EngineError(`the engine has stopped: ${this.#broken}; open the page again`);
    }
    return release;
  }

  async #alone<Result>(call: () => Promise<Result>): Promise<Result> {
    const release = await this.#take();
    try {
      return await call();
    } catch (error) {
      throw this.#told(error);
    } finally {
      release();
    }
  }

  #failure(what: string): EngineError {
    const reason = this.#module.reason();
    const memory = /alloc|memory/i.test(reason) ? "not enough memory, take a smaller model: " : "";
    return new EngineError(`${what}: ${memory}${reason}`);
  }

  /** A trap of the module leaves it in no known state: it is not called any more. */
  #told(error: unknown): unknown {
    if (!(error instanceof WebAssembly.RuntimeError)) return error;
    this.#broken = `${this.#module.reason()} (${words(error)})`;
    return new EngineError(`the engine has stopped: ${this.#broken}; open the page again`);
  }
}

const { port1, port2 } = new MessageChannel();

/** Let messages in, and tell whether one of them cancelled the request. A timer would wait 4 ms. */
async function interrupted(signal: AbortSignal | undefined): Promise<boolean> {
  await new Promise((done) => {
    port1.onmessage = done;
    port2.postMessage(null);
  });
  return signal?.aborted ?? false;
}
