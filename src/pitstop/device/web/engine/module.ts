/** The wasm module as emscripten made it: its memory, its functions, and the store's files mounted in it. */

import { EngineError, type ModelFile } from "./engine.js";

/** What of emscripten's module is used. Pointers are numbers. */
interface Exports {
  FS: {
    createFile(parent: string, name: string, properties: object, canRead: boolean, canWrite: boolean): MountedNode;
    unlink(path: string): void;
  };
  PThread?: { terminateAllThreads(): void };
  stackSave(): number;
  stackRestore(stack: number): void;
  _malloc(size: number): number;
  _free(pointer: number): void;
  _engine_reason(): number;
  _engine_free(): void;
  _engine_load(path: number): number;
  _engine_token_bytes(): number;
  _engine_open(contextLength: number, sequences: number, batch: number, threads: number): number;
  _engine_vocabulary(): number;
  _adapter_load(path: number): number;
  _adapter_free(adapter: number): void;
  _adapter_base(adapter: number): number;
  _adapter_is_activated(adapter: number): number;
  _text_tokens(words: number, size: number, tokens: number, room: number): number;
  _token_bytes(token: number, bytes: number, room: number): number;
  _token_ends(token: number): number;
  _sequence_cut(sequence: number, length: number): number;
  _sequence_decode(
    adapter: number, scale: number, sequence: number, position: number, tokens: number, count: number,
  ): number;
  _sequence_logits(): number;
  _sampler_open(temperature: number, seed: number, rules: number): number;
  _sampler_close(sampler: number): void;
  _sampler_choose(sampler: number): number;
  _schema_grammar(schema: number): number;
  _template_render(source: number, names: number): number;
}

/** A file as emscripten's file system in memory has it; its content is replaced by reads of the store's file. */
interface MountedNode {
  usedBytes: number;
  stream_ops: object;
}

/** A file of the store, open for reading; TypeScript has it in its library for workers only. */
interface OpenFile {
  read(buffer: Uint8Array, options: { at: number }): number;
  getSize(): number;
  close(): void;
}

export interface Placing {
  threads: number; // 1: the build without threads
  files: (name: string) => string | URL; // where the module's own files are
  memoryLimit: number; // bytes
}

const PAGE = 65536; // bytes of wasm memory
const INITIAL = 64 * 1024 * 1024; // as it is linked
const SMALLEST_LIMIT = 256 * 1024 * 1024;

/** A module that runs; `calls` are its functions. */
export class Module {
  private constructor(
    readonly calls: Exports,
    readonly threads: number,
    readonly limit: number,
    private readonly wasmMemory: WebAssembly.Memory,
  ) {}

  /** Start the module. Throws an EngineError where the browser cannot run it. */
  static async start(placing: Placing): Promise<Module> {
    const variant = placing.threads > 1 ? "mt" : "st";
    const memory = reserve(placing.memoryLimit, placing.threads > 1);
    const source = String(placing.files(`engine-${variant}.js`));
    try {
      const made = (await import(source)) as { default(settings: object): Promise<Exports> };
      const calls = await made.default({
        wasmMemory: memory.made,
        threads: placing.threads,
        locateFile: (name: string) => String(placing.files(name)),
        print: () => {},
        printErr: () => {},
      });
      return new Module(calls, placing.threads, memory.limit, memory.made);
    } catch (error) {
      throw new EngineError(`the engine does not start in this browser: ${words(error)}`);
    }
  }

  /** Bytes of memory in use, which never shrinks. */
  get size(): number {
    return this.wasmMemory.buffer.byteLength;
  }

  /** Memory as it is now: a view of it is void as soon as anything is allocated. */
  get bytes(): Uint8Array {
    return new Uint8Array(this.wasmMemory.buffer);
  }

  floats(pointer: number, count: number): Float32Array {
    return new Float32Array(this.wasmMemory.buffer, pointer, count).slice();
  }

  /** Text at a pointer, up to its NUL; copied, for a TextDecoder does not read shared memory. */
  text(pointer: number): string {
    const bytes = this.bytes;
    return new TextDecoder().decode(bytes.slice(pointer, bytes.indexOf(0, pointer)));
  }

