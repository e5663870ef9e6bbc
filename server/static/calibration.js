// A calibration: started, watched, cancelled; and the profile in use.

import { Problem, call } from "./api.js";
import { byId, show, write } from "./text.js";

const LOOK_MS = 400;
const ENDED = {
  done: "Done. Requests go by the new figures.",
  cancelled: "Cancelled. The profile in use stays.",
};

let job = null;
let mostS = 0; // that it was seen to need
let onProfile = async () => {};

/** Start; `measured` is called when there is a new profile. */
export function start(measured) {
  onProfile = measured;
  byId("calibrate").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(begin);
  });
  byId("cancel").addEventListener("click", () => attempt(cancel));
}

/** Show the profile in use. */
export async function showProfile() {
  const { source, profile } = await call("/profile");
  const { host, intra_op_threads: threads } = profile.key;
  const when = new Date(profile.measured_at).toLocaleString();
  const kept = source === "stored" ? ", kept from an earlier start" : "";
  const overhead = profile.overhead_ms.toFixed(2);
  write(
    byId("profile"),
    `In use: a ${profile.kind} profile of ${when}${kept}. ${host.cpu}, ${threads} ` +
      `${threads === 1 ? "thread" : "threads"}; ${overhead} ms outside the network.`,
  );
}

async function attempt(work) {
  show(byId("job-error"), null);
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) askForToken();
    else show(byId("job-error"), error.message);
  }
}

function askForToken() {
  byId("token-field").hidden = false;
  const given = byId("token").value;
  show(byId("job-error"), given ? "This is not the admin token" : "This needs the admin token");
  byId("token").focus();
}

/** Return the token's header, as UTF-8: of a letter that Latin-1 lacks no header is made. */
function headers() {
  const token = new TextEncoder().encode(byId("token").value);
  return token.length ? { authorization: `Bearer ${String.fromCharCode(...token)}` } : {};
}

async function begin() {
  const kind = new FormData(byId("calibrate")).get("kind");
  byId("start").disabled = true;
  write(byId("job-state"), "");
  try {
    job = await call("/profile", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      body: JSON.stringify({ kind }),
    });
    write(byId("job-state"), "Measuring; requests are served meanwhile.");
  } catch (error) {
    byId("start").disabled = false;
    if (error.status !== 409 || !error.body.job) throw error;
    job = { id: error.body.job };
    write(byId("job-state"), "One is under way already: this is it.");
  }
  await watch();
}

async function cancel() {
  await call(`/profile/jobs/${job.id}`, { method: "DELETE", headers: headers() });
  write(byId("job-state"), "Cancelling");
}

async function watch() {
  setRunning(true);
  mostS = 0;
  try {
    while (await isUnderWay()) await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  } catch (error) {
    write(byId("job-state"), "");
    throw error;
  } finally {
    setRunning(false);
  }
  write(byId("job-state"), job.note ?? ENDED[job.state] ?? "");
  if (job.state === "failed") show(byId("job-error"), `The calibration failed: ${job.error}`);
  if (job.state === "done") await onProfile();
}

/** Show the job as it stands, and return whether to look again: also where nobody answers now. */
async function isUnderWay() {
  try {
    job = await call(`/profile/jobs/${job.id}`);
    mostS = Math.max(mostS, job.seconds_left ?? 0);
  } catch (error) {
    if (error.status !== 0) throw error;
    return true;
  }
  showJob();
  return job.state === "running";
}

function setRunning(isRunning) {
  byId("start").disabled = isRunning;
  byId("cancel").hidden = !isRunning;
  byId("job").hidden = !isRunning;
  if (!isRunning && document.activeElement === document.body) byId("start").focus();
}

function showJob() {
  // A noisy host ends by time, with few figures known well enough.
  const spent = job.seconds_left == null || !mostS ? 0 : 1 - job.seconds_left / mostS;
  byId("job-progress").value = Math.max(job.total ? job.done / job.total : 0, spent);
  const left = job.seconds_left == null ? "" : `; ${Math.ceil(job.seconds_left)} s left at most`;
  const done = job.total ? `${job.done} of ${job.total} figures known well enough` : "Starting";
  write(byId("job-figures"), `${done}${left}`);
}
