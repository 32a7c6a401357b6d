/** What a bundle and a channel say of themselves: `src/pitstop/bundle/manifest.py` and `channel.py` as a phone reads them. */

import type { Prompting } from "../engine/engine.js";
import { asCount, asList, asTable, asText, isSha256, parseJson } from "../trust/canonical.js";
import type { Bytes, Json } from "../trust/canonical.js";
import { DeviceError } from "../trust/errors.js";

export const PIECE = 16 << 20; // bytes of a file that are verified, and fetched again, at once

/** One file: the name is for people, the digest is the identity. */
export interface Artifact {
  role: "base" | "adapter" | "merged" | "part";
  format: string; // "gguf", "onnx"
  precision: string;
  name: string;
  sha256: string;
  size: number; // bytes
  pieces: string[]; // SHA-256 of each PIECE
}

/** `bundle.json`: one unit of delivery. */
export interface Bundle {
  kind: "base" | "adapter";
  name: string; // also the model name a person picks
  version: string;
  counter: number; // only ever rises for a name
  license: string;
  base_name: string;
  base_sha256: string; // the base file this runs on
  prompting: Prompting;
  context_length: number; // tokens
  artifacts: Artifact[];
  scale: number; // multiplier of the adapter at run time
  compatible: string[];
  measured: Record<string, number>;
  reports: Record<string, string>;
}

/** One bundle a channel offers. */
export interface Pin {
  path: string; // of the manifest in the repository
  sha256: string; // of the manifest's bytes
  counter: number;
}

const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;
const VERSION = /^[0-9]{1,6}(\.[0-9]{1,6}){0,3}$/;
const MANIFEST = /^bundles\/[a-z0-9_-]{1,64}\/([a-z0-9][a-z0-9._-]{0,63})\/[0-9.]{1,27}\.json$/;

/** Read a manifest; whatever is not well formed in it is refused. */
export function parseBundle(data: Bytes, where: string): Bundle {
  return record(where, () => {
    const of = fields(parseJson(data), {
      kind: (value) => oneOf(value, ["base", "adapter"] as const),
      name: (value) => matching(value, NAME),
      version: (value) => matching(value, VERSION),
      counter: (value) => asCount(value, 1),
      license: asText,
      base_name: asText,
      base_sha256: asSha256,
      prompting: asPrompting,
      context_length: (value) => asCount(value),
      artifacts: (value) => asList(value).map(asArtifact),
      scale: (value) => (value === undefined ? 1 : asNumber(value)),
      compatible: (value) => asList(value ?? []).map(asText),
      measured: (value) => entries(value ?? {}, asNumber),
      reports: (value) => entries(value ?? {}, asText),
    });
    checkRoles(of);
    return of;
  });
}

/** Read a channel: its bundles by name. */
export function parseChannel(data: Bytes, name: string): Record<string, Pin> {
  const where = `channels/${name}.json`;
  return record(where, () => {
    const channel = fields(parseJson(data), { name: asText, bundles: (value) => entries(value, asPin) });
    if (channel.name !== name) throw new DeviceError("untrusted", `${where} is the channel ${channel.name}`);
    for (const [bundle, pin] of Object.entries(channel.bundles)) {
      if (MANIFEST.exec(pin.path)?.[1] !== bundle) throw new TypeError(`${pin.path} is no manifest of ${bundle}`);
    }
    return channel.bundles;
  });
}

export function manifestPath(bundle: Bundle): string {
  return `bundles/${bundle.kind}/${bundle.name}/${bundle.version}.json`;
}

/** The one file that runs: of a base the one named, of an adapter the attached one. */
export function artifactOf(bundle: Bundle): Artifact {
  return bundle.artifacts.find(({ role, sha256 }) =>
    bundle.kind === "base" ? sha256 === bundle.base_sha256 : role === "adapter" || role === "merged",
  )!;
}

