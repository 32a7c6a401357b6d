/** The only way the store reads and changes the browser's private file system, always from a worker. */

import type { Bytes } from "../trust/canonical.js";
import { DeviceError } from "../trust/errors.js";

/** What TypeScript's library leaves out: only workers have it. */
interface Access {
  write(data: Uint8Array, options: { at: number }): number;
  truncate(size: number): void;
  flush(): void;
  close(): void;
}
type Handle = FileSystemFileHandle & {
  createSyncAccessHandle(): Promise<Access>;
  move(folder: FileSystemDirectoryHandle, name: string): Promise<void>;
};

/** Files of one folder of the store. Everything may throw a DeviceError: storage. */
export class Files {
  constructor(private folder: FileSystemDirectoryHandle) {}

  static async within(parent: FileSystemDirectoryHandle, name: string): Promise<Files> {
    return new Files(await translated(name, () => parent.getDirectoryHandle(name, { create: true })));
  }

  /** The names of all files. */
  async names(): Promise<string[]> {
    return translated("the folder", async () => {
      const names = [];
      for await (const name of this.folder.keys()) names.push(name);
      return names.sort();
    });
  }

  /** A file; null if there is none. */
  async handle(name: string): Promise<FileSystemFileHandle | null> {
    return translated(name, async () => {
      try {
        return await this.folder.getFileHandle(name);
      } catch (error) {
        if ((error as Error).name === "NotFoundError") return null;
        throw error;
      }
    });
  }

  /** Bytes of a file; null if there is none. */
  async size(name: string): Promise<number | null> {
    const handle = await this.handle(name);
    return handle && (await translated(name, () => handle.getFile())).size;
  }

  /** What a file holds, or a part of it; null if there is none. */
  async read(name: string, start = 0, end = Infinity): Promise<Bytes | null> {
    const handle = await this.handle(name);
    if (handle === null) return null;
    return translated(name, async () => {
      const file = await handle.getFile();
      return new Uint8Array(await file.slice(start, Math.min(end, file.size)).arrayBuffer());
    });
  }

  /** Make a file hold exactly these bytes; in between it may hold anything. */
  async write(name: string, data: Bytes): Promise<void> {
    await this.writeAt(name, 0, data);
  }

  /** Let a file go on with these bytes from there, and end with them, durably. */
  async writeAt(name: string, start: number, data: Bytes): Promise<void> {
    await this.change(name, (access) => {
      access.truncate(start);
      for (let done = 0; done < data.length; ) {
        const written = access.write(data.subarray(done), { at: start + done });
        if (written <= 0) throw new DOMException("no room for more bytes", "QuotaExceededError");
        done += written;
      }
      access.flush();
    });
  }

  /** Forget the bytes of a file from there on. */
  async truncate(name: string, size: number): Promise<void> {
    await this.change(name, (access) => access.truncate(size));
  }

  /** Give a file its place in another folder, at once. */
  async move(name: string, to: Files): Promise<void> {
    await translated(name, async () => (await this.open(name)).move(to.folder, name));
  }

  /** Remove a file, if it is there and nobody has it open. */
  async remove(name: string): Promise<void> {
    await translated(name, async () => {
      try {
        await this.folder.removeEntry(name);
      } catch (error) {
        const { name: reason } = error as Error;
        if (reason !== "NotFoundError" && reason !== "NoModificationAllowedError") throw error;
      }
    });
  }

  async removeExcept(names: Set<string>): Promise<void> {
    for (const name of await this.names()) if (!names.has(name)) await this.remove(name);
  }

  private async open(name: string): Promise<Handle> {
    return (await this.folder.getFileHandle(name, { create: true })) as Handle;
  }

  private async change(name: string, change: (access: Access) => void): Promise<void> {
    await translated(name, async () => {
      const access = await (await this.open(name)).createSyncAccessHandle();
      try {
        change(access);
      } finally {
        access.close();
      }
    });
  }
}

async function translated<Result>(name: string, action: () => Promise<Result>): Promise<Result> {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    const cause = { cause: error };
    if (error.name === "QuotaExceededError") {
      const what = "The browser's storage is full: free some space on this phone and update again; what was fetched is kept";
      throw new DeviceError("storage", what, cause);
    }
    throw new DeviceError("storage", `The browser's storage refused ${name}: ${error.message}`, cause);
  }
}
