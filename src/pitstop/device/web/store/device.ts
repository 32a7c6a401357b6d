/** A phone as a device: what a channel offers, verified, stored, tried, confirmed or rolled back. */

import { DeviceError } from "../trust/errors.js";
import { begin, confirm, install, rollBack, untried } from "./activation.js";
import { Repository } from "./download.js";
import { checkAdapter } from "./gate.js";
import { readGguf } from "./gguf.js";
import { artifactOf } from "./manifest.js";
import type { Bundle } from "./manifest.js";
import { freshUntil, offered } from "./offer.js";
import { Store, artifactsOf } from "./store.js";
import type { Release } from "./store.js";

export { DeviceError } from "../trust/errors.js";
export type { Kind } from "../trust/errors.js";
export type { Artifact, Bundle } from "./manifest.js";

const LOCK = "pitstop";
const RESERVE = 32 << 20; // bytes of the browser's quota that stay free
const ROOM = 224 << 20; // bytes of memory that conversations and computing take beside the files

/** A complete release in the store. */
export interface Installed {
  sha256: string;
  trial: boolean; // true: `confirm` it once it has answered, or `rollBack`
  base: Bundle;
  adapters: Bundle[];
  /** A file of it by its digest, hashed once more. */
  open(sha256: string): Promise<FileSystemFileHandle>;
}

/** What the channel offers now. */
export interface Offer {
  sha256: string;
  installed: boolean; // it is the release that serves
  base: Bundle;
  adapters: Bundle[];
  bytes: number; // still to fetch
  refusal: string | null; // why this phone will not take it, as a sentence
}

export interface Progress {
  fetched: number; // bytes of what was still to fetch
  of: number; // bytes
  what: string; // name of the file
}

export interface Status {
  good: string | null; // releases by SHA-256
  trial: string | null;
  tries: number; // left for the trial
  previous: string | null;
  bad: string[];
  counters: Record<string, number>; // the lowest each bundle may be offered with, by name
  expires: number | null; // seconds since 1970: until when the channel was last known to be fresh; later it is stale
  stored: number; // bytes of the blobs here
}

export interface Given {
  repository: string; // its address
  root: Uint8Array; // the publisher's 1.root.json, got with the page
  channel: string;
  budget: number; // bytes of memory the page may take: base, adapters, conversations
  locks?: Pick<LockManager, "request">;
  estimate?: () => Promise<StorageEstimate>;
  clock?: () => number; // seconds since 1970
}

export class Device {
  private constructor(
    private store: Store,
    private repository: Repository,
    private given: Required<Given>,
    private release: () => void,
  ) {}

  /** Take the store in a folder for this tab alone. Throws a DeviceError: busy, if another tab has it. */
  static async open(folder: FileSystemDirectoryHandle, given: Given): Promise<Device> {
    const all = {
      locks: given.locks ?? navigator.locks,
      estimate: given.estimate ?? (() => navigator.storage.estimate()),
      clock: given.clock ?? (() => Date.now() / 1000),
      ...given,
    };
    const release = await lock(all.locks);
    try {
      return new Device(await Store.open(folder), new Repository(given.repository), all, release);
    } catch (error) {
      release();
      throw error;
    }
  }

  /** Refresh the metadata and say what is offered; nothing is fetched. */
  async look(): Promise<Offer> {
    const release = await this.offered();
    const { sha256, base, adapters } = release;
    const { good } = await this.store.states.read();
    const bytes = await this.store.lacking(release);
    let refusal = null;
    try {
      await this.require(release);
    } catch (error) {
      if (!(error instanceof DeviceError)) throw error;
      refusal = error.message;
    }
    return { sha256, installed: sha256 === good && bytes === 0, base, adapters, bytes, refusal };
  }

  /** Fetch and verify what is offered and begin its trial; what serves already is returned as it is. */
  async update(progress: (made: Progress) => void, signal?: AbortSignal): Promise<Installed> {
    const release = await this.offered();
    await this.store.collectGarbage(release);
    await this.require(release);
    await this.fetch(release, progress, signal);
    await this.checkFiles(release);
    await this.store.install(release);
    const { trial } = await this.store.states.read();
    if (trial === null) return this.installed(release, false);
    const begun = await this.trial();
    if (begun) return begun;
    throw new DeviceError("refused", "What is offered did not come up on this phone in several tries: what is installed stays");
  }

  /** The release that serves; null if there is none, or the browser evicted it. */
  async active(): Promise<Installed | null> {
    const { good } = await this.store.states.read();
    return good === null ? null : this.complete(good, false);
  }

