/**
 * A worker that is killed at every step of the store: what a phone has then is the old release or the new one.
 *
 * The repositories were published by Python: `first` offers a base, `second` an adapter as well, `third` another one.
 */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { artifactOf } from "../../../src/pitstop/device/web/store/manifest.js";
import { Device, DeviceError } from "../../../src/pitstop/device/web/store/device.js";
import type { Given } from "../../../src/pitstop/device/web/store/device.js";
import { Killed, Life, Locks, NodeFolder } from "./node_folder.js";
import type { Faults, Unflushed } from "./node_folder.js";
import { StaticServer } from "./static_server.js";

const made = process.env.PITSTOP_REPOSITORIES!;
const root = readFileSync(join(made, "1.root.json"));
const servers = new Map(["first", "second", "third"].map((name) => [name, new StaticServer(join(made, name))]));
const urls = new Map<string, string>();
const scratch = mkdtempSync(join(tmpdir(), "pitstop-life-"));
let folders = 0;

before(async () => {
  for (const [name, server] of servers) urls.set(name, await server.listen());
});
after(() => {
  for (const server of servers.values()) server.close();
  rmSync(scratch, { recursive: true });
});

function newFolder(from?: string): string {
  const folder = join(scratch, `${folders++}`);
  if (from) cpSync(from, folder, { recursive: true });
  else mkdirSync(folder);
  return folder;
}

function open(folder: NodeFolder, repository: string, given: Partial<Given> = {}): Promise<Device> {
  const plain = { root, channel: "stable", budget: 1e9, locks: new Locks(), estimate: async () => ({}) };
  return Device.open(folder.handle, { repository: urls.get(repository)!, ...plain, ...given });
}

/** Update and confirm; returns the release. */
async function update(folder: NodeFolder, repository: string): Promise<string> {
  const device = await open(folder, repository);
  const { sha256, trial } = await device.update(() => undefined);
  if (trial) await device.confirm();
  return sha256;
}

/** What an owner finds: the release that serves, whole; or what is broken. */
async function found(folder: string): Promise<{ good: string | null; trial: string | null; broken?: string }> {
  const device = await open(new NodeFolder(folder), "second");
  const { good, trial } = await device.status();
  const active = await device.active();
  if (good && !active) return { good, trial, broken: `${good} is not complete` };
  for (const bundle of active ? [active.base, ...active.adapters] : []) {
    const { sha256 } = artifactOf(bundle);
    const data = readFileSync(join(folder, "blobs", sha256));
    if (createHash("sha256").update(data).digest("hex") !== sha256) return { good, trial, broken: `${sha256} is damaged` };
  }
  return { good, trial };
}

/** Kill the worker after each step of an action on a copy of a folder; returns what was broken: of a fault, the first. */
async function kill(
  from: string,
  action: (folder: NodeFolder) => Promise<unknown>,
  allowed: (string | null)[],
  fate: Unflushed,
  faults: Faults = {},
): Promise<{ broken: string[]; steps: number; ends: Set<string | null> }> {
  const broken: string[] = [];
  const ends = new Set<string | null>();
  for (let last = 0; ; last++) {
    const folder = newFolder(from);
    const life = new Life(last, fate);
    let ended = true;
    try {
      await action(new NodeFolder(folder, life, faults));
      life.die();
    } catch (error) {
      if (!(error instanceof Killed)) throw error;
      ended = false;
    }
    try {
      const { good, broken: what } = await found(folder);
      ends.add(good);
      if (what) broken.push(`${last}: ${what}`);
      else if (!allowed.includes(good)) broken.push(`${last}: ${good} is neither old nor new`);
    } catch (error) {
      broken.push(`${last}: ${(error as Error).message}`);
    }
    rmSync(folder, { recursive: true });
    if (ended || (broken.length && Object.keys(faults).length)) return { broken, steps: last, ends };
  }
}

async function prepared(): Promise<{ folder: string; first: string; second: string; third: string }> {
  const names = [];
  for (const repository of ["first", "second", "third"]) names.push(await update(new NodeFolder(newFolder()), repository));
  const folder = newFolder();
  assert.equal(await update(new NodeFolder(folder), "first"), names[0]);
  return { folder, first: names[0]!, second: names[1]!, third: names[2]! };
}

for (const fate of ["kept", "lost", "half"] as const) {
  test(`killed while it updates, unflushed bytes ${fate}`, async () => {
    const { folder, first, second } = await prepared();
    const { broken, steps, ends } = await kill(folder, (cut) => update(cut, "second"), [first, second], fate);
    assert.deepEqual(broken, []);
    assert.deepEqual([...ends].sort(), [first, second].sort());
    assert.ok(steps > 20, `${steps} steps`);
  });

  test(`killed while it goes back, unflushed bytes ${fate}`, async () => {
    const { folder, first, second } = await prepared();
    assert.equal(await update(new NodeFolder(folder), "second"), second);
    const back = async (cut: NodeFolder): Promise<void> => (await open(cut, "second")).rollBack();
    const { broken, ends } = await kill(folder, back, [first, second], fate);
    assert.deepEqual(broken, []);
    assert.deepEqual([...ends].sort(), [first, second].sort());
  });
}

test("killed on its first visit", async () => {
  const { first } = await prepared();
  const { broken } = await kill(newFolder(), (cut) => update(cut, "first"), [null, first], "lost");
  assert.deepEqual(broken, []);
});

