/** Whether a release may stay: what the health check of other devices asks, here of the engine that loaded it. */

import { EngineError } from "../engine/engine.js";
import type { WasmEngine } from "../engine/wasm.js";
import type { Bundle, Installed } from "../store/device.js";

const QUESTION = [{ role: "user", content: "Turn on the light in the kitchen." }];
const TOKENS = 8; // of each answer

/** Let the base and every adapter answer. Throws an EngineError that says which one cannot. */
export async function probe(engine: WasmEngine, { base, adapters }: Installed): Promise<void> {
  for (const bundle of [base, ...adapters]) await probeModel(engine, bundle);
}

async function probeModel(engine: WasmEngine, { kind, name, prompting }: Bundle): Promise<void> {
  const adapter = kind === "base" ? null : name;
  const prompt = engine.tokenize(engine.render(prompting, QUESTION));
  const logits = await engine.logits(adapter, "probe", prompt);
  if (!logits.every(Number.isFinite)) throw new EngineError(`${name} computes values that are no numbers`);
  if (adapter !== null) {
    const plain = await engine.logits(null, "probe", prompt);
    const noise = farthest(plain, await engine.logits(null, "probe again", prompt));
    if (farthest(plain, logits) <= 2 * noise) throw new EngineError(`the adapter ${name} loads but changes nothing`);
  }
  const pieces = engine.generate({ adapter, conversation: "probe", messages: QUESTION, maxTokens: TOKENS });
  let next = await pieces.next();
  while (!next.done) next = await pieces.next();
  if (next.value.completionTokens === 0) throw new EngineError(`${name} gives no answer to a simple question`);
}

function farthest(one: Float32Array, other: Float32Array): number {
  return one.reduce((most, value, index) => Math.max(most, Math.abs(value - (other[index] ?? NaN))), 0);
}
