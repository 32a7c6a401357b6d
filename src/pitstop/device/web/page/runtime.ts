/**
 * Store and engine together: what is active is in memory, and a new release must answer before it may stay.
 *
 *     update: fetched and verified beside what runs -> loaded instead of it -> probed -> confirmed, or rolled back
 */

import { EngineError, type ModelFile, type Usage } from "../engine/engine.js";
import { openEngine, type WasmEngine } from "../engine/wasm.js";
import { type Bundle, Device, DeviceError, type Installed, type Offer as Offered } from "../store/device.js";
import { probe } from "./health.js";
import type { Config, Model, Offer, Question, Report, State } from "./messages.js";

const PAUSE = 100; // milliseconds between two reports of progress

export class Runtime {
  #engine: WasmEngine | null = null;
  #installed: Installed | null = null; // what the engine holds
  #loadSeconds: number | null = null;
  #offer: Offered | null = null;
  #looked: string | null = null;
  #checked: number | null = null;

  private constructor(
    private readonly device: Device,
    private readonly contextLength: number,
    private readonly threads: number | null,
    private readonly report: (report: Report) => void,
  ) {}

  /** Open the store of this browser for what `pitstop web` wrote beside the page. */
  static async open(page: URL, threads: number | null, report: (report: Report) => void): Promise<Runtime> {
    const config = await readConfig(new URL("config.json", page));
    const folder = await navigator.storage.getDirectory();
    const root = new TextEncoder().encode(config.root);
    const repository = new URL(config.repository, page).href;
    const device = await Device.open(folder, { ...config, repository, root });
    return new Runtime(device, config.context_length, threads, report);
  }

  /** Bring what is installed into memory; a release on trial is tried again. */
  async load(): Promise<void> {
    const trial = await this.device.trial();
    if (trial === null) await this.#loadActive();
    else await this.#try(trial);
  }

  /** Ask the publisher what there is. Without a network that is no failure: what is installed goes on. */
  async look(): Promise<void> {
    this.#doing("asking what there is");
    try {
      this.#offer = await this.device.look();
      this.#looked = null;
      this.#checked = Date.now();
    } catch (error) {
      this.#offer = null;
      this.#looked = sentence(error);
      if (!(error instanceof DeviceError && error.kind === "unreachable")) throw error;
    }
  }

  async update(signal: AbortSignal): Promise<void> {
    let told = 0;
    this.#doing("fetching what is offered");
    const installed = await this.device.update((progress) => {
      if (Date.now() - told < PAUSE && progress.fetched < progress.of) return;
      told = Date.now();
      this.report({ type: "progress", ...progress });
    }, signal);
    if (installed.trial) await this.#try(installed);
    else if (this.#installed?.sha256 !== installed.sha256) await this.#bring(installed);
    this.#offer = await this.device.look();
    this.#checked = Date.now();
  }

  async rollBack(): Promise<void> {
    await this.device.rollBack();
    await this.#loadActive();
    if (this.#offer !== null) await this.look();
  }

  async *ask(question: Question, signal: AbortSignal): AsyncGenerator<string, { usage: Usage; memory: number }> {
    const engine = this.#engine;
    if (engine === null) throw new EngineError("no model is in memory at the moment; ask again when one is");
    const usage = yield* engine.generate({ ...question, signal });
    return { usage, memory: engine.memory() };
  }

  async state(): Promise<State> {
    const status = await this.device.status();
    const installed = this.#installed;
    return {
      installed: installed === null ? [] : models(installed),
      release: installed?.sha256 ?? null,
      loaded: this.#engine !== null,
      loadSeconds: this.#loadSeconds,
      canRollBack: status.previous !== null,
      offer: this.#offer === null ? null : offer(this.#offer),
      looked: this.#looked,
      checked: this.#checked,
      expires: status.expires === null ? null : status.expires * 1000,
      memory: this.#engine?.memory() ?? 0,
      threads: this.#engine?.threads ?? 0,
      stored: status.stored,
      persistent: await navigator.storage.persisted(),
    };
  }

  async #loadActive(): Promise<void> {
    const active = await this.device.active();
    if (active === null) await this.#unload();
    else await this.#bring(active);
  }

  /** Let a release on trial answer; it stays, or what ran before comes back. */
  async #try(trial: Installed): Promise<void> {
    try {
      await probe(await this.#bring(trial), trial);
    } catch (error) {
      await this.#unload();
      if (error instanceof EngineMissing) await this.device.untried();
      else await this.device.rollBack();
      await this.#loadActive();
      const after = this.#installed === null ? "Nothing is installed." : "What ran before is back.";
      throw new EngineError(`The new release was tried here and failed: ${sentence(error)} ${after}`);
    }
    await this.device.confirm();
  }

  /** Load base and adapters instead of what is in memory: a phone has no room for both. */
  async #bring(installed: Installed): Promise<WasmEngine> {
    const { base, adapters } = installed;
    const begun = performance.now();
    this.#doing(`loading ${base.name} (${Math.round(total(installed) / 1e6)} MB)`, true);
    await this.#unload();
    const engine = await this.#openEngine();
    try {
      const length = Math.min(base.context_length, this.contextLength);
      await engine.load(await modelFile(installed, base), base.prompting, length);
      for (const adapter of adapters) {
        const file = await modelFile(installed, adapter);
        await engine.addAdapter(adapter.name, file, adapter.scale, adapter.prompting);
      }
    } catch (error) {
      await engine.close();
      throw error;
    }
    this.#engine = engine;
    this.#installed = installed;
    this.#loadSeconds = (performance.now() - begun) / 1000;
    return engine;
  }

