/** The last step of `make web`: the plain files, and a service worker that knows every file of this very build. */

import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const WEB = fileURLToPath(new URL(".", import.meta.url));
const DIST = join(WEB, "dist");
const PLAIN = /\.(html|css|svg|png|webmanifest)$/;
const SERVICE_WORKER = "service_worker.js"; // at the top: a service worker answers for what lies below it
const APPS = "native/"; // for apps; no page asks for it

for (const name of readdirSync(join(WEB, "page"))) {
  if (PLAIN.test(name)) copyFileSync(join(WEB, "page", name), join(DIST, name));
}

const files = {};
for (const entry of readdirSync(DIST, { recursive: true, withFileTypes: true })) {
  const path = relative(DIST, join(entry.parentPath, entry.name));
  if (!entry.isFile() || path.endsWith(SERVICE_WORKER) || path.startsWith(APPS)) continue;
  files[path] = createHash("sha256").update(readFileSync(join(DIST, path))).digest("hex");
}
const sorted = Object.fromEntries(Object.entries(files).sort());
const source = readFileSync(join(DIST, "page", SERVICE_WORKER), "utf8");
const version = createHash("sha256").update(JSON.stringify(sorted)).update(source).digest("hex").slice(0, 16);
const shell = JSON.stringify({ version, files: sorted }, null, 1);
writeFileSync(join(DIST, SERVICE_WORKER), `self.SHELL = ${shell};\n${source}`);
