/** What the page and its worker say to each other. The page holds no model and no store, the worker no element. */

import type { Message, Usage } from "../engine/engine.js";

/** From the page. `id` names a question, so that its answer and its end find back. */
export type Request =
  | { type: "start"; takeOver: boolean; threads: number | null } // comes to `taken` or `owner`; null: as many as help
  | { type: "load" } // what is active, or on trial
  | { type: "look" }
  | { type: "update" }
  | { type: "cancelUpdate" }
  | { type: "rollBack" }
  | { type: "ask"; id: number; question: Question }
  | { type: "cancel"; id: number };

export interface Question {
  adapter: string | null; // null: the plain base
  conversation: string;
  messages: Message[];
  maxTokens: number;
}

/** From the worker. */
export type Report =
  | { type: "taken" } // another tab has store and engine
  | { type: "owner" } // this one has
  | { type: "lost" } // another tab took them over from this one
  | { type: "state"; state: State }
  | { type: "doing"; what: string | null; heavy: boolean } // heavy: it needs memory, and may end the tab
  | { type: "progress"; what: string; fetched: number; of: number } // bytes
  | { type: "piece"; id: number; text: string }
  | { type: "answered"; id: number; usage: Usage; memory: number }
  | { type: "failed"; id: number | null; sentence: string }; // null: it was no question

/** One base or adapter, as people tell them apart. */
export interface Model {
  name: string;
  kind: "base" | "adapter";
  version: string;
  license: string;
  bytes: number;
}

export interface Offer {
  models: Model[];
  bytes: number; // still to be fetched
  news: boolean; // it is not what is active
  refusal: string | null; // why this phone cannot have it
}

/** Everything the page shows besides the conversation. */
export interface State {
  installed: Model[]; // the base first; empty: nothing is installed
  release: string | null; // SHA-256
  loaded: boolean;
  loadSeconds: number | null;
  canRollBack: boolean;
  offer: Offer | null; // null: nobody looked, or nobody answered
  looked: string | null; // why the last look failed, as a sentence
  checked: number | null; // when an offer was last verified, in milliseconds of Date.now()
  expires: number | null; // until when that offer stands
  memory: number; // bytes of the engine
  threads: number; // of the engine
  stored: number; // bytes of the blobs in the store
  persistent: boolean; // the browser promised not to evict the store
}

/** What `pitstop web` wrote beside the page. */
export interface Config {
  repository: string; // URL, relative to the page
  channel: string;
  root: string; // the publisher's 1.root.json, as signed
  budget: number; // bytes of memory the page may take: base, adapters, conversations
  context_length: number; // tokens a conversation may have
}
