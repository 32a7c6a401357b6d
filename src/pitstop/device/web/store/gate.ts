/**
 * Does this adapter run with this base? What an engine must never be given, by the headers alone: the rules of
 * `src/pitstop/bundle/binding.py`.
 */

import { DeviceError } from "../trust/errors.js";
import { MAX_DIMENSIONS } from "./gguf.js";
import type { GgufHeader, TensorInfo } from "./gguf.js";

const BASE_KEY = "pitstop.base_sha256";
const INVOCATION_KEY = "adapter.alora.invocation_tokens";
const MAX_INVOCATION = 64; // tokens
const FLOAT32 = 6; // GGUF's code of a value's type
const ADAPTER_TYPES = ["F32", "F16", "BF16", "Q8_0"];

// What llama.cpp multiplies with, and so what an adapter can change. Norms, embeddings, biases and routers are not here.
const PROJECTION = new RegExp(
  "^(output|blk\\.\\d+\\.(" +
    "attn_(q|k|v|qkv|output|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)" +
    "|ffn_(gate|up|down)(_exps|_shexp|_chexps)?|ffn_gate_up_exps" +
    "|ssm_(in|out|x|dt)" +
    "))\\.weight$",
);

/** Refuse a GGUF adapter that is no LoRA for this very base. Throws a DeviceError: broken. */
export function checkAdapter(adapter: GgufHeader, base: GgufHeader, baseSha256: string): void {
  const [kind, method] = [text(adapter, "general.type"), text(adapter, "adapter.type")];
  if (kind !== "adapter" || method !== "lora") {
    refuse(adapter, `is a ${kind ?? "file without general.type"} of the type ${method}, not a LoRA adapter`);
  }
  const trainedOn = adapter.metadata.get(BASE_KEY);
  if (trainedOn !== baseSha256) {
    const made = trainedOn === undefined ? "does not say for which base it was made" : "was made for another base";
    refuse(adapter, `${made}, the one here is ${baseSha256.slice(0, 12)}…`);
  }
  const architectures = [adapter, base].map((header) => text(header, "general.architecture"));
  if (architectures[0] === undefined || architectures[0] !== architectures[1]) {
    refuse(adapter, `is for the architecture ${architectures[0]}, the base is ${architectures[1]}`);
  }
  const alpha = adapter.metadata.get("adapter.lora.alpha");
  // llama.cpp aborts on an alpha of another type.
  if (alpha !== undefined && (adapter.types.get("adapter.lora.alpha") !== FLOAT32 || !Number.isFinite(alpha))) {
    refuse(adapter, "has an adapter.lora.alpha that is no finite 32-bit number");
  }
  checkInvocation(adapter, base);
  checkPairs(adapter, new Map(base.tensors.map((tensor) => [tensor.name, tensor])));
}

function checkInvocation(adapter: GgufHeader, base: GgufHeader): void {
  const found = adapter.metadata.get(INVOCATION_KEY);
  if (found === undefined) return;
  const vocabulary = base.metadata.get("tokenizer.ggml.tokens");
  let size = 0;
  if (Array.isArray(vocabulary)) size = vocabulary.length;
  else if (typeof vocabulary === "object") size = vocabulary.count;
  if (!Array.isArray(found) || found.length === 0 || found.length > MAX_INVOCATION) {
    refuse(adapter, `has ${INVOCATION_KEY}, which must be an array of 1 to ${MAX_INVOCATION} tokens`);
  }
  if (!found.every((token) => typeof token === "bigint" && token >= 0n && token < size)) {
    refuse(adapter, `has ${INVOCATION_KEY} which are not all tokens of the base`);
  }
}

function checkPairs(adapter: GgufHeader, base: Map<string, TensorInfo>): void {
  const tensors = new Map(adapter.tensors.map((tensor) => [tensor.name, tensor]));
  const stems = new Set([...tensors.keys()].map((name) => name.replace(/\.lora_a$/, "").replace(/\.lora_b$/, "")));
  if (stems.size === 0) refuse(adapter, "changes nothing: it has no tensors");
  for (const stem of stems) {
    const [a, b, weight] = [tensors.get(`${stem}.lora_a`), tensors.get(`${stem}.lora_b`), base.get(stem)];
    if (tensors.has(stem) || !PROJECTION.test(stem)) {
      refuse(adapter, `has the tensor ${stem}, which is no projection an adapter can change at run time`);
    }
    if (weight === undefined) refuse(adapter, `changes ${stem}, which the base does not have`);
    if (a === undefined || b === undefined) refuse(adapter, `has only one half of the pair for ${stem}`);
    for (const half of [a, b]) {
      if (ADAPTER_TYPES.includes(half.type)) continue;
      refuse(adapter, `has ${half.name} as ${half.type}; ${ADAPTER_TYPES.join(", ")} are allowed`);
    }
    // All four dimensions: llama.cpp checks two, and a wrong expert count writes out of bounds there.
    const [rows, columns, ...experts] = four(weight);
    const rank = four(a)[1];
    if (four(a).join() !== [rows, rank, ...experts].join() || four(b).join() !== [rank, columns, ...experts].join()) {
      refuse(adapter, `has shapes for ${stem} that do not fit the base`);
    }
  }
}

function four(tensor: TensorInfo): bigint[] {
  return [...tensor.shape, ...Array<bigint>(MAX_DIMENSIONS - tensor.shape.length).fill(1n)];
}

function text(header: GgufHeader, key: string): string | undefined {
  const value = header.metadata.get(key);
  return typeof value === "string" ? value : undefined;
}

function refuse(header: GgufHeader, what: string): never {
  throw new DeviceError("broken", `${header.name} ${what}: it is not used, ask the publisher to export it again`);
}
