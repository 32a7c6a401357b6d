/**
 * The only owner of store and engine: a dedicated worker, with the store's Web Lock for as long as it lives.
 *
 * What changes store or engine happens one after the other; questions are answered beside a download.
 */

import { DeviceError } from "../store/device.js";
import type { Report, Request } from "./messages.js";
import { Runtime, sentence } from "./runtime.js";

const PAGE = new URL("../", location.href);
const PATIENCE = 5000; // milliseconds another tab gets to yield
const PAUSE = 50; // milliseconds
const tabs = new BroadcastChannel("pitstop"); // another tab asks here for the store

let runtime: Runtime | null = null;
let acts: Promise<void> = Promise.resolve();
let fetching = new AbortController();
const answering = new Map<number, AbortController>();

function report(message: Report): void {
  postMessage(message);
}

addEventListener("message", (event: MessageEvent<Request>) => {
  const request = event.data;
  if (request.type === "start") void start(request.takeOver, request.threads);
  if (request.type === "load") act(load);
  if (request.type === "look") act((mine) => mine.look());
  if (request.type === "update") act(update);
  if (request.type === "cancelUpdate") fetching.abort();
  if (request.type === "rollBack") act((mine) => mine.rollBack());
  if (request.type === "ask") void answer(request);
  if (request.type === "cancel") answering.get(request.id)?.abort();
});

tabs.addEventListener("message", () => {
  if (runtime !== null) report({ type: "lost" }); // the page ends this worker
});

/** Open the store, which only one tab can have, or say that another one has it. */
async function start(takeOver: boolean, threads: number | null): Promise<void> {
  if (takeOver) tabs.postMessage("yield");
  const begun = Date.now();
  while (runtime === null) {
    try {
      runtime = await Runtime.open(PAGE, threads, report);
    } catch (error) {
      const busy = error instanceof DeviceError && error.kind === "busy";
      if (busy && takeOver && Date.now() - begun < PATIENCE) {
        await new Promise((resolve) => setTimeout(resolve, PAUSE));
        continue;
      }
      report(busy ? { type: "taken" } : { type: "failed", id: null, sentence: sentence(error) });
      return;
    }
  }
  report({ type: "owner" });
}

async function load(mine: Runtime): Promise<void> {
  try {
    await mine.load();
  } finally {
    report({ type: "state", state: await mine.state() });
  }
  if (navigator.onLine) await mine.look();
}

async function update(mine: Runtime): Promise<void> {
  fetching = new AbortController();
  await mine.update(fetching.signal);
}

/** Do one thing to store or engine when those before it are done, and show what came of it. */
function act(what: (mine: Runtime) => Promise<void>): void {
  acts = acts.then(async () => {
    if (runtime === null) return;
    try {
      await what(runtime);
    } catch (error) {
      report({ type: "failed", id: null, sentence: sentence(error) });
    }
    report({ type: "state", state: await runtime.state() });
    report({ type: "doing", what: null, heavy: false });
  });
}

async function answer({ id, question }: Extract<Request, { type: "ask" }>): Promise<void> {
  const control = new AbortController();
  answering.set(id, control);
  try {
    if (runtime === null) throw new Error("pitstop is not ready in this tab");
    const pieces = runtime.ask(question, control.signal);
    let next = await pieces.next();
    for (; !next.done; next = await pieces.next()) report({ type: "piece", id, text: next.value });
    report({ type: "answered", id, ...next.value });
  } catch (error) {
    report({ type: "failed", id, sentence: sentence(error) });
  } finally {
    answering.delete(id);
  }
}
