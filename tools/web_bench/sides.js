// Both sides in one page: the same files from the browser's store, the same prompts, times as the page sees them.
import { Wllama } from "/wllama/index.js";

export async function store(names) {
  const root = await navigator.storage.getDirectory();
  for (const name of names) {
    const file = await (await root.getFileHandle(name, { create: true })).createWritable();
    await (await fetch(`/models/${name}`)).body.pipeTo(file);
  }
}

export class Ours {
  #worker = new Worker("/bench/ours.js", { type: "module" });
  #waiting = new Map();
  #count = 0;

  constructor() {
    this.#worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.#waiting.get(data.number);
      if ("error" in data) reject(new Error(data.error));
      else resolve(data.value);
    };
  }

  call(call, given = {}) {
    const number = ++this.#count;
    return new Promise((resolve, reject) => {
      this.#waiting.set(number, { resolve, reject });
      this.#worker.postMessage({ number, call, given });
    });
  }

  async ask(prompt, tokens, adapter = null, conversation = "one") {
    const begun = performance.now();
    const usage = await this.call("ask", { adapter, conversation, prompt, tokens });
    return {
      prompt: usage.promptTokens - usage.reusedTokens,
      first: usage.firstTokenSeconds * 1000,
      decode: (usage.completionTokens - 1) / usage.decodeSeconds,
      whole: performance.now() - begun,
    };
  }
}

export class Theirs {
  #wllama = new Wllama({ default: "/wllama/wasm/wllama.wasm" });
  #adapters;

  async open({ threads, base, adapters, contextLength }) {
    const root = await navigator.storage.getDirectory();
    const files = await Promise.all([base, ...adapters].map(async (name) => (await root.getFileHandle(name)).getFile()));
    this.#adapters = adapters;
    const part = (number) => String(number).padStart(5, "0");
    const path = (number) => `models/model-${part(number + 2)}-of-${part(files.length)}.gguf`;
    await this.#wllama.loadModel(files, {
      n_ctx: contextLength, n_threads: threads, n_gpu_layers: 0,
      lora_adapters: adapters.map((_, number) => ({ path: path(number), scale: 0 })),
    });
  }

  // Every adapter is named every time: those left out would stay as they were.
  async ask(prompt, tokens, adapter = null) {
    const times = [];
    const begun = performance.now();
    const lora = this.#adapters.map((name, id) => ({ id, scale: name === adapter ? 1 : 0 }));
    await this.#wllama.createCompletion({
      prompt, max_tokens: tokens, temperature: 0, lora, stream: true, ignore_eos: true,
      onData: () => times.push(performance.now()),
    });
    const whole = performance.now() - begun;
    return { first: times[0] - begun, decode: ((tokens - 1) * 1000) / (times[tokens - 1] - times[0]), whole };
  }

  close() {
    return this.#wllama.exit();
  }
}
