/** A phone as a device: what a channel offers, verified, stored, tried, confirmed or rolled back. */

import type { Bundle } from "./manifest.js";

export type { Artifact, Bundle } from "./manifest.js";

/** Why a device will not do something: the message is a sentence for the person who holds the phone. */
export declare class DeviceError extends Error {
  readonly kind: Kind;
}

/**
 * unreachable: the network; untrusted: metadata or bytes that fail verification; broken: a repository that is not
 * complete or a file no engine should see; refused: a release that failed here before, or a phone too small for it;
 * storage: the browser's storage is full or damaged; busy: another tab is at work; usage: nothing to do this to.
 */
export type Kind = "unreachable" | "untrusted" | "broken" | "refused" | "storage" | "busy" | "usage";

/** A complete release in the store. */
export interface Installed {
  sha256: string;
  trial: boolean; // true: `confirm` it once it has answered, or `rollBack`
  base: Bundle;
  adapters: Bundle[];
  open(sha256: string): Promise<FileSystemFileHandle>; // of an artifact
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
  fetched: number; // bytes
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
  budget: number; // bytes of base and adapters this phone may hold in memory
}

export declare class Device {
  /** Take the store in a folder for this tab alone. Throws a DeviceError: busy, if another tab has it. */
  static open(folder: FileSystemDirectoryHandle, given: Given): Promise<Device>;
  /** Refresh the metadata and say what is offered; nothing is fetched. */
  look(): Promise<Offer>;
  /** Fetch and verify what is offered and begin its trial; what serves already is returned as it is. */
  update(progress: (made: Progress) => void, signal?: AbortSignal): Promise<Installed>;
  /** The release that serves; null if there is none, or the browser evicted it. */
  active(): Promise<Installed | null>;
  /** Begin another try of a release whose last try was cut off; null if none is on trial (or it has no try left). */
  trial(): Promise<Installed | null>;
  /** Let the release on trial serve. */
  confirm(): Promise<void>;
  /** Leave the release on trial, or else the one that serves for the one before it. */
  rollBack(): Promise<void>;
  /** Give back the try that was begun: it could not be made for a reason that is not the release's. */
  untried(): Promise<void>;
  status(): Promise<Status>;
  /** Let another tab have the store. */
  close(): void;
}
