/**
 * The page without a network, and isolation where the host sends no headers for it.
 *
 * `assemble.mjs` writes the build's version and digests above this code. A version is cached as a whole or not at all:
 * every file is checked against its digest, so a host that is half way through an upload gives no mixture.
 */

interface Shell {
  version: string;
  files: Record<string, string>; // path -> SHA-256
}

const worker = self as unknown as ServiceWorkerGlobalScope & { SHELL: Shell };

const CACHE = `pitstop-${worker.SHELL.version}`;
const CONFIG = "config.json"; // its publisher changes it without a new build
const LATER = /^engine\/engine-(mt|st)\./; // 3 MB each, and a browser needs one of the two
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

worker.addEventListener("install", (event) => event.waitUntil(install()));
worker.addEventListener("activate", (event) => event.waitUntil(activate()));
worker.addEventListener("message", (event) => {
  if (event.data === "replace") event.waitUntil(worker.skipWaiting());
});
worker.addEventListener("fetch", (event) => {
  const path = pathInScope(event.request);
  if (path === null) return;
  event.respondWith(answer(path).then(isolated));
});

async function install(): Promise<void> {
  const cache = await caches.open(CACHE);
  const used = await usedBefore();
  const wanted = Object.keys(worker.SHELL.files).filter((path) => !LATER.test(path) || used.has(path));
  const fetched = await Promise.allSettled([...wanted.map((path) => fetchFile(cache, path)), fetchConfig(cache)]);
  const failed = fetched.find((one) => one.status === "rejected");
  if (failed === undefined) return;
  await caches.delete(CACHE);
  throw failed.reason;
}

async function activate(): Promise<void> {
  for (const name of await caches.keys()) if (name !== CACHE) await caches.delete(name);
  await worker.clients.claim();
}

/** The files of both engines that an earlier version was asked for: without them this one would not run offline. */
async function usedBefore(): Promise<Set<string>> {
  const paths = new Set<string>();
  for (const name of await caches.keys()) {
    for (const request of await (await caches.open(name)).keys()) paths.add(pathInScope(request) ?? "");
  }
  return paths;
}

async function fetchFile(cache: Cache, path: string): Promise<Response> {
  const response = await fetch(urlOf(path), { cache: "no-cache" });
  if (!response.ok) throw new Error(`${path} cannot be had: ${response.status}`);
  const bytes = await response.clone().arrayBuffer();
  if ((await sha256(bytes)) !== worker.SHELL.files[path]) throw new Error(`${path} is of another version of the page`);
  await cache.put(urlOf(path), response.clone());
  return response;
}

async function fetchConfig(cache: Cache): Promise<Response> {
  const response = await fetch(urlOf(CONFIG), { cache: "no-cache" });
  if (!response.ok) throw new Error(`${CONFIG} cannot be had: ${response.status}`);
  await cache.put(urlOf(CONFIG), response.clone());
  return response;
}

async function answer(path: string): Promise<Response> {
  const cache = await caches.open(CACHE);
  const cached = await cache.match(urlOf(path));
  if (path === CONFIG) return fetchConfig(cache).catch((error) => cached ?? Promise.reject(error));
  return cached ?? fetchFile(cache, path);
}

/** The path of a file of this page; null: none of ours, such as a repository's. */
function pathInScope(request: Request): string | null {
  const url = new URL(request.url);
  if (request.method !== "GET" || !url.href.startsWith(worker.registration.scope)) return null;
  const path = url.pathname.slice(new URL(worker.registration.scope).pathname.length) || "index.html";
  return path in worker.SHELL.files || path === CONFIG ? path : null;
}

function urlOf(path: string): string {
  return new URL(path, worker.registration.scope).href;
}

function isolated(response: Response): Response {
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, headers });
}

async function sha256(bytes: ArrayBuffer): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