function checkRoles(bundle: Bundle): void {
  const roles = bundle.artifacts.map(({ role }) => role);
  const adapters = roles.filter((role) => role === "adapter" || role === "merged");
  if (bundle.kind === "base" && !roles.includes("base")) throw new TypeError("no artifact with the role base");
  if (bundle.kind === "base" && !artifactOf(bundle)) throw new TypeError("base_sha256 is none of its artifacts");
  if (bundle.kind === "adapter" && adapters.length !== 1) throw new TypeError("expected one adapter or merged artifact");
  if (adapters.includes("merged") && bundle.scale !== 1) throw new TypeError("the scale of a merged model must be 1");
}

function asArtifact(value: Json): Artifact {
  const of = fields(value, {
    role: (role) => oneOf(role, ["base", "adapter", "merged", "part"] as const),
    format: asText,
    precision: asText,
    name: (name) => matching(name, /^(?!\.{1,2}$)[^/\\]+$/s),
    sha256: asSha256,
    size: (size) => asCount(size, 1),
    pieces: (pieces) => asList(pieces ?? []).map(asSha256),
  });
  const count = Math.ceil(of.size / PIECE);
  if (of.pieces.length === 0 && count === 1) of.pieces.push(of.sha256);
  if (of.pieces.length === 0) {
    throw new TypeError(`${of.name} is listed without pieces: the publisher has to pack it with a newer pitstop`);
  }
  if (of.pieces.length !== count) throw new TypeError(`${of.name} has ${of.pieces.length} pieces, expected ${count}`);
  if (count === 1 && of.pieces[0] !== of.sha256) throw new TypeError(`the piece of ${of.name} is not its digest`);
  return of;
}

function asPrompting(value: Json | undefined): Prompting {
  return fields(value, {
    chat_template: asText,
    bos_token: asText,
    eos_token: asText,
    stop: (stop) => asList(stop ?? []).map(asText),
    system: (system) => (system === undefined || system === null ? null : asText(system)),
  });
}

function asPin(value: Json): Pin {
  return fields(value, { path: asText, sha256: asSha256, counter: (counter) => asCount(counter, 1) });
}

/** Read each field of a table; an unknown one is refused, as on a board. */
function fields<Readers extends Record<string, (value: Json | undefined) => unknown>>(
  value: Json | undefined,
  readers: Readers,
): { [Name in keyof Readers]: ReturnType<Readers[Name]> } {
  const table = asTable(value);
  for (const name of Object.keys(table)) {
    if (!Object.hasOwn(readers, name)) throw new TypeError(`${name}: no such key`);
  }
  const read = Object.entries(readers).map(([name, reader]) => {
    try {
      return [name, reader(table[name])];
    } catch (error) {
      if (error instanceof TypeError) error.message = `${name}: ${error.message}`;
      throw error;
    }
  });
  return Object.fromEntries(read) as { [Name in keyof Readers]: ReturnType<Readers[Name]> };
}

function entries<Value>(value: Json | undefined, read: (value: Json) => Value): Record<string, Value> {
  return Object.fromEntries(Object.entries(asTable(value)).map(([name, one]) => [name, read(one)]));
}

function matching(value: Json | undefined, pattern: RegExp): string {
  const text = asText(value);
  if (!pattern.test(text)) throw new TypeError(`${JSON.stringify(text)} is not allowed`);
  return text;
}

function oneOf<Choice extends string>(value: Json | undefined, choices: readonly Choice[]): Choice {
  const found = choices.find((choice) => choice === value);
  if (found === undefined) throw new TypeError(`expected one of ${choices.join(", ")}`);
  return found;
}

function asSha256(value: Json | undefined): string {
  const text = asText(value);
  if (!isSha256(text)) throw new TypeError(`${JSON.stringify(text)} is no SHA-256`);
  return text;
}

function asNumber(value: Json | undefined): number {
  if (typeof value !== "number") throw new TypeError("expected a number");
  return value;
}

function record<Result>(where: string, read: () => Result): Result {
  try {
    return read();
  } catch (error) {
    if (error instanceof DeviceError) throw error;
    throw new DeviceError("broken", `${where} is malformed: ${(error as Error).message}`, { cause: error });
  }
}
