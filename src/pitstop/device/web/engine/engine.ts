/** The one interface to run a base with adapters on a phone; the page's engine and a native app's are behind it. */

/** How text becomes the model's prompt, and where an answer ends: the manifest's `prompting`. */
export interface Prompting {
  chat_template: string; // jinja2
  bos_token: string;
  eos_token: string;
  stop?: string[]; // texts that end an answer besides the end-of-generation tokens
  system?: string | null; // system message the adapter was trained with
}

export interface Message {
  role: string;
  content: string;
}

/** A file of the store; the bytes stay where they are, the engine reads them in place. */
export interface ModelFile {
  sha256: string;
  handle: FileSystemFileHandle;
}

export interface Ask {
  adapter: string | null; // null: the plain base, said so
  conversation: string;
  messages: Message[];
  maxTokens: number;
  temperature?: number; // 0, the default: the likeliest token
  seed?: number;
  stop?: string[];
  schema?: object; // JSON schema: the answer is JSON that follows it
  signal?: AbortSignal;
}

export interface Usage {
  promptTokens: number;
  reusedTokens: number; // of the prompt, found in this conversation's own state
  completionTokens: number;
  firstTokenSeconds: number; // from the call to the first token
  decodeSeconds: number; // from the first token to the last one
  finishReason: "stop" | "length" | "cancelled";
}

/** Why an engine will not do something: the message is a sentence for the person who holds the phone. */
export class EngineError extends Error {
  override name = "EngineError";
}

/**
 * A base in memory with adapters beside it. A request names its adapter, nothing is active globally: a swap is the next
 * request that names another one. One request is answered at a time; others wait for their turn.
 */
export interface Engine<File = ModelFile> {
  /** Load the base; any earlier one goes, with its adapters. Throws an EngineError. */
  load(base: File, prompting: Prompting, contextLength: number): Promise<void>;
  /** Load an adapter of this base under a name; all or nothing. Throws an EngineError. */
  addAdapter(name: string, file: File, scale: number, prompting: Prompting): Promise<void>;
  /** Forget an adapter and all that was computed under it. Throws an EngineError if there is none. */
  removeAdapter(name: string): Promise<void>;
  /** Answer piece by piece; what is returned in the end says what it cost. Throws an EngineError. */
  generate(ask: Ask): AsyncGenerator<string, Usage>;
  /** Bytes the engine holds in memory now. */
  memory(): number;
  /** Give back memory and files; the engine is of no use afterwards. */
  close(): Promise<void>;
}

/** Put the system message an adapter was trained with before the others, unless one is given. */
export function withSystem(prompting: Prompting, messages: readonly Message[]): Message[] {
  if (prompting.system == null || messages.some((message) => message.role === "system")) return [...messages];
  return [{ role: "system", content: prompting.system }, ...messages];
}

/** Return all texts that end an answer. Throws an EngineError. */
export function stopTexts(prompting: Prompting, ask: Ask): string[] {
  const stops = [...(prompting.stop ?? []), ...(ask.stop ?? [])];
  if (stops.includes("")) throw new EngineError("a stop text must not be empty");
  return stops;
}

/** Requests one after the other: each waits until those before it are done. */
export class Turns {
  #last: Promise<void> = Promise.resolve();

  /** Wait for the turn; call what is returned to let the next one in. */
  async take(): Promise<() => void> {
    const before = this.#last;
    let release = () => {};
    this.#last = new Promise((done) => (release = done));
    await before;
    return release;
  }
}
