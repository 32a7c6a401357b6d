/** A bounded reader of GGUF headers: the rules and limits of `src/pitstop/bundle/formats/gguf.py`. */

import { DeviceError } from "../trust/errors.js";
import type { Files } from "./files.js";

const MAX_STRING = 1 << 20; // bytes
const MAX_HEADER = 64 << 20; // bytes before the tensor data
const MAX_TEXT = 8 << 20; // bytes of all texts that are kept
const MAX_TEXTS = 1 << 20; // in arrays that are not kept
const MAX_ELEMENTS_KEPT = 8_192; // of all arrays; later ones are checked and counted, not kept
const MAX_ALIGNMENT = 1 << 16;
const MAX_ENTRIES = 65_536; // metadata keys, and tensors
const MAX_ELEMENTS = 1n << 63n;
const MAX_TENSOR_NAME = 63; // bytes; llama.cpp's limit
const FIRST = 1 << 20; // bytes looked at first; more if the header is longer
export const MAX_DIMENSIONS = 4;

// GGUF value types that are scalars: code -> bytes.
const SCALARS = new Map([[0, 1], [1, 1], [2, 2], [3, 2], [4, 4], [5, 4], [6, 4], [7, 1], [10, 8], [11, 8], [12, 8]]);
const [UINT32, STRING, ARRAY] = [4, 8, 9];

// ggml tensor types: code -> name, elements of a block, bytes of a block.
const BLOCKS = new Map<number, [string, number, number]>([
  [0, ["F32", 1, 4]], [1, ["F16", 1, 2]], [2, ["Q4_0", 32, 18]], [3, ["Q4_1", 32, 20]], [6, ["Q5_0", 32, 22]],
  [7, ["Q5_1", 32, 24]], [8, ["Q8_0", 32, 34]], [9, ["Q8_1", 32, 40]], [10, ["Q2_K", 256, 84]], [11, ["Q3_K", 256, 110]],
  [12, ["Q4_K", 256, 144]], [13, ["Q5_K", 256, 176]], [14, ["Q6_K", 256, 210]], [15, ["Q8_K", 256, 292]],
  [16, ["IQ2_XXS", 256, 66]], [17, ["IQ2_XS", 256, 74]], [18, ["IQ3_XXS", 256, 98]], [19, ["IQ1_S", 256, 50]],
  [20, ["IQ4_NL", 32, 18]], [21, ["IQ3_S", 256, 110]], [22, ["IQ2_S", 256, 82]], [23, ["IQ4_XS", 256, 136]],
  [24, ["I8", 1, 1]], [25, ["I16", 1, 2]], [26, ["I32", 1, 4]], [27, ["I64", 1, 8]], [28, ["F64", 1, 8]],
  [29, ["IQ1_M", 256, 56]], [30, ["BF16", 1, 2]], [34, ["TQ1_0", 256, 54]], [35, ["TQ2_0", 256, 66]],
  [39, ["MXFP4", 32, 17]], [40, ["NVFP4", 64, 36]], [41, ["Q1_0", 128, 18]], [42, ["Q2_0", 64, 18]],
]);

export interface TensorInfo {
  name: string;
  shape: bigint[]; // fastest first
  type: string; // "F32", "Q4_1" …
  offset: bigint; // bytes from the start of the tensor data
  size: bigint; // bytes
}

type Scalar = boolean | bigint | number | string;
/** An array too long to keep. */
export interface SkippedArray {
  type: number;
  count: number;
}
export type Value = Scalar | Scalar[] | SkippedArray;

/** Everything of a GGUF file but the weights. */
export interface GgufHeader {
  name: string; // of the file, for people
  version: number;
  metadata: Map<string, Value>;
  types: Map<string, number>; // GGUF type code of each metadata value
  tensors: TensorInfo[];
  dataOffset: number; // bytes from the start of the file
  alignment: number; // bytes
}

/** The bytes at hand end inside the header. */
class More extends Error {}

/** Read the header of a file of the store; `name` is for people. Throws a DeviceError: broken. */
export async function readGguf(files: Files, file: string, name: string): Promise<GgufHeader> {
  const size = await files.size(file);
  if (size === null) throw new DeviceError("storage", `${name} is not here: update to fetch it again`);
  for (let length = FIRST; ; length *= 4) {
    const most = Math.min(length, size, MAX_HEADER);
    try {
      return parseGguf((await files.read(file, 0, most))!, size, name);
    } catch (error) {
      if (!(error instanceof More) || most === Math.min(size, MAX_HEADER)) throw error;
    }
  }
}

