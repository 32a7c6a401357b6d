/** What a bundle says of itself: `src/pitstop/bundle/manifest.py` as a phone reads it. */

import type { Prompting } from "../engine/engine.js";

/** One file: the name is for people, the digest is the identity. */
export interface Artifact {
  role: "base" | "adapter" | "merged" | "part";
  format: string; // "gguf", "onnx"
  precision: string;
  name: string;
  sha256: string;
  size: number; // bytes
  pieces: string[]; // SHA-256 of each 16 MiB
}

/** `bundle.json`: one unit of delivery. */
export interface Bundle {
  kind: "base" | "adapter";
  name: string; // also the model name a person picks
  version: string;
  counter: number; // only ever rises for a name
  license: string;
  base_name: string;
  base_sha256: string; // the base file this runs on
  prompting: Prompting;
  context_length: number; // tokens
  artifacts: Artifact[];
  scale: number; // multiplier of the adapter at run time
  compatible: string[];
  measured: Record<string, number>;
  reports: Record<string, string>;
}
