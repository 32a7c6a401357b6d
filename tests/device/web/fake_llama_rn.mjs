// llama.rn as its sources describe it, without a model: one state for all, which a change of adapters does not touch.
// Every word of an answer names the adapters that the state it was made from was computed under.

export async function initLlama({ model }) {
  if (!model.endsWith(".gguf")) throw new Error("failed to load model");
  return new Context();
}

class Context {
  model = { size: 1000 };
  #state = []; // of each token: its text, and what it was computed under
  #under = "base";
  #interrupted = false;

  async applyLoraAdapters([{ path }]) {
    if (!path.endsWith(".gguf")) throw new Error("failed to apply lora adapters");
    this.#under = path.split("/").at(-1).replace(".gguf", "");
  }

  async removeLoraAdapters() {
    this.#under = "base";
  }

  async clearCache() {
    this.#state = [];
  }

  async stopCompletion() {
    this.#interrupted = true;
  }

  async release() {}

  async completion({ messages, n_predict: most, stop, response_format: format }, onToken) {
    this.#interrupted = false;
    const prompt = messages.map((message) => message.content).join(" ").split(" ");
    const same = prompt.findIndex((word, at) => this.#state[at]?.word !== word);
    const kept = Math.min(same < 0 ? prompt.length : same, prompt.length - 1);
    this.#state = this.#state.slice(0, kept);
    for (const word of prompt.slice(kept)) this.#state.push({ word, under: this.#under });
    const schema = format && JSON.stringify({ schema: Object.keys(format.json_schema.schema) });
    const spoken = await this.#speak(most, stop, schema, onToken);
    return {
      ...spoken,
      interrupted: this.#interrupted,
      context_full: false,
      tokens_evaluated: prompt.length,
      timings: { prompt_n: prompt.length - kept },
    };
  }

  async #speak(most, stop, schema, onToken) {
    let text = "";
    let count = 0;
    let stopping = "";
    while (count < most && !this.#interrupted && stopping === "") {
      await new Promise(setImmediate);
      const word = schema ?? ` ${[...new Set(this.#state.map((one) => one.under))].join("+")}${count}`;
      this.#state.push({ word, under: this.#under });
      count++;
      stopping = schema ? "end" : (stop.find((one) => (text + word).includes(one)) ?? "");
      if (schema || stopping === "") onToken({ token: word });
      text += word;
    }
    return { text, tokens_predicted: count, stopped_limit: count === most ? 1 : 0, stopping_word: stopping };
  }
}
