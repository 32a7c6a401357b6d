/** Canonical JSON, the form that is signed; and what reads JSON that nobody vouches for yet. */

export type Json = null | boolean | number | string | Json[] | Table;
export type Table = { [key: string]: Json };
export type Bytes = Uint8Array<ArrayBuffer>;

/** Read UTF-8 JSON. Throws whatever JSON.parse and TextDecoder do. */
export function parseJson(data: Uint8Array): Json {
  return JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data)) as Json;
}

/** The bytes of a value that a signature covers. Throws for what has no canonical form. */
export function canonical(value: Json): Bytes {
  return new TextEncoder().encode(write(value));
}

function write(value: Json): string {
  if (typeof value === "string") {
    // Encoded, every lone surrogate would be the same bytes.
    if (/\p{Surrogate}/u.test(value)) throw new TypeError("a text is not Unicode");
    return `"${value.replace(/["\\]/g, "\\$&")}"`;
  }
  if (typeof value === "number" && !Number.isSafeInteger(value)) throw new TypeError(`${value} is no whole number`);
  if (Array.isArray(value)) return `[${value.map(write).join()}]`;
  if (value === null || typeof value !== "object") return String(value);
  const keys = Object.keys(value).sort(byCodePoint);
  return `{${keys.map((key) => `${write(key)}:${write(value[key]!)}`).join()}}`;
}

/** JavaScript's own order is that of UTF-16, where characters beyond U+FFFF come too early. */
function byCodePoint(a: string, b: string): number {
  const [left, right] = [[...a], [...b]];
  for (let index = 0; index < left.length && index < right.length; index++) {
    const difference = left[index]!.codePointAt(0)! - right[index]!.codePointAt(0)!;
    if (difference) return difference;
  }
  return left.length - right.length;
}

/** A value of a table by its own keys only: "constructor" is in no table. */
export function own<Value>(table: { [key: string]: Value }, key: string): Value | undefined {
  return Object.hasOwn(table, key) ? table[key] : undefined;
}

export function asTable(value: Json | undefined): Table {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new TypeError("expected a table");
  return value;
}

export function asList(value: Json | undefined): Json[] {
  if (!Array.isArray(value)) throw new TypeError("expected a list");
  return value;
}

export function asText(value: Json | undefined): string {
  if (typeof value !== "string") throw new TypeError("expected a text");
  return value;
}

/** A whole number of at least this. */
export function asCount(value: Json | undefined, least = 0): number {
  if (!Number.isSafeInteger(value) || (value as number) < least) throw new TypeError("expected a whole number");
  return value as number;
}

export async function sha256(data: Bytes): Promise<string> {
  return toHex(new Uint8Array(await crypto.subtle.digest("SHA-256", data)));
}

export function isSha256(text: string): boolean {
  return /^[0-9a-f]{64}$/.test(text);
}

function toHex(data: Uint8Array): string {
  return Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function fromHex(text: string): Bytes {
  if (!/^([0-9a-f]{2})*$/i.test(text)) throw new TypeError("expected hex digits");
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}