/** Read a header from the first bytes of a file of this size. */
function parseGguf(data: Uint8Array<ArrayBuffer>, size: number, name: string): GgufHeader {
  const reader = new Reader(data, size, name);
  if (size < 24 || reader.text(4, "the magic") !== "GGUF") reader.fail("this is no GGUF file");
  const version = reader.uint32("the version");
  if (version !== 2 && version !== 3) reader.fail(`GGUF version ${version} is not supported (2 and 3 are)`);
  const [nTensors, nKeys] = [reader.uint64("the tensor count"), reader.uint64("the key count")];
  // A key takes at least 8 + 1 + 4 + 1 bytes, a tensor 8 + 1 + 4 + 8 + 4 + 8.
  for (const [count, least, what] of [[nKeys, 14, "metadata keys"], [nTensors, 33, "tensors"]] as const) {
    if (count > MAX_ENTRIES || Number(count) * least > size - reader.position) {
      reader.fail(`${count} ${what} cannot be in this file`);
    }
  }
  const { metadata, types } = readMetadata(reader, Number(nKeys));
  const alignment = alignmentOf(reader, metadata, types);
  const tensors = Array.from({ length: Number(nTensors) }, () => readTensor(reader, alignment));
  const dataOffset = Math.ceil(reader.position / alignment) * alignment;
  checkLayout(reader, tensors, dataOffset);
  return { name, version, metadata, types, tensors, dataOffset, alignment };
}

/** Reads forward through a header and knows how much of it there can be. */
class Reader {
  position = 0;
  private view: DataView;
  private keptText = 0; // bytes
  private keptElements = 0;
  private skippedTexts = 0;

  constructor(
    private data: Uint8Array<ArrayBuffer>,
    readonly size: number, // of the whole file
    private name: string,
  ) {
    this.view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  }

  fail(what: string): never {
    throw new DeviceError("broken", `${this.name}: ${what} (byte ${this.position}): it is not used, ask the publisher`);
  }

  /** Go over bytes of the header; returns where they begin. */
  skip(count: number, what: string): number {
    if (count > this.size - this.position) this.fail(`the file ends inside ${what}`);
    if (this.position + count > MAX_HEADER) this.fail(`${what} makes the header larger than ${MAX_HEADER >> 20} MiB`);
    const start = this.position;
    if (start + count > this.data.length) throw new More();
    this.position += count;
    return start;
  }

  bytes(count: number, what: string): Uint8Array {
    const start = this.skip(count, what);
    return this.data.subarray(start, start + count);
  }

  text(count: number, what: string): string {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes(count, what));
  }

  uint32(what: string): number {
    return this.view.getUint32(this.skip(4, what), true);
  }

  uint64(what: string): bigint {
    return this.view.getBigUint64(this.skip(8, what), true);
  }

  /** A name: no two readers may take it for two different ones. */
  identifier(what: string, limit: number): string {
    const raw = this.bytes(this.length(what), what);
    if (raw.length === 0 || raw.length > limit || raw.includes(0)) this.fail(`${what} must be 1 to ${limit} bytes without NUL`);
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw);
    } catch {
      this.fail(`${what} is not UTF-8`);
    }
  }

  value(kind: number, what: string): Value {
    if (kind === ARRAY) return this.array(what);
    if (kind === STRING) return this.keptString(what);
    if (!SCALARS.has(kind)) this.fail(`${what} has the unknown type ${kind}`);
    return this.scalar(kind, what);
  }

  private length(what: string): number {
    const count = this.uint64(`the length of ${what}`);
    if (count > MAX_STRING) this.fail(`${what} is ${count} bytes long, the limit is ${MAX_STRING}`);
    return Number(count);
  }

  private keptString(what: string): string {
    const length = this.length(what);
    this.keptText += length;
    if (this.keptText > MAX_TEXT) this.fail(`${what} makes more than ${MAX_TEXT >> 20} MiB of texts`);
    return this.text(length, what);
  }

  private scalar(kind: number, what: string): Scalar {
    const at = this.skip(SCALARS.get(kind)!, what);
    const { view } = this;
    switch (kind) {
      case 0: return BigInt(view.getUint8(at));
      case 1: return BigInt(view.getInt8(at));
      case 2: return BigInt(view.getUint16(at, true));
      case 3: return BigInt(view.getInt16(at, true));
      case 4: return BigInt(view.getUint32(at, true));
      case 5: return BigInt(view.getInt32(at, true));
      case 6: return view.getFloat32(at, true);
      case 7: return view.getUint8(at) !== 0;
      case 10: return view.getBigUint64(at, true);
      case 11: return view.getBigInt64(at, true);
      default: return view.getFloat64(at, true);
    }
  }

  private array(what: string): Value {
    const kind = this.uint32(`the element type of ${what}`);
    const count = this.uint64(`the length of ${what}`);
    const width = kind === STRING ? 8 : SCALARS.get(kind);
    if (width === undefined) this.fail(`${what} is an array of the type ${kind}, which is not allowed`);
    if (count * BigInt(width) > this.size - this.position) this.fail(`the file ends inside ${what} (${count} elements)`);
    const elements = Number(count);
    if (this.position + elements * width > MAX_HEADER) this.fail(`${what} makes the header too large`);
    if (this.keptElements + elements > MAX_ELEMENTS_KEPT) {
      if (kind === STRING) this.skipTexts(elements, what);
      else this.skip(elements * width, what);
      return { type: kind, count: elements };
    }
    this.keptElements += elements;
    return Array.from({ length: elements }, () => (kind === STRING ? this.keptString(what) : this.scalar(kind, what)));
  }

  private skipTexts(count: number, what: string): void {
    this.skippedTexts += count;
    if (this.skippedTexts > MAX_TEXTS) this.fail(`${what} makes more than ${MAX_TEXTS} texts in arrays`);
    for (let index = 0; index < count; index++) this.skip(this.length(what), what);
  }
}

