/** A blob of three pieces over a network that fails: what comes twice is never more than a piece. */

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, beforeEach, test } from "node:test";

import { Repository } from "../../../src/pitstop/device/web/store/download.js";
import { Files } from "../../../src/pitstop/device/web/store/files.js";
import { PIECE } from "../../../src/pitstop/device/web/store/manifest.js";
import type { Artifact } from "../../../src/pitstop/device/web/store/manifest.js";
import { NodeFolder } from "./node_folder.js";
import { StaticServer, send, startOf } from "./static_server.js";

const made = join(process.env.PITSTOP_REPOSITORIES!, "large");
const artifact = JSON.parse(readFileSync(join(made, "artifact.json"), "utf8")) as Artifact;
const data = readFileSync(join(made, "blobs/sha256", artifact.sha256));
const folder = mkdtempSync(join(tmpdir(), "pitstop-pieces-"));
const partial = join(folder, artifact.sha256);
const server = new StaticServer(made);
let repository: Repository;

before(async () => {
  repository = new Repository(await server.listen(), async () => undefined);
});
after(() => {
  server.close();
  rmSync(folder, { recursive: true });
});
beforeEach(() => {
  for (const name of readdirSync(folder)) rmSync(join(folder, name));
  server.ranges.length = 0;
  server.onBlob = () => false;
});

/** Fetch what is missing; returns how many bytes came. */
async function fetchBlob(onReceived = (_: number): void => undefined, signal?: AbortSignal): Promise<number> {
  let received = 0;
  const count = (bytes: number): void => onReceived((received += bytes));
  await repository.blob(artifact, new Files(new NodeFolder(folder).handle), count, signal);
  assert.ok(readFileSync(partial).equals(data));
  return received;
}

test("the blob has three pieces, and the last one is short", () => {
  assert.deepEqual([artifact.pieces.length, Math.ceil(artifact.size / PIECE)], [3, 3]);
  assert.equal(data.length, artifact.size);
  assert.notEqual(artifact.size % PIECE, 0);
});

test("a whole blob takes one request", async () => {
  assert.equal(await fetchBlob(), artifact.size);
  assert.deepEqual(server.ranges, [""]);
});

const CUTS = [1, ...[1, 2].flatMap((edge) => [-1, 0, 1].map((by) => edge * PIECE + by)), artifact.size - 1];

for (const cut of CUTS) {
  test(`a cut after ${cut} bytes costs what came of its piece`, async () => {
    let first = true;
    server.onBlob = (request, response) => {
      const end = first ? cut : data.length;
      first = false;
      return send(request, response, data, end);
    };
    const again = (await fetchBlob()) - artifact.size;
    assert.equal(again, cut % PIECE);
    assert.ok(again <= PIECE);
    const start = Math.floor(cut / PIECE) * PIECE;
    assert.deepEqual(server.ranges, ["", start ? `bytes=${start}-` : ""]);
  });

  test(`a worker that ended after ${cut} bytes were written costs what is not a whole piece`, async () => {
    writeFileSync(partial, data.subarray(0, cut));
    assert.equal(await fetchBlob(), artifact.size - Math.floor(cut / PIECE) * PIECE);
  });
}

test("a byte that was lost in what is here costs its piece and those after it", async () => {
  const changed = Buffer.from(data);
  changed[PIECE + 5]! ^= 1;
  writeFileSync(partial, changed);
  assert.equal(await fetchBlob(), artifact.size - PIECE);
});

test("zeros where bytes were allocated and not written are no pieces", async () => {
  writeFileSync(partial, Buffer.concat([data.subarray(0, PIECE), Buffer.alloc(artifact.size - PIECE)]));
  assert.equal(await fetchBlob(), artifact.size - PIECE);
});

test("a piece that came wrong is fetched once more", async () => {
  const changed = Buffer.from(data);
  changed[PIECE + 5]! ^= 1;
  server.onBlob = (request, response) => send(request, response, startOf(request) ? data : changed);
  await fetchBlob();
  assert.deepEqual(server.ranges, ["", `bytes=${PIECE}-`]);
});

test("a piece that stays wrong is refused, and costs no other", async () => {
  const changed = Buffer.from(data);
  changed[2 * PIECE + 5]! ^= 1;
  server.onBlob = (request, response) => send(request, response, changed);
  await assert.rejects(fetchBlob(), { kind: "untrusted", message: /^Piece 3 of tiny.gguf/ });
  assert.equal(readFileSync(partial).length, 2 * PIECE);
  server.onBlob = () => false;
  assert.equal(await fetchBlob(), artifact.size - 2 * PIECE);
});

test("a server without ranges sends what is here once more", async () => {
  writeFileSync(partial, data.subarray(0, PIECE));
  server.onBlob = (_, response) => {
    response.end(data);
    return true;
  };
  assert.equal(await fetchBlob(), artifact.size);
});

test("more bytes than were signed for are refused", async () => {
  server.onBlob = (request, response) => send(request, response, Buffer.concat([data, Buffer.from("x")]));
  await assert.rejects(fetchBlob(), { kind: "untrusted", message: /were signed for/ });
  server.onBlob = (_, response) => {
    response.writeHead(200, { "Transfer-Encoding": "chunked" });
    response.end(Buffer.concat([data, Buffer.from("x")]));
    return true;
  };
  rmSync(partial, { force: true });
  await assert.rejects(fetchBlob(), { kind: "untrusted", message: /has more than/ });
  assert.equal(readFileSync(partial).length, artifact.size);
});

test("a server that is down is tried again, and then said to be", async () => {
  server.onBlob = (_, response) => {
    response.writeHead(503).end();
    return true;
  };
  await assert.rejects(fetchBlob(), { kind: "unreachable", message: /what was fetched is kept/ });
  assert.equal(server.ranges.length, 5);
});

test("a blob that the publisher forgot", async () => {
  server.onBlob = (_, response) => {
    response.writeHead(404).end();
    return true;
  };
  await assert.rejects(fetchBlob(), { kind: "broken", message: /blobs first/ });
});

test("what a person ends keeps what came", async () => {
  const abort = new AbortController();
  const stop = (received: number): void => void (received > PIECE && abort.abort());
  await assert.rejects(fetchBlob(stop, abort.signal), { name: "AbortError" });
  assert.equal(await fetchBlob(), artifact.size - PIECE);
});
