// The page's engine in node: reads a call per line of JSON, writes its result per line. The store's files are plain ones.
import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

import { initLlama } from "./fake_llama_rn.mjs";

const [, , engineFolder, workerScript] = process.argv;
// Emscripten 3.1 takes node for an older one: without fetch, and with these two even in an ES module.
delete globalThis.fetch;
Object.assign(globalThis, { require: createRequire(import.meta.url), __dirname: engineFolder });
const { openEngine } = await import(pathToFileURL(`${engineFolder}/wasm.js`));
const { NativeEngine } = await import(pathToFileURL(`${engineFolder}/../native/llama_rn.js`));

// What the browser's store gives: a handle that opens for reading in place.
function modelFile({ path, sha256, baseSha256 }) {
  const createSyncAccessHandle = async () => {
    const file = openSync(path);
    return {
      getSize: () => fstatSync(file).size,
      read: (buffer, { at }) => readSync(file, buffer, 0, buffer.length, at),
      close: () => closeSync(file),
    };
  };
  return { sha256, baseSha256, path, handle: { createSyncAccessHandle } };
}

let engine = null;
const calls = {
  async open({ threads, memoryLimit, program = "engine" }) {
    // Node takes a worker of this package for an ES module by its name, emscripten writes it for either world.
    const files = (name) =>
      name.endsWith(".worker.js") ? workerScript : pathToFileURL(`${engineFolder}/${name.replace("engine", program)}`).href;
    const local = (name) => (files(name).startsWith("file:") && !name.endsWith(".js") ? new URL(files(name)).pathname : files(name));
    engine = await openEngine({ threads, memoryLimit, files: local });
  },
  openNative() {
    engine = new NativeEngine(initLlama);
  },
  load: ({ base, prompting, contextLength }) => engine.load(modelFile(base), prompting, contextLength),
  addAdapter: ({ name, file, scale, prompting }) => engine.addAdapter(name, modelFile(file), scale, prompting),
  removeAdapter: ({ name }) => engine.removeAdapter(name),
  memory: () => engine.memory(),
  render: ({ prompting, messages }) => engine.render(prompting, messages),
  tokenize: ({ text }) => engine.tokenize(text),
  close: () => engine.close(),
  async logits({ adapter, conversation, tokens }) {
    const row = await engine.logits(adapter, conversation, tokens);
    return Buffer.from(row.buffer).toString("base64");
  },
  async generate({ cancelAfter, leaveAfter, ...ask }) {
    const cancel = new AbortController();
    const answer = engine.generate({ ...ask, signal: cancel.signal });
    const pieces = [];
    for (;;) {
      const { done, value } = await answer.next();
      if (done) return { pieces, usage: value };
      pieces.push(value);
      if (pieces.length === cancelAfter) cancel.abort();
      if (pieces.length === leaveAfter) return { pieces, usage: (await answer.return()).value ?? null };
    }
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...given } = JSON.parse(line);
  const reply = await Promise.resolve()
    .then(() => calls[call](given))
    .then(
      (value) => ({ value: value ?? null }),
      (error) => ({ error: error.name ?? String(error), message: String(error.message) }),
    );
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}
process.exit();