  /** Begin another try of a release whose last try was cut off; null if none is on trial, or it has no try left. */
  async trial(): Promise<Installed | null> {
    if ((await this.store.states.read()).trial === null) return null;
    const { trial } = await this.store.change(begin);
    return trial === null ? null : this.complete(trial, true);
  }

  /** Let the release on trial serve. */
  async confirm(): Promise<void> {
    await this.store.change(confirm);
    await this.store.collectGarbage();
  }

  /** Leave the release on trial, or else the one that serves for the one before it. */
  async rollBack(): Promise<void> {
    const before = await this.store.states.read();
    const { good } = rollBack(before);
    if (good && good !== before.good && !(await this.complete(good, false))) {
      throw new DeviceError("storage", "The release before this one is not complete any more: nothing was changed");
    }
    await this.store.change(rollBack);
    await this.store.collectGarbage();
  }

  /** Give back the try that was begun: it could not be made for a reason that is not the release's. */
  async untried(): Promise<void> {
    await this.store.change(untried);
  }

  async status(): Promise<Status> {
    const { counters } = await this.store.floors.read();
    const [expires, stored] = [await freshUntil(this.store), await this.store.stored()];
    return { ...(await this.store.states.read()), counters, expires, stored };
  }

  /** Let another tab have the store. */
  close(): void {
    this.release();
  }

  private offered(): Promise<Release> {
    const { root, channel, clock } = this.given;
    return offered(this.store, this.repository, root, channel, clock());
  }

  /** Refuse before anything is fetched what this phone does not run or cannot hold. */
  private async require(release: Release): Promise<void> {
    for (const { format, role, name } of artifactsOf(release)) {
      if (format !== "gguf" || role === "merged") {
        const what = role === "merged" ? "is a merged model" : `is ${format}`;
        throw new DeviceError("refused", `${name} ${what}; a phone runs GGUF bases with attached adapters: ask the publisher`);
      }
    }
    install(await this.store.states.read(), release.sha256); // a bad release is refused before it is fetched
    const held = artifactsOf(release).reduce((sum, { size }) => sum + size, ROOM);
    if (held > this.given.budget) {
      const what = `This takes ${megabytes(held)} of memory, this phone has ${megabytes(this.given.budget)} for it`;
      throw new DeviceError("refused", `${what}: ask the publisher for a smaller base or fewer adapters`);
    }
    const needed = await this.store.lacking(release);
    const { quota = Infinity, usage = 0 } = await this.given.estimate();
    if (needed && needed + RESERVE > quota - usage) {
      const what = `${megabytes(needed)} are to be fetched and the browser has room for ${megabytes(quota - usage)}`;
      throw new DeviceError("storage", `${what}: free ${megabytes(needed + RESERVE - quota + usage)} more on this phone`);
    }
  }

  private async fetch(release: Release, progress: (made: Progress) => void, signal?: AbortSignal): Promise<void> {
    const of = await this.store.lacking(release);
    let fetched = 0;
    for (const artifact of await this.store.missing(release)) {
      const count = (bytes: number): void => {
        fetched += bytes;
        progress({ fetched: Math.min(fetched, of), of, what: artifact.name }); // some may come twice
      };
      await this.store.add(artifact, (partial) => this.repository.blob(artifact, partial, count, signal));
    }
  }

  /** Refuse files that no engine should see, by their headers. */
  private async checkFiles(release: Release): Promise<void> {
    const files = this.store.complete;
    const { base_sha256: sha256 } = release.base;
    const base = await readGguf(files, sha256, artifactOf(release.base).name);
    for (const bundle of release.adapters) {
      const artifact = artifactOf(bundle);
      checkAdapter(await readGguf(files, artifact.sha256, artifact.name), base, sha256);
    }
  }

  private async complete(name: string, trial: boolean): Promise<Installed | null> {
    const release = await this.store.load(name);
    if (release === null || (await this.store.missing(release)).length) return null;
    return this.installed(release, trial);
  }

  private installed(release: Release, trial: boolean): Installed {
    const { sha256, base, adapters } = release;
    return { sha256, trial, base, adapters, open: (blob) => this.store.openBlob(release, blob) };
  }
}

/** Hold the lock until what is returned is called. */
function lock(locks: Pick<LockManager, "request">): Promise<() => void> {
  return new Promise((resolve, reject) => {
    const held = locks.request(LOCK, { ifAvailable: true }, (found) => {
      if (found === null) throw new DeviceError("busy", "Another tab has pitstop open: go on there, or close it and reload");
      return new Promise<void>((release) => resolve(release));
    });
    held.catch(reject);
  });
}

function megabytes(bytes: number): string {
  return `${(Math.max(bytes, 0) / 1e6).toFixed(0)} MB`;
}
