/** What the page needs from the browser before it starts: safe origin, service worker, isolation if it can be had. */

const RELOADED = "pitstop.reloaded"; // in sessionStorage: one reload for isolation, not one after the other
const PATIENCE = 15_000; // milliseconds for the first visit's service worker

/** Why this browser cannot run pitstop, as a sentence; null: it can. */
export function missing(): string | null {
  if (!isSecureContext) {
    return "Browsers store and verify files only for https addresses and for localhost: open this page through one.";
  }
  if (!("storage" in navigator) || !("getDirectory" in navigator.storage)) {
    return "This browser cannot store models (it has no origin private file system); a newer one can.";
  }
  if (!("locks" in navigator)) return "This browser is too old for pitstop (it has no Web Locks); a newer one works.";
  return null;
}

/**
 * Start the service worker and return when it answers for this page; then the engine it hands out is kept for a visit
 * without a network. Where it brings the isolation that threads need, the page is loaded once more: the promise then
 * never settles.
 */
export async function startShell(onNewVersion: (replace: () => void) => void): Promise<void> {
  // A page that comes back from the browser's memory has lost its worker, or waits for a reload that happened.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
  if (!("serviceWorker" in navigator)) return;
  const shell = navigator.serviceWorker;
  let registration;
  try {
    registration = await shell.register("service_worker.js");
  } catch (error) {
    console.warn("this visit leaves nothing for one without a network:", error);
    return;
  }
  watch(registration, onNewVersion);
  await controlled(shell, registration);
  if (crossOriginIsolated || shell.controller === null || sessionStorage.getItem(RELOADED) !== null) {
    sessionStorage.removeItem(RELOADED);
    return;
  }
  sessionStorage.setItem(RELOADED, "yes");
  location.reload();
  await new Promise(() => {});
}

/** Wait until a service worker answers for this page; give up if it cannot be installed. */
async function controlled(shell: ServiceWorkerContainer, registration: ServiceWorkerRegistration): Promise<void> {
  if (shell.controller !== null) return;
  await new Promise<void>((resolve) => {
    shell.addEventListener("controllerchange", () => resolve(), { once: true });
    registration.installing?.addEventListener("statechange", (event) => {
      if ((event.target as ServiceWorker).state === "redundant") resolve();
    });
    setTimeout(resolve, PATIENCE);
  });
}

/** Offer a newer version of the page once it is complete; the page is loaded again when it takes over. */
function watch(registration: ServiceWorkerRegistration, onNewVersion: (replace: () => void) => void): void {
  const offer = (waiting: ServiceWorker) =>
    onNewVersion(() => {
      navigator.serviceWorker.addEventListener("controllerchange", () => location.reload(), { once: true });
      waiting.postMessage("replace");
    });
  if (registration.waiting !== null && navigator.serviceWorker.controller !== null) offer(registration.waiting);
  registration.addEventListener("updatefound", () => {
    const coming = registration.installing;
    coming?.addEventListener("statechange", () => {
      if (coming.state === "installed" && navigator.serviceWorker.controller !== null) offer(coming);
    });
  });
}