  async #openEngine(): Promise<WasmEngine> {
    try {
      return await openEngine(this.threads === null || !crossOriginIsolated ? {} : { threads: this.threads });
    } catch (error) {
      throw new EngineMissing(sentence(error));
    }
  }

  async #unload(): Promise<void> {
    const engine = this.#engine;
    this.#engine = null;
    this.#installed = null;
    this.#loadSeconds = null;
    await engine?.close();
  }

  #doing(what: string, heavy = false): void {
    this.report({ type: "doing", what, heavy });
  }
}

/** The engine's own program could not be started: no fault of what it was to load. */
class EngineMissing extends Error {}

/** Say what happened in a sentence, whoever found it. */
export function sentence(error: unknown): string {
  if (error instanceof DOMException && error.name === "AbortError") return "Cancelled; what came so far is kept.";
  const said = (error instanceof Error ? error.message : String(error)).trim();
  const untrusted = error instanceof DeviceError && error.kind === "untrusted";
  const words = untrusted ? `Nothing was taken from the repository: ${said}` : said;
  return `${words[0]?.toUpperCase() ?? ""}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;
}

async function readConfig(url: URL): Promise<Config> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`this page lacks its config.json (${response.status}): write it with pitstop web`);
  const config = (await response.json()) as Partial<Config>;
  const texts = [config.repository, config.channel, config.root];
  const numbers = [config.budget, config.context_length];
  const sound = texts.every((text) => typeof text === "string" && text !== "");
  if (!sound || !numbers.every((number) => typeof number === "number" && number > 0)) {
    throw new Error("the config.json of this page is damaged: write it again with pitstop web");
  }
  return config as Config;
}

async function modelFile(installed: Installed, bundle: Bundle): Promise<ModelFile> {
  const { sha256 } = artifact(bundle);
  return { sha256, handle: await installed.open(sha256) };
}

/** The one file of a bundle that runs, as the manifest has it. */
function artifact(bundle: Bundle): Bundle["artifacts"][number] {
  const found = bundle.artifacts.find((one) =>
    bundle.kind === "base" ? one.sha256 === bundle.base_sha256 : one.role === "adapter",
  );
  if (found === undefined) throw new EngineError(`${bundle.name} is a model of its own, which this page cannot run`);
  return found;
}

function models({ base, adapters }: { base: Bundle; adapters: Bundle[] }): Model[] {
  return [base, ...adapters].map((bundle) => ({
    name: bundle.name,
    kind: bundle.kind,
    version: bundle.version,
    license: bundle.license,
    bytes: bundle.artifacts.reduce((sum, one) => sum + one.size, 0),
  }));
}

function total(installed: Installed): number {
  return models(installed).reduce((sum, model) => sum + model.bytes, 0);
}

function offer(offered: Offered): Offer {
  const { bytes, refusal } = offered;
  const why = refusal === null ? null : sentence(refusal);
  return { models: models(offered), bytes, news: !offered.installed, refusal: why };
}
