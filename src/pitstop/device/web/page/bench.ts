/** The bench page: what the visitor's own browser makes of what is installed there, to look at and to copy. */

import type { Usage } from "../engine/engine.js";
import { Client } from "./client.js";
import { byId, element, size, milliseconds } from "./elements.js";
import type { Model, Report, State } from "./messages.js";
import { missing, startShell } from "./shell.js";

const REPEATS = 3;
const ANSWER = 48; // tokens
const PROMPT = "Tell a long story about a river, a mill and the people who live there. ".repeat(12);
const SHORT = "Name three colours.";

interface Speed {
  model: string;
  prefill_tokens_per_second: number;
  decode_tokens_per_second: number;
}

interface Swaps {
  same_model_first_token_seconds: number; // a conversation that was read before
  swap_first_token_seconds: number | null; // the same, with another model asked in between; null: no adapter
  new_model_first_token_seconds: number | null; // of a model that has not read it
}

interface Figures extends Swaps {
  when: string;
  browser: string;
  cores: number;
  threads: number;
  release: string | null;
  base_bytes: number;
  load_seconds: number | null;
  engine_memory_bytes: number;
  speeds: Speed[]; // medians, as all figures
}

class Bench {
  #client: Client;
  #memory = 0;
  #count = 0;

  constructor(private readonly state: State, client: Client) {
    this.#client = client;
  }

  async run(progress: (words: string) => void): Promise<Figures> {
    const { state } = this;
    const speeds: Speed[] = [];
    for (const model of state.installed) {
      progress(`${model.name}: reading and writing…`);
      speeds.push(await this.#speed(model));
    }
    progress("Swapping…");
    const swaps = await this.#swaps(state.installed);
    return {
      when: new Date().toISOString(),
      browser: navigator.userAgent,
      cores: navigator.hardwareConcurrency,
      threads: state.threads,
      release: state.release,
      base_bytes: state.installed[0]?.bytes ?? 0,
      load_seconds: state.loadSeconds,
      engine_memory_bytes: this.#memory,
      speeds,
      ...swaps,
    };
  }

  async #speed(model: Model): Promise<Speed> {
    const prefill: number[] = [];
    const decode: number[] = [];
    for (let run = 0; run < REPEATS; run++) {
      const usage = await this.#ask(model, `read-${++this.#count}`, `${run} ${PROMPT}`, ANSWER);
      prefill.push((usage.promptTokens - usage.reusedTokens) / usage.firstTokenSeconds);
      if (usage.completionTokens > 1) decode.push((usage.completionTokens - 1) / usage.decodeSeconds);
    }
    return {
      model: model.name,
      prefill_tokens_per_second: median(prefill),
      decode_tokens_per_second: median(decode),
    };
  }

  /** First tokens of one question: asked again, asked again after another model, and of a model that is new to it. */
  async #swaps(models: Model[]): Promise<Swaps> {
    const [base, adapter] = models as [Model, Model?];
    const same: number[] = [];
    const swapped: number[] = [];
    const fresh: number[] = [];
    for (let run = 0; run < REPEATS; run++) {
      const conversation = `swap-${++this.#count}`;
      await this.#ask(base, conversation, SHORT, 1);
      same.push((await this.#ask(base, conversation, SHORT, 1)).firstTokenSeconds);
      if (adapter === undefined) continue;
      fresh.push((await this.#ask(adapter, conversation, SHORT, 1)).firstTokenSeconds);
      swapped.push((await this.#ask(base, conversation, SHORT, 1)).firstTokenSeconds);
      swapped.push((await this.#ask(adapter, conversation, SHORT, 1)).firstTokenSeconds);
    }
    return {
      same_model_first_token_seconds: median(same),
      swap_first_token_seconds: adapter === undefined ? null : median(swapped),
      new_model_first_token_seconds: adapter === undefined ? null : median(fresh),
    };
  }

  async #ask(model: Model, conversation: string, question: string, maxTokens: number): Promise<Usage> {
    const messages = [{ role: "user", content: question }];
    const adapter = model.kind === "base" ? null : model.name;
    const asked = this.#client.ask({ adapter, conversation, messages, maxTokens }, () => {});
    const { usage, memory } = await asked.answered;
    this.#memory = memory;
    return usage;
  }
}

/** The middle value; NaN of none, which JSON writes as null. */
function median(values: number[]): number {
  const sorted = [...values].sort((one, other) => one - other);
  const middle = (sorted.length - 1) / 2;
  return ((sorted[Math.floor(middle)] ?? NaN) + (sorted[Math.ceil(middle)] ?? NaN)) / 2;
}

function rows(measured: Figures): [string, string][] {
  const time = (seconds: number | null) => (seconds === null ? "no adapter" : milliseconds(seconds));
  return [
    ...measured.speeds.flatMap(({ model, ...speed }): [string, string][] => [
      [`${model}: reading`, `${speed.prefill_tokens_per_second.toFixed(1)} tokens/s`],
      [`${model}: writing`, `${speed.decode_tokens_per_second.toFixed(1)} tokens/s`],
    ]),
    ["Next token, same model", time(measured.same_model_first_token_seconds)],
    ["Next token after a swap", time(measured.swap_first_token_seconds)],
    ["First token of a model new to the text", time(measured.new_model_first_token_seconds)],
    ["Loading", time(measured.load_seconds)],
    ["Memory of the engine", size(measured.engine_memory_bytes)],
    ["Threads", `${measured.threads} of ${measured.cores} cores`],
    ["Base", size(measured.base_bytes)],
  ];
}

function show(measured: Figures): void {
  const body = rows(measured).map(([what, figure]) =>
    element("tr", {}, element("th", { scope: "row" }, what), element("td", {}, figure)),
  );
  byId("result").replaceChildren(element("table", {}, element("tbody", {}, ...body)));
  const text = [measured.browser, ...rows(measured).map(([what, figure]) => `${what}: ${figure}`)].join("\n");
  offerCopy("copy-text", text);
  offerCopy("copy-json", JSON.stringify(measured, null, 1));
}

function offerCopy(id: string, text: string): void {
  const button = byId<HTMLButtonElement>(id);
  button.hidden = false;
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      byId("copied").textContent = "Copied.";
    } catch {
      byId("result").append(element("pre", { tabIndex: 0 }, text));
      byId("copied").textContent = "The browser refused; copy it from below.";
    }
  };
}

function setStatus(text: string): void {
  byId("status").textContent = text;
}

function ready(state: State, client: Client): void {
  setStatus(state.loaded ? "Ready." : "Nothing is installed: install something on the first page.");
  const button = byId<HTMLButtonElement>("measure");
  button.disabled = !state.loaded;
  button.onclick = async () => {
    button.disabled = true;
    try {
      show(await new Bench(state, client).run(setStatus));
      setStatus("Done.");
    } catch (error) {
      setStatus((error as Error).message);
    }
    button.disabled = false;
  };
}

async function main(): Promise<void> {
  const lack = missing();
  if (lack !== null) {
    setStatus(lack);
    return;
  }
  await startShell((replace) => replace());
  const client = new Client((report: Report) => {
    if (report.type === "taken" || report.type === "lost") {
      setStatus("pitstop is open in another tab: close that one, then load this again.");
    }
    if (report.type === "owner") client.send({ type: "load" });
    if (report.type === "failed") setStatus(report.sentence);
    if (report.type === "state") ready(report.state, client);
  });
  client.start(false);
}

void main();
