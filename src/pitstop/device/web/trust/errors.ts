/** Why a device will not do something. */

/**
 * unreachable: the network; untrusted: metadata or bytes that fail verification; broken: a repository that is not
 * complete, a record or file that is malformed, or an adapter of another base; refused: a release that failed here
 * before, or a phone that cannot hold it; storage: the browser's storage is full or damaged; busy: another tab is at
 * work; usage: there is nothing to do this to.
 */
export type Kind = "unreachable" | "untrusted" | "broken" | "refused" | "storage" | "busy" | "usage";

/** The message is a sentence for the person who holds the phone. */
export class DeviceError extends Error {
  override name = "DeviceError";
  readonly kind: Kind;

  constructor(kind: Kind, message: string, options?: ErrorOptions) {
    super(message, options);
    this.kind = kind;
  }
}

export function untrusted(message: string): never {
  throw new DeviceError("untrusted", message);
}
