/** What a channel offers: metadata verified, floor raised, manifests pinned, as `src/pitstop/device/updater.py` does it. */

import { sha256 } from "../trust/canonical.js";
import type { Bytes } from "../trust/canonical.js";
import { DeviceError, untrusted } from "../trust/errors.js";
import { rise, riseCounters } from "../trust/floor.js";
import { parse } from "../trust/metadata.js";
import { Client } from "../trust/tuf.js";
import type { Repository } from "./download.js";
import { manifestPath, parseBundle, parseChannel } from "./manifest.js";
import type { Pin } from "./manifest.js";
import { makeRelease } from "./store.js";
import type { Release, Store } from "./store.js";

/** Verify what the channel offers, and remember that it was offered. */
export async function offered(
  store: Store,
  repository: Repository,
  root: Uint8Array,
  channel: string,
  clock: number,
): Promise<Release> {
  const used = new Set<string>();
  const client = new Client(
    {
      fetch: (path, limit) => repository.file(path, limit),
      kept: (name) => store.tuf.read(mark(used, name)),
      keep: (name, data) => store.tuf.write(mark(used, name), data),
    },
    root,
    clock,
  );
  const before = await store.floors.read();
  let floor = rise(before, await client.refresh(), clock);
  const data = await client.file(`channels/${channel}.json`);
  if (data === null) throw new DeviceError("usage", `The repository has no channel ${channel}: ask the publisher`);
  const pins = Object.entries(parseChannel(data, channel));
  floor = riseCounters(floor, Object.fromEntries(pins.map(([name, pin]) => [name, pin.counter])));
  const manifests = new Map<string, Bytes>();
  for (const [name, pin] of pins) manifests.set(name, await manifest(client, pin));
  const release = await makeRelease(manifests);
  if (JSON.stringify(floor) !== JSON.stringify(before)) await store.floors.write(floor);
  await store.tuf.removeExcept(used);
  return release;
}

/** Until when the channel was last known to be fresh, in seconds since 1970; null if it never was looked at. */
export async function freshUntil(store: Store): Promise<number | null> {
  const data = await store.tuf.read("timestamp.json");
  try {
    return data && parse(data, "timestamp").expires;
  } catch {
    return null; // torn: the next look brings it again
  }
}

/** Fetch the manifest a channel pinned; channel and bundle key must agree on it. */
async function manifest(client: Client, pin: Pin): Promise<Bytes> {
  const data = await client.file(pin.path);
  if (data === null) untrusted(`The channel offers ${pin.path}, which no bundle key signed`);
  if ((await sha256(data)) !== pin.sha256) {
    untrusted(`The channel offers ${pin.path} with another digest than the bundle key signed`);
  }
  const bundle = parseBundle(data, pin.path);
  if (manifestPath(bundle) !== pin.path || bundle.counter !== pin.counter) {
    untrusted(`${pin.path} is the manifest of ${manifestPath(bundle)} with counter ${bundle.counter}`);
  }
  return data;
}

function mark(used: Set<string>, name: string): string {
  used.add(name);
  return name;
}
