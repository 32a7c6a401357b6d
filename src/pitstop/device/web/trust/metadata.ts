/** One file of TUF metadata: read, and verified by the keys of a role. */

import { asCount, asList, asTable, asText, canonical, fromHex, own, parseJson, sha256 } from "./canonical.js";
import type { Bytes, Json, Table } from "./canonical.js";
import { DeviceError, untrusted } from "./errors.js";

/** Who must sign. */
export interface Role {
  keys: Table; // by key id
  keyids: string[];
  threshold: number;
}

/** What one file says of another one. */
export interface MetaFile {
  version: number;
  length: number | undefined; // bytes
  sha256: string | undefined;
}

export interface Metadata {
  name: string; // of the role
  signed: Table;
  version: number;
  expires: number; // seconds since 1970
  payload: Bytes; // what the signatures cover
  signatures: Map<string, string>; // by key id
}

const TIME = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/;

/** Read a file of metadata; nothing of it is trusted yet. */
export function parse(data: Uint8Array, name: string, type = name): Metadata {
  return wellFormed(`${name}.json`, () => {
    const file = asTable(parseJson(data));
    const signed = asTable(file.signed);
    if (signed._type !== type || !/^1\.\d+(\.\d+)?$/.test(asText(signed.spec_version))) {
      throw new TypeError(`expected ${type} of version 1 of the specification`);
    }
    const signatures = new Map<string, string>();
    for (const one of asList(file.signatures).map(asTable)) {
      const keyid = asText(one.keyid);
      if (signatures.has(keyid)) throw new TypeError("a key signed twice");
      signatures.set(keyid, asText(one.sig));
    }
    const version = asCount(signed.version, 1);
    return { name, signed, version, expires: seconds(signed.expires), payload: canonical(signed), signatures };
  });
}

/** Seconds since 1970 of a time as TUF writes it. */
export function seconds(time: Json | undefined): number {
  const found = TIME.test(asText(time)) ? Date.parse(time as string) / 1000 : NaN;
  if (Number.isNaN(found)) throw new TypeError(`${String(time)} is no time`);
  return found;
}

/** What a role of a root, or a delegated one, is signed by. */
export function roleOf(role: Table, keys: Json | undefined): Role {
  const keyids = asList(role.keyids).map(asText);
  return { keys: asTable(keys), keyids, threshold: asCount(role.threshold, 1) };
}

/** Refuse metadata that too few keys of its role have signed. */
export async function verify(metadata: Metadata, role: Role): Promise<void> {
  const good = new Set<string>(); // public keys: one under two ids counts once
  for (const keyid of role.keyids) {
    const [key, signature] = [own(role.keys, keyid), metadata.signatures.get(keyid)];
    if (key === undefined || signature === undefined) continue;
    const found = await signer(asTable(key), signature, metadata.payload);
    if (found) good.add(found);
  }
  if (good.size < role.threshold) {
    const needed = `${role.threshold} ${role.threshold > 1 ? "are" : "is"} needed`;
    untrusted(`${metadata.name}.json is signed by ${good.size} of its keys, ${needed}: the repository fails verification`);
  }
}

/** The public key, if this is its signature. */
async function signer(key: Table, signature: string, payload: Bytes): Promise<string | null> {
  if (key.keytype !== "ed25519" || key.scheme !== "ed25519") return null;
  try {
    const hex = asText(asTable(key.keyval).public);
    const verifier = await crypto.subtle.importKey("raw", fromHex(hex), "Ed25519", false, ["verify"]);
    return (await crypto.subtle.verify("Ed25519", verifier, fromHex(signature), payload)) ? hex.toLowerCase() : null;
  } catch (error) {
    if ((error as Error).name !== "NotSupportedError") return null; // no key, or no signature
    const what = "This browser cannot verify signatures (Ed25519), so it cannot update: bring it up to date";
    throw new DeviceError("refused", what, { cause: error });
  }
}

export function metaFile(value: Json | undefined): MetaFile {
  const table = asTable(value);
  return {
    version: asCount(table.version, 1),
    length: table.length === undefined ? undefined : asCount(table.length),
    sha256: table.hashes === undefined ? undefined : asText(asTable(table.hashes).sha256),
  };
}

/** Refuse bytes that are not those another file speaks of. */
export async function matches(data: Bytes, meta: Omit<MetaFile, "version">, what: string): Promise<void> {
  if (meta.length !== undefined && data.length !== meta.length) {
    untrusted(`${what} has ${data.length} bytes, ${meta.length} were signed for`);
  }
  if (meta.sha256 !== undefined && (await sha256(data)) !== meta.sha256) {
    untrusted(`${what} has another SHA-256 than was signed for`);
  }
}

/** Say in one way what is wrong with metadata that cannot be read. */
export function wellFormed<Result>(what: string, read: () => Result): Result {
  try {
    return read();
  } catch (error) {
    if (error instanceof DeviceError) throw error;
    throw new DeviceError("untrusted", `${what} is malformed: ${(error as Error).message}`, { cause: error });
  }
}
