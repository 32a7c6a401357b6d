// The page's engine in a worker, as the page has it: calls come as messages, files from the browser's own store.
import { openEngine } from "/dist/engine/wasm.js";

let engine;
const calls = {
  async open({ threads, base, adapters, prompting, contextLength }) {
    engine = await openEngine({ threads });
    await engine.load(await stored(base), prompting, contextLength);
    for (const [name, file] of Object.entries(adapters)) await engine.addAdapter(name, await stored(file), 1, prompting);
  },
  async ask({ adapter, conversation, prompt, tokens }) {
    const answer = engine.generate({
      adapter, conversation, maxTokens: tokens, messages: [{ role: "user", content: prompt }],
    });
    for (;;) {
      const { done, value } = await answer.next();
      if (done) return value;
    }
  },
  memory: () => engine.memory(),
  close: () => engine.close(),
};

async function stored({ name, sha256 }) {
  const root = await navigator.storage.getDirectory();
  return { sha256, handle: await root.getFileHandle(name) };
}

onmessage = async ({ data: { number, call, given } }) => {
  try {
    postMessage({ number, value: await calls[call](given) });
  } catch (error) {
    postMessage({ number, error: String(error) });
  }
};