  /** Call with room in memory that is given back afterwards. */
  withRoom<Result>(size: number, call: (pointer: number) => Result): Result {
    const pointer = this.calls._malloc(Math.max(size, 1));
    if (pointer === 0) throw new EngineError(this.outOfMemory(size));
    try {
      return call(pointer);
    } finally {
      this.calls._free(pointer);
    }
  }

  /** Call with a text in memory, followed by a NUL. */
  withText<Result>(text: string, call: (pointer: number, size: number) => Result): Result {
    const raw = new TextEncoder().encode(text);
    return this.withRoom(raw.length + 1, (pointer) => {
      this.bytes.set(raw, pointer);
      this.bytes[pointer + raw.length] = 0;
      return call(pointer, raw.length);
    });
  }

  withTokens<Result>(tokens: readonly number[], call: (pointer: number) => Result): Result {
    return this.withRoom(4 * tokens.length, (pointer) => {
      new Int32Array(this.wasmMemory.buffer, pointer, tokens.length).set(tokens);
      return call(pointer);
    });
  }

  tokens(pointer: number, count: number): number[] {
    return [...new Int32Array(this.wasmMemory.buffer, pointer, count)];
  }

  /** What llama.cpp said of the call that failed last. */
  reason(): string {
    return this.text(this.calls._engine_reason()).trim().replaceAll("\n", "; ") || "it gives no reason";
  }

  /** Call what throws within C++; emscripten 3.1 lets some of it through its handlers. Null then, as for the rest. */
  caught(call: () => number): number {
    const stack = this.calls.stackSave();
    try {
      return call();
    } catch (error) {
      if (!(error instanceof WebAssembly.Exception)) throw error;
      this.calls.stackRestore(stack);
      return 0;
    }
  }

  /** Call with the path of a store's file, which llama.cpp reads straight into its own memory. */
  async withFile<Result>(file: ModelFile, call: (path: number) => Result): Promise<Result> {
    const open = await openFile(file);
    const node = this.calls.FS.createFile("/", file.sha256, {}, true, false);
    try {
      node.usedBytes = open.getSize();
      if (node.usedBytes > this.limit - this.size) throw new EngineError(this.outOfMemory(node.usedBytes));
      const read = (_: object, memory: Uint8Array, offset: number, length: number, at: number) =>
        open.read(memory.subarray(offset, offset + length), { at });
      node.stream_ops = { ...node.stream_ops, read };
      return this.withText(`/${file.sha256}`, call);
    } finally {
      this.calls.FS.unlink(`/${file.sha256}`);
      open.close();
    }
  }

  /** The sentence for a file that does not fit. */
  outOfMemory(needed: number): string {
    const given = `this browser gives a page ${megabytes(this.limit)}, ${megabytes(this.size)} of them are in use`;
    return `not enough memory: ${megabytes(needed)} more are needed, ${given}; take a smaller model`;
  }

  /** End it; the memory goes when nobody holds the module. */
  close(): void {
    this.calls._engine_free();
    this.calls.PThread?.terminateAllThreads();
  }
}

/** Reserve as much address space as the browser gives, up to a limit. */
function reserve(limit: number, shared: boolean): { made: WebAssembly.Memory; limit: number } {
  for (let most = limit; ; most /= 2) {
    try {
      const made = new WebAssembly.Memory({ initial: INITIAL / PAGE, maximum: Math.floor(most / PAGE), shared });
      return { made, limit: most };
    } catch {
      if (most / 2 >= SMALLEST_LIMIT) continue;
      throw new EngineError(`not enough memory: this browser gives no ${megabytes(most)} to a page`);
    }
  }
}

async function openFile(file: ModelFile): Promise<OpenFile> {
  const handle = file.handle as FileSystemFileHandle & { createSyncAccessHandle(options: object): Promise<OpenFile> };
  try {
    return await handle.createSyncAccessHandle({ mode: "read-only" });
  } catch (error) {
    throw new EngineError(`the file ${file.sha256.slice(0, 12)}… cannot be read: ${words(error)}`);
  }
}

export function megabytes(bytes: number): string {
  return `${Math.ceil(bytes / 1e6)} MB`;
}

export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
