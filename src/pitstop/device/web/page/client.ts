/** The page's end of the line to the worker: questions with their answers, and a mark for when the tab is ended. */

import type { Usage } from "../engine/engine.js";
import type { Question, Report, Request } from "./messages.js";

export interface Answered {
  usage: Usage;
  memory: number; // bytes of the engine
}

export interface Asked {
  answered: Promise<Answered>;
  cancel(): void;
}

interface Waiting {
  piece(text: string): void;
  resolve(answered: Answered): void;
  reject(error: Error): void;
}

const MARK = "pitstop.doing"; // in localStorage while something runs that may cost the tab its life

/** A worker that owns store and engine, as far as the Web Lock lets it. */
export class Client {
  #worker: Worker;
  #waiting = new Map<number, Waiting>();
  #last = 0;
  #heavy: string | null = null; // what the worker does that needs memory, besides answering
  #marked: string | null = null; // by this tab

  constructor(private readonly onReport: (report: Report) => void) {
    this.#worker = this.#begin();
    // A tab in the background is ended for other reasons, and a closed one by its owner.
    addEventListener("visibilitychange", () => this.#mark());
    addEventListener("pagehide", () => this.#mark(true));
  }

  /** Take store and engine, from another tab if need be. `?threads=N` in the page's address sets how many compute. */
  start(takeOver: boolean): void {
    const threads = Number(new URLSearchParams(location.search).get("threads"));
    this.send({ type: "start", takeOver, threads: threads >= 1 && threads <= 16 ? Math.floor(threads) : null });
  }

  /** Say what the worker shall do; what comes of it is reported. */
  send(request: Request): void {
    this.#worker.postMessage(request);
  }

  ask(question: Question, piece: (text: string) => void): Asked {
    const id = ++this.#last;
    const answered = new Promise<Answered>((resolve, reject) => this.#waiting.set(id, { piece, resolve, reject }));
    this.#mark();
    this.send({ type: "ask", id, question });
    return { answered, cancel: () => this.send({ type: "cancel", id }) };
  }

  #begin(): Worker {
    const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module", name: "pitstop" });
    worker.addEventListener("message", (event: MessageEvent<Report>) => this.#receive(event.data));
    worker.addEventListener("error", (event) => {
      event.preventDefault();
      const why = event.message || "it could not be loaded";
      const sentence = `The part of the page that runs the model stopped: ${why}. Load the page again.`;
      this.#receive({ type: "failed", id: null, sentence });
    });
    return worker;
  }

  #receive(report: Report): void {
    if (report.type === "doing") {
      this.#heavy = report.heavy ? report.what : null;
      this.#mark();
    }
    if (report.type === "lost") {
      for (const waiting of this.#waiting.values()) waiting.reject(new Error("Another tab took over."));
      this.#waiting.clear();
      this.#heavy = null;
      this.#mark();
      this.#worker.terminate(); // gives up the lock, the files and the memory at once
      this.#worker = this.#begin();
    }
    if ("id" in report && report.id !== null) this.#answer(report, report.id);
    else this.onReport(report);
  }

  #answer(report: Report, id: number): void {
    const waiting = this.#waiting.get(id);
    if (report.type === "piece") waiting?.piece(report.text);
    else this.#waiting.delete(id);
    this.#mark();
    if (report.type === "answered") waiting?.resolve(report);
    if (report.type === "failed") waiting?.reject(new Error(report.sentence));
  }

  #mark(leaving = false): void {
    const heavy = this.#heavy ?? (this.#waiting.size > 0 ? "answering" : null);
    const doing = leaving || document.visibilityState === "hidden" ? null : heavy;
    if (doing === this.#marked) return;
    if (doing !== null) localStorage.setItem(MARK, doing);
    else localStorage.removeItem(MARK);
    this.#marked = doing;
  }
}

/** What ran when the browser ended the tab that owned the store before; null: nothing did. Asking forgets it. */
export function endedWhile(): string | null {
  const doing = localStorage.getItem(MARK);
  localStorage.removeItem(MARK);
  return doing;
}
