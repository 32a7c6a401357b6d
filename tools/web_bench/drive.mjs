// Opens Chromium as a phone would be, lets both sides answer in turn, and prints the times of every round as JSON.
import { createRequire } from "node:module";

const { web, origin, profile, precisions, rounds, threads, contextLength, prompting } = JSON.parse(process.argv[2]);
const { default: puppeteer, KnownDevices } = await import(createRequire(`${web}/package.json`).resolve("puppeteer-core"));

const browser = await puppeteer.launch({
  executablePath: "/usr/bin/chromium",
  userDataDir: profile,
  protocolTimeout: 900_000,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
try {
  const result = {};
  for (const precision of precisions) {
    // A page each: what one precision has left in memory is not the next one's.
    const page = await browser.newPage();
    await page.emulate(KnownDevices["Pixel 5"]);
    await page.goto(`${origin}/bench/page.html`);
    result[precision.name] = await page.evaluate(measure, { precision, rounds, threads, contextLength, prompting });
    await page.close();
  }
  process.stdout.write(JSON.stringify(result));
} finally {
  await browser.close();
}

// Runs in the page.
async function measure({ precision, rounds, threads, contextLength, prompting }) {
  const { Ours, Theirs, store } = await import("/bench/sides.js");
  if (!crossOriginIsolated) throw new Error("the page is not isolated: no threads");
  const { base, adapters } = precision; // {name, sha256}
  await store([base, ...adapters].map((file) => file.name));
  const ours = new Ours();
  const theirs = new Theirs();
  const named = Object.fromEntries(adapters.map((file) => [file.name, file]));
  await ours.call("open", { threads, base, adapters: named, prompting, contextLength });
  await theirs.open({ threads, base: base.name, adapters: adapters.map((file) => file.name), contextLength });

  const words = (count, number) => Array.from({ length: count }, (_, at) => `word ${number} ${at * 7 + number}`).join(" ");
  const long = (number) => `${number} ${words(40, number)}`;
  const chat = "Tell me how a river finds its way from the mountains to the sea, and who lives beside it. ".repeat(3);
  const [one, two] = adapters.map((file) => file.name);
  const seen = { decode: [[], []], prefill: [[], []], swap: [[], []], plain: [], same: [] };
  for (const conversation of [one, two]) await ours.ask(chat, 1, conversation);
  // Threads spin on for a while after their last token: one side's must have gone to sleep before the other begins.
  const timed = async (side, ...asked) => {
    await new Promise((resolve) => setTimeout(resolve, 300));
    return side.ask(...asked);
  };
  for (let round = 0; round <= rounds; round++) {
    // Tokens are counted by our side; both read the same text with the same vocabulary.
    const read = await timed(ours, long(round), 1);
    const readThere = await timed(theirs, long(round), 1);
    const rates = [(await timed(ours, chat, 32)).decode, (await timed(theirs, chat, 32)).decode];
    const swaps = [[], []];
    const plain = [];
    const same = [];
    for (const adapter of [one, two]) {
      plain.push((await timed(ours, chat, 1)).whole);
      swaps[0].push((await timed(ours, chat, 1, adapter)).whole);
      same.push((await timed(ours, chat, 1, adapter)).whole);
      await ours.ask(chat, 1); // back to the base, for the next one
    }
    for (const adapter of [one, two]) swaps[1].push((await timed(theirs, chat, 1, adapter)).whole);
    if (round === 0) continue; // warms up
    seen.prefill[0].push((read.prompt * 1000) / read.first);
    seen.prefill[1].push((read.prompt * 1000) / readThere.first);
    rates.forEach((rate, side) => seen.decode[side].push(rate));
    swaps.forEach((times, side) => seen.swap[side].push(...times));
    seen.plain.push(...plain);
    seen.same.push(...same);
  }
  const memory = await ours.call("memory");
  await ours.call("close");
  await theirs.close();
  return { ...seen, memory };
}
