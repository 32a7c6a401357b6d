/** Which state of a phone may follow which: the rules of `src/pitstop/device/activation.py`, no disk. */

import { asCount, asList, asTable, asText, isSha256 } from "../trust/canonical.js";
import type { Json } from "../trust/canonical.js";
import { DeviceError } from "../trust/errors.js";

export const TRIES = 3;
const BAD_KEPT = 64; // newest bad releases remembered

/** What is installed; a release goes by the SHA-256 of its file. */
export interface State {
  good: string | null; // proven here; it serves
  trial: string | null; // installed and not yet proven
  tries: number; // left for the trial
  previous: string | null; // good before `good`
  bad: string[]; // failed or rolled back here, oldest first
}

export const NOTHING: State = { good: null, trial: null, tries: 0, previous: null, bad: [] };

/** Read a state; throws for anything else. */
export function asState(value: Json): State {
  const { good, trial, tries, previous, bad } = asTable(value);
  const [one, two, three] = [good, trial, previous].map((name) => (name === null ? null : release(name)));
  return { good: one!, trial: two!, tries: asCount(tries), previous: three!, bad: asList(bad).map(release) };
}

function release(value: Json | undefined): string {
  const name = asText(value);
  if (!isSha256(name)) throw new TypeError("no release");
  return name;
}

/** Every release whose files must stay. */
export function releases(state: State): string[] {
  return [state.good, state.trial, state.previous].filter((name) => name !== null);
}

/** Put a release on trial; the good one offered again only ends a trial. */
export function install(state: State, name: string): State {
  if (state.bad.includes(name)) {
    const what = "What is offered failed or was rolled back on this phone before: the publisher has to repair it";
    throw new DeviceError("refused", `${what}; what is installed stays`);
  }
  if (name === state.trial) return state;
  if (name === state.good) return { ...state, trial: null, tries: 0 };
  return { ...state, trial: name, tries: TRIES };
}

/** Use up one try of the trial; without a try left the trial is bad. */
export function begin(state: State): State {
  onTrial(state);
  return state.tries === 0 ? reject(state) : { ...state, tries: state.tries - 1 };
}

/** Give back the try that was begun. */
export function untried(state: State): State {
  onTrial(state);
  return { ...state, tries: Math.min(state.tries + 1, TRIES) };
}

/** Make the trial the good release. */
export function confirm(state: State): State {
  return { ...state, good: onTrial(state), trial: null, tries: 0, previous: state.good };
}

/** Mark the trial bad; the good release stays. */
export function reject(state: State): State {
  const failed = onTrial(state);
  const previous = state.previous === failed ? null : state.previous;
  return { ...state, trial: null, tries: 0, previous, bad: withBad(state.bad, failed) };
}

/** Leave the newest release: the one on trial, or else the good one for the one before it. */
export function rollBack(state: State): State {
  if (state.trial !== null) return reject(state);
  if (state.good === null || state.previous === null) {
    throw new DeviceError("usage", "There is nothing to go back to: update to install what is offered");
  }
  return { ...state, good: state.previous, previous: null, bad: withBad(state.bad, state.good) };
}

function onTrial(state: State): string {
  if (state.trial === null) throw new DeviceError("usage", "Nothing is on trial: update to install what is offered");
  return state.trial;
}

function withBad(bad: string[], name: string): string[] {
  return [...bad.filter((known) => known !== name), name].slice(-BAD_KEPT);
}
