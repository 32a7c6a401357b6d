/** Does what Python asks for, a line of JSON at a time, so that a test can hold a phone and a board side by side. */

import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { createInterface } from "node:readline";

import { begin, confirm, install, reject, rollBack, untried } from "../../../src/pitstop/device/web/store/activation.js";
import type { State } from "../../../src/pitstop/device/web/store/activation.js";
import { Device, DeviceError } from "../../../src/pitstop/device/web/store/device.js";
import { Files } from "../../../src/pitstop/device/web/store/files.js";
import { checkAdapter } from "../../../src/pitstop/device/web/store/gate.js";
import { readGguf } from "../../../src/pitstop/device/web/store/gguf.js";
import type { GgufHeader } from "../../../src/pitstop/device/web/store/gguf.js";
import { parseBundle } from "../../../src/pitstop/device/web/store/manifest.js";
import { canonical, parseJson } from "../../../src/pitstop/device/web/trust/canonical.js";
import { rise, riseCounters } from "../../../src/pitstop/device/web/trust/floor.js";
import type { Floor, Seen } from "../../../src/pitstop/device/web/trust/floor.js";
import { Locks, NodeFolder } from "./node_folder.js";

const RULES = { begin, confirm, install, reject, roll_back: rollBack, untried };

const VERBS = {
  async update(folder: string, repository: string, root: string, channel: string, clock: number): Promise<string> {
    const given = { repository, root: readFileSync(root), channel, budget: Infinity };
    const browser = { locks: new Locks(), estimate: async () => ({}), clock: () => clock };
    const device = await Device.open(new NodeFolder(folder).handle, { ...given, ...browser });
    try {
      const { sha256, trial } = await device.update(() => undefined);
      if (trial) await device.confirm();
      return sha256;
    } finally {
      device.close();
    }
  },
  async header(path: string): Promise<object> {
    const { version, alignment, dataOffset, tensors, metadata, types } = await header(path);
    const list = tensors.map(({ name, shape, type, offset, size }) => [name, shape, type, offset, size]);
    return { version, alignment, dataOffset, tensors: list, keys: [...metadata.keys()], types: [...types.values()] };
  },
  async fits(adapter: string, base: string, sha256: string): Promise<void> {
    checkAdapter(await header(adapter), await header(base), sha256);
  },
  async follow(state: State, rule: keyof typeof RULES, release: string): Promise<State> {
    return RULES[rule](state, release);
  },
  async rise(floor: Floor, seen: Seen, clock: number, counters: Record<string, number>): Promise<Floor> {
    return riseCounters(rise(floor, seen, clock), counters);
  },
  async canonical(text: string): Promise<string> {
    return Buffer.from(canonical(parseJson(new TextEncoder().encode(text)))).toString("hex");
  },
  async manifest(text: string): Promise<object> {
    return parseBundle(new TextEncoder().encode(text), "bundle.json");
  },
};

function header(path: string): Promise<GgufHeader> {
  return readGguf(new Files(new NodeFolder(dirname(path)).handle), basename(path), basename(path));
}

for await (const line of createInterface({ input: process.stdin })) {
  const [verb, ...given] = JSON.parse(line) as [keyof typeof VERBS, ...never[]];
  let answer: object;
  try {
    answer = { result: (await (VERBS[verb] as (...given: never[]) => Promise<unknown>)(...given)) ?? null };
  } catch (error) {
    const kind = error instanceof DeviceError ? error.kind : "bug";
    answer = { kind, message: error instanceof DeviceError ? error.message : String((error as Error).stack) };
  }
  console.log(JSON.stringify(answer, (_, value: unknown) => (typeof value === "bigint" ? `${value}` : value)));
}
