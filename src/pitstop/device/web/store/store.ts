/**
 * The releases on a phone: blobs by digest, and one small record that says which release serves.
 *
 *     state.a|b  floor.a|b          which release is good, on trial, previous, bad; what was trusted last
 *     tuf/                          metadata and manifests as they came; verified whenever they are used
 *     releases/<sha256>.json        the manifests of one release, byte for byte: equal to those of a board
 *     blobs/<sha256>                complete and verified, or not there
 *     partial/<sha256>              on its way in: verified pieces
 *
 * The worker may end at any moment: afterwards the release that was good is good still, or the new one is.
 */

import { asCount, asList, asTable, asText, parseJson, sha256 } from "../trust/canonical.js";
import type { Bytes, Json } from "../trust/canonical.js";
import { DeviceError } from "../trust/errors.js";
import { GROUND } from "../trust/floor.js";
import type { Floor } from "../trust/floor.js";
import { NOTHING, asState, install, releases } from "./activation.js";
import type { State } from "./activation.js";
import { Files } from "./files.js";
import { PIECE, artifactOf, parseBundle } from "./manifest.js";
import type { Artifact, Bundle } from "./manifest.js";
import { TwoCopies } from "./two_copies.js";

/** The bundles a channel offered together: one base and the adapters that run on it. */
export interface Release {
  sha256: string;
  data: Bytes; // of the release file
  base: Bundle;
  adapters: Bundle[];
}

export class Store {
  private constructor(
    readonly states: TwoCopies<State>,
    readonly floors: TwoCopies<Floor>,
    readonly tuf: Files,
    private files: Files,
    private blobs: Files,
    private partial: Files,
  ) {}

  static async open(folder: FileSystemDirectoryHandle): Promise<Store> {
    const top = new Files(folder);
    const names = ["tuf", "releases", "blobs", "partial"];
    const [tuf, files, blobs, partial] = await Promise.all(names.map((name) => Files.within(folder, name)));
    const states = new TwoCopies(top, "state", NOTHING, asState);
    return new Store(states, new TwoCopies(top, "floor", GROUND, asFloor), tuf!, files!, blobs!, partial!);
  }

  /** Read an installed release; null if a file of it is not here or damaged. */
  async load(name: string): Promise<Release | null> {
    const data = await this.files.read(`${name}.json`);
    return data !== null && (await sha256(data)) === name ? parseRelease(data) : null;
  }

  /** The files of a release that are not here with their full size. */
  async missing(release: Release): Promise<Artifact[]> {
    const missing = [];
    for (const artifact of artifactsOf(release)) {
      if ((await this.blobs.size(artifact.sha256)) !== artifact.size) missing.push(artifact);
    }
    return missing;
  }

  /** Bytes that are still to come for a release. */
  async lacking(release: Release): Promise<number> {
    let bytes = 0;
    for (const artifact of await this.missing(release)) {
      bytes += Math.max(0, artifact.size - ((await this.partial.size(artifact.sha256)) ?? 0));
    }
    return bytes;
  }

  /** Let a blob come into its partial file, and give it its place: `fetch` verifies every piece. */
  async add(artifact: Artifact, fetch: (partial: Files) => Promise<void>): Promise<void> {
    await fetch(this.partial);
    await this.partial.move(artifact.sha256, this.blobs);
  }

  /** A file of a release for an engine; it was verified when it came, and storage rots. */
  async openBlob(release: Release, name: string): Promise<FileSystemFileHandle> {
    const artifact = artifactsOf(release).find((one) => one.sha256 === name);
    const handle = artifact && (await this.blobs.handle(name));
    if (!artifact || !handle) throw new DeviceError("storage", "A file of the model is not here: update to fetch it again");
    for (const [index, digest] of artifact.pieces.entries()) {
      const data = await this.blobs.read(name, index * PIECE, (index + 1) * PIECE);
      if (data !== null && (await sha256(data)) === digest) continue;
      await this.blobs.remove(name);
      throw new DeviceError("storage", `${artifact.name} was damaged in the browser's storage: update to fetch it again`);
    }
    return handle;
  }

  /** Where a file of a release is read from for the format gate. */
  get complete(): Files {
    return this.blobs;
  }

