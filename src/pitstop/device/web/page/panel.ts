/** "On this phone": what is installed, what is offered, how old that is, and what it takes. */

import { ago, element, figures, size, milliseconds } from "./elements.js";
import type { Model, Offer, State } from "./messages.js";

export interface Acts {
  look(): void;
  update(): void;
  rollBack(): void;
}

const WEEK = 7 * 24 * 3600 * 1000; // milliseconds; iOS empties the store of a page not visited for that long

/** Everything about a state, and the buttons for what can be done about it. */
export function panel(state: State, acts: Acts): Node[] {
  return [
    installed(state),
    element("p", { className: "hint", id: "freshness" }, freshness(state)),
    ...(state.offer?.news && state.installed.length > 0 ? [offered(state.offer, acts)] : []),
    element("div", { className: "actions" }, ...buttons(state, acts)),
    figures(measures(state)),
    ...(state.persistent || state.installed.length === 0 ? [] : [element("p", { className: "hint" }, EVICTION)]),
  ];
}

const EVICTION =
  "The browser may clear this store when space is short, or after a week without a visit. " +
  "Add the page to the home screen to keep it.";

/** The first thing a new visitor sees: what there is to install, or why it cannot be. */
export function welcome(state: State, acts: Acts): Node[] {
  if (state.installed.length > 0) return [];
  const offer = state.offer;
  if (offer === null) {
    const said = state.looked ?? "Asking the publisher what there is…";
    const again = state.looked === null ? [] : [element("button", { type: "button", onclick: acts.look }, "Try again")];
    return [card("Nothing is installed yet", element("p", {}, said), ...again)];
  }
  return [card("Nothing is installed yet", list(offer.models), verdict(offer, acts, "Install"))];
}

function installed(state: State): HTMLElement {
  if (state.installed.length === 0) return element("p", {}, "Nothing is installed.");
  return list(state.installed);
}

function offered(offer: Offer, acts: Acts): HTMLElement {
  const title = element("h3", {}, "Offered");
  return element("div", { className: "offer" }, title, list(offer.models), verdict(offer, acts, "Update"));
}

function verdict(offer: Offer, acts: Acts, word: string): HTMLElement {
  if (offer.refusal !== null) return element("p", { className: "notice" }, offer.refusal);
  const label = `${word} (${size(offer.bytes)})`;
  return element("button", { type: "button", className: "main", id: "update", onclick: acts.update }, label);
}

function list(models: Model[]): HTMLElement {
  const entries = models.map((model) => {
    const detail = `${model.kind} ${model.version} · ${size(model.bytes)} · ${model.license}`;
    return element("li", {}, element("span", {}, model.name), element("span", { className: "detail" }, detail));
  });
  return element("ul", { className: "models" }, ...entries);
}

function card(title: string, ...children: Node[]): HTMLElement {
  return element("div", { className: "card" }, element("h3", {}, title), ...children);
}

function buttons(state: State, acts: Acts): Node[] {
  const look = element("button", { type: "button", id: "look", onclick: acts.look }, "Check for updates");
  const back = element("button", { type: "button", id: "roll-back", onclick: acts.rollBack }, "Go back one release");
  return state.canRollBack ? [look, back] : [look];
}

/** How old what is installed may be, in a sentence. */
function freshness(state: State, now = Date.now()): string {
  if (state.looked !== null) return state.looked;
  if (state.checked === null) return "Not checked for updates in this visit.";
  const checked = `Checked ${ago(state.checked, now)}`;
  if (state.expires !== null && state.expires < now) {
    return `Stale: what the publisher said last has run out. ${checked}. What is installed goes on.`;
  }
  if (now - state.checked > WEEK) return `Stale: ${checked.toLowerCase()}.`;
  if (state.installed.length === 0) return `${checked}.`;
  return `${checked}: ${state.offer?.news ? "there is something newer." : "this is what the publisher offers."}`;
}

function measures(state: State): [string, string][] {
  const rows: [string, string][] = [];
  if (state.loaded) {
    rows.push(["Memory of the engine", size(state.memory)]);
    rows.push(["Threads", String(state.threads)]);
  }
  if (state.loadSeconds !== null) rows.push(["Loaded in", milliseconds(state.loadSeconds)]);
  if (state.stored > 0) rows.push(["Stored here", size(state.stored)]);
  if (state.release !== null) rows.push(["Release", state.release.slice(0, 12)]);
  return rows;
}
