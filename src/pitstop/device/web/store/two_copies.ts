/**
 * A small record in two files: the valid one that was written last counts, as in `src/pitstop/device/durable.py`.
 *
 * A write goes to the file that does not count, so one that is torn leaves the record before it.
 */

import { asCount, asTable, parseJson } from "../trust/canonical.js";
import type { Bytes, Json } from "../trust/canonical.js";
import { DeviceError } from "../trust/errors.js";
import type { Files } from "./files.js";

interface Copy<Record> {
  name: string;
  number: number;
  record: Record;
}

export class TwoCopies<Record> {
  private names: [string, string];

  /** `check` returns the record that JSON is, or throws. */
  constructor(
    private files: Files,
    private stem: string,
    private empty: Record,
    private check: (value: Json) => Record,
  ) {
    this.names = [`${stem}.a`, `${stem}.b`];
  }

  /** The newest valid copy, or the empty record if nothing was ever written. */
  async read(): Promise<Record> {
    return (await this.newest())?.record ?? this.empty;
  }

  /** Every valid copy, the newest first. */
  async readAll(): Promise<Copy<Record>[]> {
    const copies = await Promise.all(this.names.map((name) => this.readCopy(name)));
    return copies.filter((copy) => copy !== null).sort((a, b) => b.number - a.number);
  }

  /** Make this the record that counts. */
  async write(record: Record): Promise<void> {
    const newest = await this.newest();
    const name = newest?.name === this.names[0] ? this.names[1] : this.names[0];
    await this.files.write(name, seal((newest?.number ?? 0) + 1, record));
  }

  private async newest(): Promise<Copy<Record> | undefined> {
    const [newest] = await this.readAll();
    if (newest) return newest;
    const sizes = await Promise.all(this.names.map((name) => this.files.size(name)));
    if (!sizes.includes(null)) {
      const what = `Both copies of this page's ${this.stem} are damaged: remove the page's stored data in the browser's settings`;
      throw new DeviceError("storage", what);
    }
    return undefined;
  }

  private async readCopy(name: string): Promise<Copy<Record> | null> {
    const data = await this.files.read(name);
    if (data === null) return null;
    try {
      const { number, record } = unseal(data);
      return { name, number: asCount(number), record: this.check(record!) };
    } catch {
      return null; // torn, or damaged
    }
  }
}

function seal(number: number, record: unknown): Bytes {
  const text = new TextEncoder().encode(JSON.stringify({ number, record }));
  return new TextEncoder().encode(`${crc32(text)} ${new TextDecoder().decode(text)}\n`);
}

function unseal(data: Bytes): { [key: string]: Json } {
  const end = data.at(-1) === 10 ? -1 : data.length;
  const text = data.slice(9, end);
  if (new TextDecoder().decode(data.slice(0, 9)) !== `${crc32(text)} `) throw new TypeError("checksum");
  return asTable(parseJson(text));
}

/** The checksum as Python's zlib makes it, in eight hex digits. */
export function crc32(data: Uint8Array): string {
  let sum = ~0;
  for (const byte of data) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return (~sum >>> 0).toString(16).padStart(8, "0");
}
