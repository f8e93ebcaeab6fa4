// The page: what is asked of the server, and when.

import { ApiError, access, currentKey, get, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { refreshCosts } from "./costs.js";
import { byId, setText } from "./dom.js";
import { EventFeed, showRestarts } from "./events.js";
import { History } from "./history.js";
import { startImages } from "./images.js";
import { showMemory } from "./memory.js";
import { showModels, startFilter } from "./models.js";
import { showPickers } from "./pickers.js";
import { showPlots } from "./plots.js";
import { showQueue } from "./queue.js";
import { startSpeech } from "./speech.js";
import { startTabs } from "./tabs.js";
import { startTalk } from "./talk.js";
import { startTranscription } from "./transcription.js";
import { refreshVideos, startVideos } from "./videos.js";

const STATUS_EVERY_MS = 2000;
const METRICS_EVERY_MS = 5000;
const COSTS_EVERY_MS = 10000;
const RECONNECT_AFTER_MS = 3000;

let models = []; // the ids, in the order of the configuration

async function refreshStatus() {
  const engine = await (await get("/v1/engine")).json();
  setText(byId("engine-state"), `${engine.state}, ${engine.device_name || engine.device_kind}`);
  models = engine.models.map(({ id }) => id);
  showMemory(engine);
  showQueue(engine.queue);
  showRestarts(engine.restarts);
  showModels(engine.models, () => refreshStatus().catch(tellFailure));
  showPickers(engine.models);
}

const history = new History();

async function refreshPlots() {
  const response = await get("/metrics", { headers: { Accept: "text/plain" } });
  const nowS = performance.now() / 1000;
  history.push(nowS, await response.text());
  showPlots(history, nowS, models);
}

function tellFailure(error) {
  if (!(error instanceof ApiError)) console.warn(error); // a broken connection, or a fault of ours
  setText(byId("engine-state"), error.message);
}

/** Do it again and again: not while nobody looks, and not while the server refuses the key. */
async function repeat(work, everyMs) {
  for (;;) {
    await seen();
    const key = currentKey();
    try {
      await work();
    } catch (error) {
      tellFailure(error);
      if (error.status === 401 && key === currentKey()) {
        await next(access, "key");
        continue;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
}

async function seen() {
  while (document.hidden) await next(document, "visibilitychange");
}

function next(target, type) {
  return new Promise((resolve) => target.addEventListener(type, resolve, { once: true }));
}

function startKeyDialog() {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  const open = () => {
    if (dialog.open) return;
    input.value = currentKey();
    dialog.showModal();
  };
  byId("key-open").onclick = open;
  byId("key-cancel").onclick = () => dialog.close();
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close();
    useKey(input.value.trim());
  };
  access.addEventListener("unauthorized", () => {
    const wanted = currentKey() ? "The server refuses this key." : "The server asks for a key.";
    setText(byId("key-reason"), `${wanted} It is kept until this tab is closed.`);
    open();
  });
}

startKeyDialog();
startFilter();
startTabs(byId("playground-tabs"));
startTalk();
startChat();
startImages();
startVideos();
startSpeech();
startTranscription();
const feed = new EventFeed();
repeat(refreshStatus, STATUS_EVERY_MS);
repeat(refreshPlots, METRICS_EVERY_MS);
repeat(refreshVideos, STATUS_EVERY_MS);
repeat(refreshCosts, COSTS_EVERY_MS);
repeat(() => feed.follow(), RECONNECT_AFTER_MS);
