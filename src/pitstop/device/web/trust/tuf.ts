/**
 * A TUF client on WebCrypto alone: from a trusted root to the bytes of a signed file, as specification 1.0 has it.
 *
 *     root (chain of versions) -> timestamp -> snapshot -> targets -> delegated targets -> file
 *
 * Ed25519 only, the one scheme `pitstop publish` signs with.
 */

import { asCount, asList, asTable, asText, own, sha256 } from "./canonical.js";
import type { Bytes, Json, Table } from "./canonical.js";
import { DeviceError, untrusted } from "./errors.js";
import { EXPIRED_CURE } from "./floor.js";
import type { Seen } from "./floor.js";
import { matches, metaFile, parse, roleOf, seconds, verify, wellFormed } from "./metadata.js";
import type { MetaFile, Metadata, Role } from "./metadata.js";

const ROTATIONS = 256; // new roots looked at
const DELEGATIONS = 32; // roles asked for one file
const LIMITS = { root: 512_000, timestamp: 16_384, snapshot: 2_000_000, targets: 1 << 20 }; // bytes
export const SMALL = 1 << 20; // bytes a signed file may have

/** Where metadata comes from and is kept. */
export interface Places {
  /** Read a file of the repository; null if there is none. Throws for more bytes than the limit. */
  fetch(path: string, limit: number): Promise<Bytes | null>;
  /** What was kept under a name; it is verified again. */
  kept(name: string): Promise<Bytes | null>;
  keep(name: string, data: Bytes): Promise<void>;
}

export class Client {
  private root: Metadata;
  private snapshot!: Metadata;
  private targets = new Map<string, Metadata>();

  /** `root` is trusted as it is: a root.json got in a way one trusts. `now` is the time in seconds since 1970. */
  constructor(
    private places: Places,
    root: Uint8Array,
    private now: number,
  ) {
    this.root = parse(root, "root");
  }

  /** Bring the top-level metadata up to date, and say what was seen. */
  async refresh(): Promise<Seen> {
    await this.followRoots();
    const timestamp = await this.refreshTimestamp();
    await this.refreshSnapshot(snapshotOf(timestamp));
    this.targets.clear();
    await this.load("targets", this.topRole("targets"));
    const keyids = [...this.topRole("timestamp").keyids, ...this.topRole("snapshot").keyids];
    const issued = timestamp.signed["x-issued"];
    return {
      root: this.root.version,
      timestamp: timestamp.version,
      snapshot: this.snapshot.version,
      keyids: [...new Set(keyids)].sort(),
      issued: issued === undefined ? 0 : wellFormed("timestamp.json", () => seconds(issued)),
      expires: timestamp.expires,
    };
  }

  /** A small signed file; null if nobody who may signed it. */
  async file(path: string): Promise<Bytes | null> {
    const found = await this.find(path);
    if (found === null) return null;
    const { length, digest } = wellFormed(path, () => {
      const target = asTable(found);
      return { length: asCount(target.length), digest: asText(asTable(target.hashes).sha256) };
    });
    if (length > SMALL) untrusted(`${path} is signed with ${length} bytes, at most ${SMALL} are allowed`);
    const name = `kept-${digest}`;
    const kept = await this.places.kept(name);
    if (kept !== null && (await sha256(kept)) === digest) return kept;
    const slash = path.lastIndexOf("/") + 1;
    const where = `targets/${path.slice(0, slash)}${digest}.${path.slice(slash)}`;
    const data = await this.places.fetch(where, length);
    if (data === null) throw new DeviceError("broken", `The repository lacks ${path}: the publisher has to copy all of it`);
    await matches(data, { length, sha256: digest }, path);
    await this.places.keep(name, data);
    return data;
  }

  /** Go on to the newest root, one version after the other. */
  private async followRoots(): Promise<void> {
    for (let count = 0; count < ROTATIONS; count++) {
      const name = `${this.root.version + 1}.root.json`;
      const kept = await this.places.kept(name);
      if (kept !== null && (await this.acceptsRoot(kept).catch(() => false))) continue;
      const data = await this.places.fetch(`metadata/${name}`, LIMITS.root);
      if (data === null) break; // the newest root is reached
      await this.acceptsRoot(data);
      await this.places.keep(name, data);
    }
    this.unexpired(this.root);
  }

  /** Go on to the next root, which the keys of this one and its own have signed. */
  private async acceptsRoot(data: Bytes): Promise<boolean> {
    const next = parse(data, "root");
    await verify(next, this.topRole("root"));
    await verify(next, topRole(next, "root"));
    if (next.version !== this.root.version + 1) untrusted(`${this.root.version + 1}.root.json is version ${next.version}`);
    this.root = next;
    return true;
  }

  private async refreshTimestamp(): Promise<Metadata> {
    const role = this.topRole("timestamp");
    const known = await this.keptRole("timestamp", role);
    const data = await this.places.fetch("metadata/timestamp.json", LIMITS.timestamp);
    if (data === null) throw new DeviceError("broken", "The repository has no timestamp.json: check its address");
    const fresh = parse(data, "timestamp");
    await verify(fresh, role);
    if (known) {
      notOlder("timestamp.json", fresh.version, known.version);
      if (fresh.version === known.version) return this.unexpired(known);
      notOlder("snapshot.json", snapshotOf(fresh).version, snapshotOf(known).version);
    }
    snapshotOf(fresh); // well formed, before it replaces another one
    this.unexpired(fresh);
    await this.places.keep("timestamp.json", data);
    return fresh;
  }

