// The page's life: wait until the server is ready, load, then look once a second.

import * as ask from "./ask.js";
import { Problem, call, readiness, text } from "./api.js";
import * as calibration from "./calibration.js";
import * as frontier from "./frontier.js";
import { byId, show, write } from "./text.js";
import * as traffic from "./traffic.js";

const LOOK_MS = 1000;
const LEAVING = "The server is shutting down, or is not up yet: new requests should go elsewhere.";

let shown = null;
let wasReady = false;
let asked = null;

async function measured() {
  await Promise.all([frontier.load(), calibration.showProfile()]);
}

/** Show the model that is served. A server that comes back may serve another: then all is anew. */
async function enter() {
  const model = await call("/page.json");
  if (shown) {
    if (JSON.stringify(model) !== shown) location.reload();
    return;
  }
  write(byId("model"), model.name);
  write(byId("metric"), `Accuracy: ${model.metric}, ${model.data}.`);
  document.title = `Maestro: ${model.name}`;
  frontier.start(askWhereNew);
  ask.start(model, frontier.targetMs);
  calibration.start(measured);
  shown = JSON.stringify(model);
}

function askWhereNew(target) {
  if (target !== asked) ask.askAgain();
  asked = target;
}

async function look() {
  // The gauge is 0 while any worker starts; others may serve meanwhile.
  const allReady = traffic.take(await text("/metrics"), performance.now() / 1000);
  const state = allReady ? { ready: true } : await readiness();
  if (!state.ready) {
    showWaiting(state);
    wasReady = false;
    return;
  }
  if (!wasReady) await enter();
  showStatus("ready", "Ready");
  byId("waiting").hidden = true;
  byId("main").hidden = false;
  if (!wasReady) {
    await measured();
    ask.askAgain(); // what was asked meanwhile has no answer
  } else if (await frontier.load()) await calibration.showProfile();
  wasReady = true;
  traffic.render();
}

function showStatus(state, words) {
  byId("status").dataset.state = state;
  write(byId("status"), words);
}

function showWaiting({ calibration: job }) {
  const bar = byId("waiting-progress");
  const isRunning = job?.state === "running";
  byId("waiting").hidden = false;
  bar.hidden = !isRunning;
  showStatus("waiting", isRunning ? "Calibrating" : "Not ready");
  write(byId("waiting-text"), job ? whyNotReady(job) : LEAVING);
  if (!isRunning) return;
  bar.max = job.total || 1;
  bar.value = job.done;
}

function whyNotReady({ state, error }) {
  if (state === "cancelled") return "The calibration was cancelled; POST /profile starts another.";
  if (error) return `The calibration failed: ${error}. POST /profile starts another.`;
  return "The server measures this host before it serves. This page goes on by itself.";
}

function showLost(message) {
  showStatus("lost", "Not connected");
  wasReady = false;
  byId("waiting").hidden = false;
  byId("waiting-progress").hidden = true;
  show(byId("waiting-text"), `${message}. Trying again each second.`);
}

async function run() {
  if (!document.hidden) {
    try {
      await look();
    } catch (error) {
      showLost(error.message);
      if (!(error instanceof Problem)) console.error(error);
    }
  }
  setTimeout(run, LOOK_MS);
}

run();