  /** Put a release on trial, whose files are here. */
  async install(release: Release): Promise<void> {
    const after = install(await this.states.read(), release.sha256);
    if ((await this.load(release.sha256)) === null) await this.files.write(`${release.sha256}.json`, release.data);
    await this.change(() => after);
  }

  /** Let one state follow another. */
  async change(rule: (state: State) => State): Promise<State> {
    const before = await this.states.read();
    const after = rule(before);
    if (after !== before) await this.states.write(after);
    return after;
  }

  /** Remove what no installed release needs, except for a release about to be installed. */
  async collectGarbage(keep?: Release): Promise<void> {
    const named = (await this.states.readAll()).flatMap(({ record }) => releases(record));
    const needed = await Promise.all([...new Set(named)].map((name) => this.load(name)));
    // What a damaged release needs is unknown: keep everything until an update repairs it.
    if (needed.includes(null)) return;
    const kept = (needed as Release[]).flatMap(artifactsOf).map((artifact) => artifact.sha256);
    const coming = keep ? artifactsOf(keep).map((artifact) => artifact.sha256) : [];
    await this.files.removeExcept(new Set(named.map((name) => `${name}.json`)));
    await this.blobs.removeExcept(new Set([...kept, ...coming]));
    await this.partial.removeExcept(new Set(coming));
  }

  /** Bytes of the blobs here. */
  async stored(): Promise<number> {
    const sizes = await Promise.all((await this.blobs.names()).map((name) => this.blobs.size(name)));
    return sizes.reduce<number>((sum, size) => sum + (size ?? 0), 0);
  }
}

/** Make a release of manifests, by bundle name: one base, and adapters that were made for it. */
export async function makeRelease(manifests: Map<string, Bytes>): Promise<Release> {
  const texts = [...manifests].sort(([a], [b]) => (a < b ? -1 : 1));
  const entries = texts.map(([name, data]) => {
    return `    ${JSON.stringify(name)}: ${JSON.stringify(new TextDecoder("utf-8", { ignoreBOM: true }).decode(data))}`;
  });
  const data = new TextEncoder().encode(`{\n  "manifests": {\n${entries.join(",\n")}\n  }\n}\n`);
  return parseRelease(data);
}

async function parseRelease(data: Bytes): Promise<Release> {
  const manifests = Object.entries(asTable(asTable(parseJson(data)).manifests));
  const bundles = manifests.map(([name, text]) => {
    const bundle = parseBundle(new TextEncoder().encode(asText(text)), name);
    if (bundle.name !== name) throw new DeviceError("broken", `The manifest of ${name} is for ${bundle.name}`);
    return bundle;
  });
  const bases = bundles.filter(({ kind }) => kind === "base");
  const [base] = bases;
  if (!base || bases.length > 1) {
    throw new DeviceError("broken", `A channel offers exactly one base, this one has ${bases.length}: ask the publisher`);
  }
  for (const { name, base_sha256, base_name } of bundles) {
    if (base_sha256 === base.base_sha256) continue;
    const what = `${name} was made for another base (${base_name}, ${base_sha256.slice(0, 12)}…)`;
    throw new DeviceError("broken", `${what} than ${base.name} (${base.base_sha256.slice(0, 12)}…): ask the publisher`);
  }
  const adapters = bundles.filter(({ kind }) => kind === "adapter");
  return { sha256: await sha256(data), data, base, adapters };
}

/** The files a phone needs, each once. */
export function artifactsOf(release: Release): Artifact[] {
  const all = [release.base, ...release.adapters].map(artifactOf);
  return [...new Map(all.map((artifact) => [artifact.sha256, artifact])).values()];
}

function asFloor(value: Json): Floor {
  const table = asTable(value);
  const [root, timestamp, snapshot, issued] = ["root", "timestamp", "snapshot", "issued"].map((name) => asCount(table[name]));
  const counters = Object.entries(asTable(table.counters)).map(([name, counter]) => [name, asCount(counter)]);
  return {
    root: root!,
    timestamp: timestamp!,
    snapshot: snapshot!,
    keyids: asList(table.keyids).map(asText),
    issued: issued!,
    counters: Object.fromEntries(counters) as Record<string, number>,
  };
}