function readMetadata(reader: Reader, count: number): Pick<GgufHeader, "metadata" | "types"> {
  const metadata = new Map<string, Value>();
  const types = new Map<string, number>();
  for (let index = 0; index < count; index++) {
    const key = reader.identifier("a metadata key", 65_535);
    if (metadata.has(key)) reader.fail(`the key ${key} is there twice`);
    const kind = reader.uint32(`the type of ${key}`);
    types.set(key, kind);
    metadata.set(key, reader.value(kind, `the value of ${key}`));
  }
  return { metadata, types };
}

function alignmentOf(reader: Reader, metadata: Map<string, Value>, types: Map<string, number>): number {
  if (!metadata.has("general.alignment")) return 32;
  if (types.get("general.alignment") !== UINT32) reader.fail("general.alignment must be a 32-bit number");
  const alignment = Number(metadata.get("general.alignment"));
  if (alignment < 1 || alignment > MAX_ALIGNMENT || alignment & (alignment - 1)) {
    reader.fail(`general.alignment is ${alignment}, it must be a power of two up to ${MAX_ALIGNMENT}`);
  }
  return alignment;
}

function readTensor(reader: Reader, alignment: number): TensorInfo {
  const name = reader.identifier("a tensor name", MAX_TENSOR_NAME);
  const dimensions = reader.uint32(`the shape of ${name}`);
  if (dimensions < 1 || dimensions > MAX_DIMENSIONS) {
    reader.fail(`${name} has ${dimensions} dimensions, 1 to ${MAX_DIMENSIONS} are allowed`);
  }
  const shape = Array.from({ length: dimensions }, () => reader.uint64(`the shape of ${name}`));
  const kind = reader.uint32(`the type of ${name}`);
  const offset = reader.uint64(`the offset of ${name}`);
  const found = BLOCKS.get(kind);
  if (found === undefined) reader.fail(`${name} has the unknown tensor type ${kind}`);
  const [type, block, blockBytes] = found;
  // These integers do not wrap, C's do: refuse what would.
  const elements = shape.reduce((product, size) => product * size, 1n);
  const size = (elements / BigInt(block)) * BigInt(blockBytes);
  if (elements === 0n || elements >= MAX_ELEMENTS || size >= MAX_ELEMENTS) {
    reader.fail(`${name} has the impossible shape ${shape.join(" × ")}`);
  }
  if (shape[0]! % BigInt(block)) reader.fail(`${name} has rows of ${shape[0]} elements, ${type} needs a multiple of ${block}`);
  if (offset % BigInt(alignment)) reader.fail(`${name} begins at ${offset}, not at a multiple of ${alignment}`);
  return { name, shape, type, offset, size };
}

function checkLayout(reader: Reader, tensors: TensorInfo[], dataOffset: number): void {
  const names = new Set<string>();
  let [end, before] = [0n, ""];
  for (const tensor of [...tensors].sort((a, b) => (a.offset < b.offset ? -1 : a.offset > b.offset ? 1 : 0))) {
    if (names.has(tensor.name)) reader.fail(`the tensor ${tensor.name} is there twice`);
    if (tensor.offset < end) reader.fail(`the tensors ${before} and ${tensor.name} overlap`);
    names.add(tensor.name);
    [end, before] = [tensor.offset + tensor.size, tensor.name];
    const missing = BigInt(dataOffset) + end - BigInt(reader.size);
    if (missing > 0n) reader.fail(`truncated: ${tensor.name} ends ${missing} bytes after the end of the file`);
  }
}
