/** A static web server with ranges, and a hook to misbehave with blobs. */

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";

/** Answers a request itself, if it returns true. */
export type Hook = (request: IncomingMessage, response: ServerResponse, file: string) => boolean;

export class StaticServer {
  readonly ranges: string[] = []; // of blob requests
  onBlob: Hook = () => false;

  private server = createServer((request, response) => {
    const file = join(this.folder, new URL(request.url!, "http://localhost").pathname);
    const isBlob = request.url!.startsWith("/blobs/");
    if (isBlob) this.ranges.push(request.headers.range ?? "");
    if (!existsSync(file)) return void response.writeHead(404).end();
    if (isBlob && this.onBlob(request, response, file)) return;
    const size = statSync(file).size;
    const start = startOf(request);
    const partial = { "Content-Length": size - start, "Content-Range": `bytes ${start}-${size - 1}/${size}` };
    response.writeHead(start ? 206 : 200, start ? partial : { "Content-Length": size });
    createReadStream(file, { start }).pipe(response);
  });

  constructor(private folder: string) {}

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  close(): void {
    this.server.closeAllConnections();
    this.server.close();
  }
}

export function startOf(request: IncomingMessage): number {
  return Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
}

/** Send the rest of a file as its request asks for it, with a change to its bytes, or cut off. */
export function send(request: IncomingMessage, response: ServerResponse, data: Buffer, end = data.length): true {
  const start = startOf(request);
  response.writeHead(start ? 206 : 200, {
    "Content-Length": data.length - start,
    ...(start && { "Content-Range": `bytes ${start}-${data.length - 1}/${data.length}` }),
  });
  if (end >= data.length) response.end(data.subarray(start));
  else response.write(data.subarray(start, Math.max(end, start)), () => setTimeout(() => response.destroy(), 20));
  return true;
}
