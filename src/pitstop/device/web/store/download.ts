/** How files come out of a repository: small ones whole, blobs piece by piece over any number of cuts. */

import { sha256 } from "../trust/canonical.js";
import type { Bytes } from "../trust/canonical.js";
import { DeviceError, untrusted } from "../trust/errors.js";
import type { Files } from "./files.js";
import { PIECE } from "./manifest.js";
import type { Artifact } from "./manifest.js";

const RETRIES = 4; // in a row that bring nothing new
const PAUSE = 500; // ms before the first retry; doubled for each in a row
const TEMPORARY = [408, 416, 425, 429, 500, 502, 503, 504];

/** The network failed in a way that may pass. */
class Interrupted extends Error {}

/** A piece is not the one that was signed for. */
class WrongPiece extends Error {}

/** A repository on any static web server. */
export class Repository {
  /** `pause` waits between attempts. */
  constructor(
    private address: string,
    private pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms)),
  ) {}

  /** Read a small file; null if there is none. */
  async file(path: string, limit: number): Promise<Bytes | null> {
    try {
      const response = await this.request(path, {});
      if (response.status === 403 || response.status === 404) return null;
      if (!response.ok) throw new Interrupted(`the server answered ${response.status}`);
      const parts: Bytes[] = [];
      let size = 0;
      for await (const part of body(response)) {
        size += part.length;
        if (size > limit) untrusted(`${path} has more than the ${limit} bytes that are allowed`);
        parts.push(part);
      }
      return new Uint8Array(await new Blob(parts).arrayBuffer());
    } catch (error) {
      throw error instanceof Interrupted ? unreachable(error) : error;
    }
  }

  /**
   * Bring a blob into a partial file, from the last piece of it that is right; a piece counts once it is verified.
   * What came stays for a later run, whatever is thrown.
   */
  async blob(artifact: Artifact, partial: Files, onBytes: (count: number) => void, signal?: AbortSignal): Promise<void> {
    let [piece, failures, wrong] = [await rightPieces(artifact, partial), 0, -1];
    while (piece < artifact.pieces.length) {
      const before = piece;
      try {
        for await (const data of this.pieces(artifact, piece, onBytes, signal)) {
          if ((await sha256(data)) !== artifact.pieces[piece]) throw new WrongPiece();
          await partial.writeAt(artifact.sha256, piece * PIECE, data);
          piece += 1;
        }
      } catch (error) {
        if (error instanceof WrongPiece && wrong !== piece) {
          wrong = piece; // once more
        } else if (error instanceof WrongPiece) {
          untrusted(`Piece ${piece + 1} of ${artifact.name} is not the one that was signed for: ask the publisher`);
        } else if (!(error instanceof Interrupted)) {
          throw error;
        } else {
          failures = piece > before ? 0 : failures + 1;
          if (failures > RETRIES) throw unreachable(error);
          await this.pause(PAUSE * 2 ** failures);
        }
      }
    }
  }

  /** The pieces of a blob from one on, as one answer brings them; the last of them may be missing. */
  private async *pieces(
    artifact: Artifact,
    first: number,
    onBytes: (count: number) => void,
    signal?: AbortSignal,
  ): AsyncGenerator<Bytes> {
    const start = first * PIECE;
    const range = start ? { headers: { Range: `bytes=${start}-` } } : {};
    const response = await this.request(`blobs/sha256/${artifact.sha256}`, { ...range, ...(signal && { signal }) });
    let skip = start - extent(response, artifact); // a server without ranges begins again
    if (skip < 0) throw new Interrupted("the server answered with another part than asked for");
    let end = start;
    let [piece, filled] = [new Uint8Array(0), 0];
    for await (const part of body(response)) {
      onBytes(part.length);
      let data = part.subarray(Math.min(skip, part.length));
      skip -= part.length - data.length;
      while (data.length) {
        if (filled === piece.length) [piece, filled] = [new Uint8Array(Math.min(PIECE, artifact.size - end)), 0];
        if (piece.length === 0) untrusted(`${artifact.name} has more than the ${artifact.size} bytes that were signed for`);
        const fits = data.subarray(0, piece.length - filled);
        piece.set(fits, filled);
        filled += fits.length;
        data = data.subarray(fits.length);
        if (filled < piece.length) continue;
        end += filled;
        yield piece;
      }
    }
    if (end < artifact.size) throw new Interrupted(`${artifact.name} stays incomplete`);
  }

  private async request(path: string, options: RequestInit): Promise<Response> {
    try {
      return await fetch(`${this.address.replace(/\/+$/, "")}/${path}`, { ...options, cache: "no-store" });
    } catch (error) {
      throw interruption(error);
    }
  }
}

/** How many pieces of a partial file are whole and right, from the first on. */
async function rightPieces(artifact: Artifact, partial: Files): Promise<number> {
  for (let piece = 0; piece < artifact.pieces.length; piece++) {
    const end = Math.min((piece + 1) * PIECE, artifact.size);
    const data = await partial.read(artifact.sha256, piece * PIECE, end);
    if (data === null || (await sha256(data)) !== artifact.pieces[piece]) return piece;
  }
  return artifact.pieces.length;
}

/** The offset of the first byte that a server sends of a blob. */
function extent(response: Response, artifact: Artifact): number {
  const { status, headers } = response;
  if (TEMPORARY.includes(status)) throw new Interrupted(`the server answered ${status}`);
  if (status >= 400) {
    const what = `The repository does not hand out ${artifact.name} (${status})`;
    throw new DeviceError("broken", `${what}: the publisher has to copy all of it to this address, blobs first`);
  }
  const part = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(headers.get("Content-Range") ?? "");
  if (status !== 200 && (status !== 206 || part === null)) throw new Interrupted(`the server answered ${status}`);
  const total = status === 206 ? part![2]! : headers.get("Content-Encoding") ? "*" : headers.get("Content-Length") ?? "*";
  if (total !== "*" && Number(total) !== artifact.size) {
    untrusted(`The repository has ${total} bytes of ${artifact.name}, ${artifact.size} were signed for`);
  }
  return status === 206 ? Number(part![1]) : 0;
}

async function* body(response: Response): AsyncGenerator<Bytes> {
  const reader = response.body?.getReader();
  if (!reader) return;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error: unknown) => {
        throw interruption(error);
      });
      if (done) return;
      yield value as Bytes;
    }
  } finally {
    await reader.cancel().catch(() => undefined); // it may have failed already
  }
}

/** What a person ended passes on as it is. */
function interruption(error: unknown): unknown {
  return (error as Error).name === "AbortError" ? error : new Interrupted((error as Error).message, { cause: error });
}

function unreachable(cause: Error): DeviceError {
  const what = `The repository cannot be read (${cause.message})`;
  return new DeviceError("unreachable", `${what}: check the network and update again; what was fetched is kept`, { cause });
}