  private async refreshSnapshot(meta: MetaFile): Promise<void> {
    const role = this.topRole("snapshot");
    const known = await this.keptRole("snapshot", role);
    this.snapshot = await this.obtain("snapshot", "snapshot", meta, role, (fresh) => {
      if (known === null) return;
      const [before, after] = [known, fresh].map((one) => asTable(one.signed.meta)) as [Table, Table];
      for (const name of Object.keys(before)) {
        if (own(after, name) === undefined) untrusted(`snapshot.json no longer knows ${name}`);
        notOlder(name, metaFile(after[name]).version, metaFile(before[name]).version);
      }
    });
  }

  /** A role of targets; `role` is who signs it. */
  private async load(name: string, role: Role): Promise<Metadata> {
    const loaded = this.targets.get(name);
    if (loaded) return loaded;
    const meta = wellFormed("snapshot.json", () => metaFile(own(asTable(this.snapshot.signed.meta), `${name}.json`)));
    const fresh = await this.obtain(name, "targets", meta, role, (one) => void asTable(one.signed.targets));
    this.targets.set(name, fresh);
    return fresh;
  }

  /** Metadata that another file speaks of, as it was kept or else from the repository. */
  private async obtain(
    name: string,
    type: "snapshot" | "targets",
    meta: MetaFile,
    role: Role,
    check: (fresh: Metadata) => void,
  ): Promise<Metadata> {
    const accept = async (data: Bytes): Promise<Metadata> => {
      await matches(data, meta, `${name}.json`);
      const fresh = parse(data, name, type);
      await verify(fresh, role);
      if (fresh.version !== meta.version) untrusted(`${name}.json is version ${fresh.version}, not ${meta.version}`);
      wellFormed(`${name}.json`, () => check(fresh));
      return this.unexpired(fresh);
    };
    const file = encodeURIComponent(name);
    const kept = await this.places.kept(`${file}.json`);
    const known = kept && (await accept(kept).catch(() => null));
    if (known) return known;
    const prefix = this.root.signed.consistent_snapshot === true ? `${meta.version}.` : "";
    const data = await this.places.fetch(`metadata/${prefix}${file}.json`, meta.length ?? LIMITS[type]);
    if (data === null) throw new DeviceError("broken", `The repository lacks ${name}.json: the publisher has to copy all of it`);
    const fresh = await accept(data);
    await this.places.keep(`${file}.json`, data);
    return fresh;
  }

  /** What was kept of a role, if its keys still vouch for it: nothing older is accepted. */
  private async keptRole(name: "timestamp" | "snapshot", role: Role): Promise<Metadata | null> {
    const data = await this.places.kept(`${name}.json`);
    if (data === null) return null;
    try {
      const known = parse(data, name);
      await verify(known, role);
      return known;
    } catch {
      return null;
    }
  }

  /** Search the roles that may sign a path, each before those it delegates to. */
  private async find(path: string): Promise<Json | null> {
    let open: { name: string; role: Role }[] = [{ name: "targets", role: this.topRole("targets") }];
    const visited = new Set<string>();
    while (open.length && visited.size < DELEGATIONS) {
      const { name, role } = open.pop()!;
      if (visited.has(name)) continue;
      visited.add(name);
      const { signed } = await this.load(name, role);
      const found = own(asTable(signed.targets), path);
      if (found !== undefined) return found;
      const next = [];
      for (const delegated of wellFormed(`${name}.json`, () => delegationsFor(signed, path))) {
        if (!(await delegated.matches)) continue;
        next.push({ name: delegated.name, role: delegated.role });
        if (!delegated.terminating) continue;
        open = [];
        break;
      }
      open.push(...next.reverse());
    }
    return null;
  }

  private topRole(name: string): Role {
    return topRole(this.root, name);
  }

  private unexpired(metadata: Metadata): Metadata {
    if (metadata.expires <= this.now) untrusted(`${metadata.name}.json has expired: ${EXPIRED_CURE}`);
    return metadata;
  }
}

function topRole(root: Metadata, name: string): Role {
  return wellFormed("root.json", () => roleOf(asTable(own(asTable(root.signed.roles), name)), root.signed.keys));
}

function snapshotOf(timestamp: Metadata): MetaFile {
  return wellFormed("timestamp.json", () => metaFile(asTable(timestamp.signed.meta)["snapshot.json"]));
}

function notOlder(name: string, found: number, known: number): void {
  if (found < known) untrusted(`${name} is version ${found}, version ${known} was seen before`);
}

interface Delegation {
  name: string;
  role: Role;
  terminating: boolean;
  matches: boolean | Promise<boolean>;
}

function delegationsFor(signed: Table, path: string): Delegation[] {
  if (signed.delegations === undefined) return [];
  const delegations = asTable(signed.delegations);
  return asList(delegations.roles)
    .map(asTable)
    .map((one) => ({
      name: asText(one.name),
      role: roleOf(one, delegations.keys),
      terminating: one.terminating === true,
      matches:
        one.paths === undefined
          ? hasPrefix(path, asList(one.path_hash_prefixes).map(asText))
          : asList(one.paths).map(asText).some((pattern) => globMatches(pattern, path)),
    }));
}

async function hasPrefix(path: string, prefixes: string[]): Promise<boolean> {
  const digest = await sha256(new TextEncoder().encode(path));
  return prefixes.some((prefix) => digest.startsWith(prefix));
}

/** A star does not cross a slash. */
function globMatches(pattern: string, path: string): boolean {
  const parts = pattern.split(/([*?])/).map((part) => {
    if (part === "*") return "[^/]*";
    return part === "?" ? "[^/]" : part.replace(/[\\^$.|+()[\]{}]/g, "\\$&");
  });
  return new RegExp(`^${parts.join("")}$`, "u").test(path);
}
