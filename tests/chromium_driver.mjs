/**
 * Chromium for the tests in Python: one JSON line says what to do with a tab, one says what came of it.
 *
 *     {"tab": 0, "call": "click", "with": ["#send"]}  ->  {"result": null} or {"error": "…"}
 *
 * `call` is a method of puppeteer's Page, or one of the words below. What a page complains of is kept until asked for.
 */

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const packages = createRequire(new URL("../src/pitstop/device/web/package.json", import.meta.url));
const { default: puppeteer } = await import(packages.resolve("puppeteer-core"));

const [executablePath, userDataDir, ...flags] = process.argv.slice(2);
const browser = await puppeteer.launch({ executablePath, userDataDir, headless: true, args: flags, protocolTimeout: 600_000 });
const tabs = [];
const complaints = [];

const words = {
  async open() {
    const page = await browser.newPage();
    page.on("console", (message) => {
      if (["error", "warn"].includes(message.type())) complaints.push(`${message.type()}: ${message.text()}`);
    });
    page.on("pageerror", (error) => complaints.push(`uncaught: ${error.message}`));
    return tabs.push({ page, protocol: await page.createCDPSession() }) - 1;
  },
  complaints: () => complaints.splice(0),
  pressKey: (tab, key) => tabs[tab].page.keyboard.press(key),
  typeText: (tab, text) => tabs[tab].page.keyboard.type(text),
  protocol: (tab, method, parameters) => tabs[tab].protocol.send(method, parameters),
  /** End the process of a tab, as a system does that has no memory left. */
  async crash(tab) {
    const gone = new Promise((resolve) => tabs[tab].page.once("error", resolve));
    tabs[tab].protocol.send("Page.crash").catch(() => {});
    await gone;
  },
  quit: () => browser.close(),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { tab, call, with: given } = JSON.parse(line);
  let reply;
  try {
    const { page } = tabs[tab] ?? {};
    const result = call in words ? await words[call](...given) : await page[call](...given);
    reply = { result: typeof result === "object" && !Array.isArray(result) ? null : result };
    if (call === "protocol" || call === "evaluate") reply = { result };
  } catch (error) {
    reply = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
  if (call === "quit") process.exit();
}
