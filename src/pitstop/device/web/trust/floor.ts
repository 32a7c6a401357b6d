/** What this phone has trusted before, and so never goes below: the rules of `src/pitstop/device/floor.py`. */

import { own } from "./canonical.js";
import { untrusted } from "./errors.js";

/** What verified metadata says of itself. */
export interface Seen {
  root: number; // version
  timestamp: number; // version
  snapshot: number; // version
  keyids: string[]; // of timestamp and snapshot, sorted
  issued: number; // seconds since 1970: when the publisher signed the timestamp
  expires: number; // seconds since 1970: when the timestamp ends
}

/** The lowest this phone still accepts. */
export interface Floor {
  root: number;
  timestamp: number;
  snapshot: number;
  keyids: string[];
  issued: number; // it is this late at least: seconds since 1970
  counters: Record<string, number>; // by bundle name
}

export const GROUND: Floor = { root: 0, timestamp: 0, snapshot: 0, keyids: [], issued: 0, counters: {} };

const REPLAY = "someone may be replaying an old copy; ask the publisher";
export const EXPIRED_CURE =
  "check the clock of this phone; if it is right, the publisher has to publish again. What is installed keeps running";

/** The floor after this metadata; `clock` is what the phone takes for now, in seconds since 1970. */
export function rise(floor: Floor, seen: Seen, clock: number): Floor {
  if (seen.root < floor.root) lower("root.json", seen.root, floor.root);
  if (seen.root > floor.root && seen.keyids.join() !== floor.keyids.join()) {
    // New keys start afresh: a stolen one may have signed a version or a time nobody can reach.
    floor = { ...GROUND, counters: floor.counters };
  }
  if (seen.timestamp < floor.timestamp) lower("timestamp.json", seen.timestamp, floor.timestamp);
  if (seen.snapshot < floor.snapshot) lower("snapshot.json", seen.snapshot, floor.snapshot);
  if (seen.expires <= Math.max(clock, floor.issued)) untrusted(`timestamp.json has expired: ${EXPIRED_CURE}`);
  const { expires, ...kept } = seen;
  return { ...kept, issued: Math.max(floor.issued, Math.min(seen.issued, expires)), counters: floor.counters };
}

/** The floor after a channel that offers bundles with these counters. */
export function riseCounters(floor: Floor, counters: Record<string, number>): Floor {
  for (const [name, counter] of Object.entries(counters)) {
    const known = own(floor.counters, name) ?? 0;
    if (counter < known) untrusted(`${name} is offered with counter ${counter}, ${known} was offered before: ${REPLAY}`);
  }
  return { ...floor, counters: { ...floor.counters, ...counters } };
}

function lower(what: string, found: number, known: number): never {
  untrusted(`${what} is version ${found}, version ${known} was seen before: ${REPLAY}`);
}
