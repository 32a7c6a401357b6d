/** The page: what the worker reports becomes visible, what the person does becomes a request. */

import { type Asked, Client, endedWhile } from "./client.js";
import { Conversation } from "./conversation.js";
import { byId, element, size } from "./elements.js";
import type { Report, Request, State } from "./messages.js";
import { type Acts, panel, welcome } from "./panel.js";
import { missing, startShell } from "./shell.js";

const LONGEST = 256; // tokens of an answer

class Page {
  #client = new Client((report) => this.#show(report));
  #conversation = new Conversation();
  #state: State | null = null;
  #models = "\0"; // those whose choices are shown
  #asked: Asked | null = null;
  #answeredBy: string | null = null; // in this conversation; null: nobody yet
  #acts: Acts = {
    look: () => this.#act({ type: "look" }),
    update: () => {
      void navigator.storage.persist(); // some browsers ask the person, others decide by themselves
      this.#act({ type: "update" });
    },
    rollBack: () => this.#act({ type: "rollBack" }),
  };

  start(): void {
    const form = byId<HTMLFormElement>("composer");
    const question = byId<HTMLTextAreaElement>("question");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#ask(question);
    });
    question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.#asked?.cancel());
    byId("fresh").addEventListener("click", () => {
      this.#asked?.cancel();
      this.#conversation = new Conversation();
      this.#answeredBy = null;
      question.focus();
    });
    byId("cancel-update").addEventListener("click", () => this.#client.send({ type: "cancelUpdate" }));
    this.#client.start(false);
  }

  #show(report: Report): void {
    if (report.type === "taken") this.#offerTakeOver("pitstop is open in another tab, and only one can run it.");
    if (report.type === "lost") this.#offerTakeOver("Another tab took over.");
    if (report.type === "owner") this.#load();
    if (report.type === "doing") this.#showDoing(report.what);
    if (report.type === "progress") this.#showProgress(report.what, report.fetched, report.of);
    if (report.type === "failed") {
      if (this.#state === null) setStatus("It did not start.");
      notify(report.sentence);
    }
    if (report.type === "state") this.#showState(report.state);
  }

  #act(request: Request): void {
    forget();
    this.#client.send(request);
  }

  #load(): void {
    forget();
    const doing = endedWhile();
    if (doing === null) {
      this.#client.send({ type: "load" });
      return;
    }
    setStatus("Waiting for you.");
    const sentence =
      `The browser ended the tab while it was ${doing}, most likely because the phone ran out of memory. ` +
      "Close other tabs and try again; if that does not help, ask the publisher for a smaller base.";
    notify(sentence, "Try again", () => this.#client.send({ type: "load" }));
  }

  #offerTakeOver(sentence: string): void {
    setStatus("In another tab.");
    byId("composer").hidden = true;
    byId("skip").hidden = true;
    byId("progress").hidden = true;
    byId("panel").replaceChildren();
    forget();
    notify(sentence, "Use it here", () => this.#client.start(true));
  }

  #showState(state: State): void {
    this.#state = state;
    byId("panel").replaceChildren(...panel(state, this.#acts));
    byId("welcome").replaceChildren(...welcome(state, this.#acts));
    byId("composer").hidden = !state.loaded;
    byId("skip").hidden = !state.loaded;
    const models = JSON.stringify(state.installed);
    if (models !== this.#models) this.#showChoices(state);
    this.#models = models;
  }

  /** One radio button for the base and each adapter; the choice stays if that one is still there. */
  #showChoices(state: State): void {
    const before = chosen();
    const choices = state.installed.map((model) => {
      const value = model.kind === "base" ? "" : model.name;
      const checked = value === before || (before === null && model.kind === "base");
      const radio = element("input", { type: "radio", name: "model", value, checked });
      const label = model.kind === "base" ? `${model.name} (base)` : model.name;
      return element("label", {}, radio, label);
    });
    byId("models").replaceChildren(...choices);
    if (chosen() === null) byId("models").querySelector("input")?.click();
  }

  #showDoing(what: string | null): void {
    if (what === null) byId("progress").hidden = true;
    const ready = this.#state?.loaded ? "Ready. No network is needed." : "Nothing is loaded.";
    setStatus(what === null ? ready : `${what[0]?.toUpperCase()}${what.slice(1)}…`);
    const busy = what !== null;
    byId<HTMLButtonElement>("send").disabled = busy;
    for (const button of document.querySelectorAll<HTMLButtonElement>("#look, #update, #roll-back")) {
      button.disabled = busy;
    }
  }

  #showProgress(what: string, fetched: number, of: number): void {
    byId("progress").hidden = false;
    byId("fetching").textContent = `${what}: ${size(fetched)} of ${size(of)}`;
    byId<HTMLProgressElement>("fetched").value = of === 0 ? 1 : fetched / of;
  }

  async #ask(field: HTMLTextAreaElement): Promise<void> {
    const text = field.value.trim();
    if (text === "" || this.#asked !== null || !this.#state?.loaded) return;
    const adapter = chosen() || null;
    const model = adapter ?? this.#state.installed[0]?.name ?? "base";
    const swapped = this.#answeredBy !== null && this.#answeredBy !== model;
    const conversation = this.#conversation;
    const turn = conversation.begin(text, model);
    field.value = "";
    const { name, messages } = conversation;
    const question = { adapter, conversation: name, messages, maxTokens: LONGEST };
    this.#asked = this.#client.ask(question, (piece) => turn.piece(piece));
    byId("stop").hidden = false;
    try {
      const answered = await this.#asked.answered;
      turn.done(answered, swapped);
      this.#answeredBy = model;
      if (this.#state !== null) this.#showState({ ...this.#state, memory: answered.memory });
    } catch (error) {
      turn.failed((error as Error).message);
      field.value = text;
    }
    this.#asked = null;
    byId("stop").hidden = true;
    field.focus();
  }
}

/** The adapter that is chosen, "" for the base; null: nothing is shown to choose from. */
function chosen(): string | null {
  return byId("models").querySelector<HTMLInputElement>("input:checked")?.value ?? null;
}

function setStatus(text: string): void {
  byId("status").textContent = text;
}

/** Say something that should be read now, with a button for what can be done about it. */
function notify(sentence: string, label?: string, act?: () => void): void {
  const notice = element("div", { className: "notice" }, element("p", {}, sentence));
  const close = () => notice.remove();
  const done = () => {
    close();
    act?.();
  };
  notice.append(element("button", { type: "button", onclick: done }, label ?? "Close"));
  byId("notices").append(notice);
}

function forget(): void {
  byId("notices").replaceChildren();
}

async function main(): Promise<void> {
  const lack = missing();
  if (lack !== null) {
    setStatus("It cannot run here.");
    notify(lack);
    return;
  }
  await startShell((replace) => notify("A newer version of this page is ready.", "Use it", replace));
  new Page().start();
}

void main();
