/** The browser's private file system over real files, which can end after any of its steps. */

import { openAsBlob } from "node:fs";
import * as fs from "node:fs";
import * as path from "node:path";

/** The worker was killed. */
export class Killed extends Error {}

/** What becomes of bytes that were written and not flushed. */
export type Unflushed = "kept" | "lost" | "half";

/** Counts the steps that change something, and ends all of them after the one of a number. */
export class Life {
  steps = 0;
  room = Infinity; // bytes the browser still grants
  private unflushed = new Map<string, Buffer>(); // what was flushed of a file before

  constructor(
    private last = Infinity,
    private fate: Unflushed = "kept",
  ) {}

  /** One step; the last one is done by half. */
  step(what: () => void, half?: () => void): void {
    if (this.steps > this.last) throw new Killed();
    if (this.steps++ < this.last) return what();
    half?.();
    this.die();
    throw new Killed();
  }

  written(file: string): void {
    if (!this.unflushed.has(file)) this.unflushed.set(file, fs.existsSync(file) ? fs.readFileSync(file) : Buffer.alloc(0));
  }

  flushed(file: string): void {
    this.unflushed.delete(file);
  }

  moved(file: string, to: string): void {
    const before = this.unflushed.get(file);
    this.unflushed.delete(file);
    if (before) this.unflushed.set(to, before);
  }

  /** End now: what was not flushed meets its fate. */
  die(): void {
    if (this.fate === "kept") return;
    for (const [file, before] of this.unflushed) {
      if (!fs.existsSync(file)) continue;
      const now = fs.readFileSync(file);
      const half = now.length > before.length ? now.subarray(0, (now.length + before.length) >> 1) : now.subarray(0, now.length >> 1);
      fs.writeFileSync(file, this.fate === "lost" ? before : half);
    }
  }
}

/** A way to write in an unsafe order, to see that the tests find it. */
export interface Faults {
  neverFlushes?: string; // name of the folder whose files it does not flush
  oneCopy?: boolean; // state.b is state.a
}

function missing(name: string): DOMException {
  return new DOMException(`there is no ${name}`, "NotFoundError");
}

class NodeFile {
  readonly kind = "file";

  constructor(
    private folder: NodeFolder,
    public name: string,
  ) {}

  get path(): string {
    return path.join(this.folder.path, this.name);
  }

  getFile(): Promise<Blob> {
    return fs.existsSync(this.path) ? openAsBlob(this.path) : Promise.reject(missing(this.name));
  }

  async createSyncAccessHandle(): Promise<object> {
    const { life, faults } = this.folder;
    const file = this.path;
    const descriptor = fs.openSync(file, "r+");
    return {
      write: (data: Uint8Array, { at }: { at: number }): number => {
        const fits = data.subarray(0, Math.min(data.length, life.room));
        life.room -= fits.length;
        life.written(file);
        const put = (part: Uint8Array): void => void fs.writeSync(descriptor, part, 0, part.length, at);
        life.step(
          () => put(fits),
          () => put(fits.subarray(0, fits.length >> 1)),
        );
        return fits.length;
      },
      truncate: (size: number): void => {
        life.written(file);
        life.step(() => fs.ftruncateSync(descriptor, size));
      },
      flush: (): void => life.step(() => faults.neverFlushes === this.folder.name || life.flushed(file)),
      close: (): void => fs.closeSync(descriptor),
    };
  }

  async move(to: NodeFolder, name: string): Promise<void> {
    const [from, target] = [this.path, path.join(to.path, name)];
    this.folder.life.step(() => {
      fs.renameSync(from, target);
      this.folder.life.moved(from, target);
    });
  }
}

export class NodeFolder {
  readonly kind = "directory";

  constructor(
    readonly path: string,
    readonly life = new Life(),
    readonly faults: Faults = {},
  ) {
    fs.mkdirSync(path, { recursive: true });
  }

  get name(): string {
    return path.basename(this.path);
  }

  /** What the store takes it for. */
  get handle(): FileSystemDirectoryHandle {
    return this as unknown as FileSystemDirectoryHandle;
  }

  async getDirectoryHandle(name: string, options?: FileSystemGetDirectoryOptions): Promise<NodeFolder> {
    const folder = path.join(this.path, name);
    if (!fs.existsSync(folder) && !options?.create) throw missing(name);
    return new NodeFolder(folder, this.life, this.faults);
  }

  async getFileHandle(name: string, options?: FileSystemGetFileOptions): Promise<NodeFile> {
    const file = new NodeFile(this, this.faults.oneCopy && name === "state.b" ? "state.a" : name);
    if (!fs.existsSync(file.path)) {
      if (!options?.create) throw missing(name);
      this.life.step(() => fs.writeFileSync(file.path, ""));
    }
    return file;
  }

  async removeEntry(name: string): Promise<void> {
    const file = path.join(this.path, name);
    if (!fs.existsSync(file)) throw missing(name);
    this.life.step(() => fs.unlinkSync(file));
  }

  async *keys(): AsyncGenerator<string> {
    yield* fs.readdirSync(this.path);
  }
}

/** Web locks of one browser. */
export class Locks {
  private held = new Set<string>();

  readonly request = (async (name: string, _: LockOptions, work: (lock: Lock | null) => Promise<void>) => {
    if (this.held.has(name)) return work(null);
    this.held.add(name);
    try {
      await work({ name, mode: "exclusive" });
    } finally {
      this.held.delete(name);
    }
  }) as LockManager["request"];
}