test("a store that never flushes is found out", async () => {
  const { folder, first, second } = await prepared();
  const { broken } = await kill(folder, (cut) => update(cut, "second"), [first, second], "lost", { neverFlushes: "partial" });
  assert.notDeepEqual(broken, []);
});

test("a store with one copy of its state is found out", async () => {
  const folder = newFolder();
  const first = await update(new NodeFolder(folder, new Life(), { oneCopy: true }), "first");
  const second = await update(new NodeFolder(newFolder()), "second");
  const { broken } = await kill(folder, (cut) => update(cut, "second"), [first, second], "half", { oneCopy: true });
  assert.notDeepEqual(broken, []);
});

test("after any kill an ordinary update brings what is offered", async () => {
  const { folder, second } = await prepared();
  for (let last = 0; last < 60; last += 3) {
    const copy = newFolder(folder);
    await update(new NodeFolder(copy, new Life(last, "half")), "second").catch(() => undefined);
    assert.equal(await update(new NodeFolder(copy), "second"), second);
    assert.equal((await found(copy)).good, second);
  }
});

test("a trial that takes the worker down uses up its tries and is bad", async () => {
  const { folder, first, second } = await prepared();
  assert.equal((await (await open(new NodeFolder(folder), "second")).update(() => undefined)).sha256, second);
  for (let left = 1; left >= 0; left--) {
    const device = await open(new NodeFolder(folder), "second");
    assert.equal((await device.trial())!.sha256, second);
    assert.equal((await device.status()).tries, left);
  }
  const device = await open(new NodeFolder(folder), "second");
  assert.equal(await device.trial(), null);
  const { good, bad } = await device.status();
  assert.deepEqual([good, bad], [first, [second]]);
  assert.match((await device.look()).refusal!, /failed or was rolled back/);
  await assert.rejects(device.update(() => undefined), { kind: "refused" });
});

test("a try that could not be made is given back", async () => {
  const { folder } = await prepared();
  const device = await open(new NodeFolder(folder), "second");
  await device.update(() => undefined);
  assert.equal((await device.status()).tries, 2);
  await device.untried();
  assert.equal((await device.status()).tries, 3);
});

test("two tabs", async () => {
  const [folder, locks] = [new NodeFolder(newFolder()), new Locks()];
  const device = await open(folder, "first", { locks });
  await assert.rejects(open(folder, "first", { locks }), { kind: "busy" });
  device.close();
  await new Promise(setImmediate);
  (await open(folder, "first", { locks })).close();
});

test("what the phone cannot hold is refused before it is fetched", async () => {
  const server = servers.get("first")!;
  // 200 MB would hold the files a thousand times, but not the conversations as well.
  const small = [{ budget: 200e6 }, { estimate: async () => ({ quota: 40e6, usage: 39e6 }) }];
  for (const given of small) {
    server.ranges.length = 0;
    const device = await open(new NodeFolder(newFolder()), "first", given);
    const { refusal, bytes } = await device.look();
    assert.match(refusal!, "budget" in given ? /this phone has 200 MB/ : /room for 1 MB/);
    assert.ok(bytes > 0);
    await assert.rejects(device.update(() => undefined), DeviceError);
    assert.deepEqual(server.ranges, []);
  }
});

test("a storage that is full half-way keeps what serves, and what came before", async () => {
  const { folder, first, second } = await prepared();
  for (let room = 0; room < 20_000; room += 1_000) {
    const copy = newFolder(folder);
    const life = new Life();
    life.room = room;
    const ended = await update(new NodeFolder(copy, life), "second").catch((error: unknown) => error);
    if (ended === second) continue;
    assert.ok(ended instanceof DeviceError && ended.kind === "storage", String(ended));
    assert.match(ended.message, /free some space/);
    assert.equal((await found(copy)).good, first);
    assert.equal(await update(new NodeFolder(copy), "second"), second);
  }
});

test("what the browser evicted is not installed, and comes again", async () => {
  const { folder, first } = await prepared();
  for (const name of readdirSync(join(folder, "blobs"))) rmSync(join(folder, "blobs", name));
  const device = await open(new NodeFolder(folder), "first");
  assert.equal(await device.active(), null);
  assert.equal((await device.update(() => undefined)).sha256, first);
  assert.equal((await device.active())!.sha256, first);
});

test("a file that rotted in the storage is not handed out, and comes again", async () => {
  const { folder, first } = await prepared();
  const device = await open(new NodeFolder(folder), "first");
  const active = (await device.active())!;
  const path = join(folder, "blobs", active.base.base_sha256);
  const data = readFileSync(path);
  data[data.length - 1]! ^= 1;
  writeFileSync(path, data);
  await assert.rejects(active.open(active.base.base_sha256), { kind: "storage" });
  assert.equal((await device.update(() => undefined)).sha256, first);
  assert.equal((await (await device.active())!.open(active.base.base_sha256)).kind, "file");
});

test("blobs that nothing needs any more go", async () => {
  const { folder, second, third } = await prepared();
  for (const name of ["second", "third"]) await update(new NodeFolder(folder), name);
  const { good, previous } = await (await open(new NodeFolder(folder), "third")).status();
  assert.deepEqual([good, previous], [third, second]);
  assert.equal(readdirSync(join(folder, "releases")).length, 3); // the other copy of the state still names the first
  assert.equal(readdirSync(join(folder, "blobs")).length, 3);
  assert.deepEqual(readdirSync(join(folder, "partial")), []);
  assert.ok(!existsSync(join(folder, "tuf/1.root.json")));
});
