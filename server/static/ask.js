// A picture, asked about at the slider's target, and the answer with how it came about.

import { Problem, bytes, call, latest } from "./api.js";
import { bars, byId, element, ms, percent, show, write } from "./text.js";

const SETTLED_MS = 150;
const SERVED = ["image/png", "image/jpeg"];

let picture = null;
let targetMs = () => 0;
let timer = 0;

/** Start; `target` says what the slider stands at. `model` is what /page.json says. */
export function start(model, target) {
  targetMs = target;
  byId("try-picture").hidden = !model.takes_pictures;
  if (!model.takes_pictures) {
    const shape = model.shape.slice(1).join(" × ");
    show(byId("try-other"), `This model takes no pictures. POST its input, ${shape}, to /infer as JSON or .npy.`);
    return;
  }
  byId("file").addEventListener("change", ({ target }) => {
    choose(target.files[0]);
    target.value = ""; // else the same file again would be no change
  });
  byId("examples").replaceChildren(...model.examples.map(example));
  byId("examples").hidden = !model.examples.length;
  takeDrops();
}

/** Ask again, once the slider rests. */
export function askAgain() {
  if (!picture) return;
  clearTimeout(timer);
  timer = setTimeout(ask, SETTLED_MS);
}

function example(address, i) {
  const button = element("button", "", { type: "button", "aria-pressed": "false" });
  button.append(element("img", "", { src: address, alt: `Example picture ${i + 1}` }));
  button.addEventListener("click", async () => {
    try {
      choose(await bytes(address));
      button.setAttribute("aria-pressed", "true");
    } catch (error) {
      refuse(error.message);
    }
  });
  return button;
}

function takeDrops() {
  const body = document.body.classList;
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    body.add("dragged");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) body.remove("dragged");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    body.remove("dragged");
    if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
}

function choose(file) {
  if (!file) return;
  for (const button of byId("examples").children) button.setAttribute("aria-pressed", "false");
  if (!SERVED.includes(file.type)) {
    refuse(`${file.name || "This file"} is not a PNG or JPEG picture`);
    return;
  }
  picture = file;
  const shown = byId("picture");
  if (shown.src) URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(file);
  ask();
}

function refuse(message) {
  picture = null;
  byId("answer").hidden = true;
  show(byId("try-error"), message);
}

const ask = latest(async () => {
  const asked = picture;
  if (!asked) return;
  const began = performance.now();
  byId("answer").setAttribute("aria-busy", "true");
  try {
    const answer = await call(`/infer?max_latency_ms=${targetMs()}&top_k=5`, {
      method: "POST",
      headers: { "content-type": asked.type },
      body: asked,
    });
    if (asked === picture) showAnswer(answer, performance.now() - began);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (asked === picture) {
      byId("answer").hidden = true;
      show(byId("try-error"), error.message);
    }
  }
  byId("answer").setAttribute("aria-busy", "false");
});

function showAnswer(answer, seenMs) {
  show(byId("try-error"), null);
  byId("answer").hidden = false;
  const label = answer.labels?.[0] ?? "Answered";
  write(byId("answer-label"), label);
  const met = byId("met");
  met.toggleAttribute("data-late", !answer.target_met);
  write(met, answer.target_met ? "✓ in time" : "✗ late");
  const time = answer.target_met ? "in time" : "late";
  write(byId("answer-spoken"), `Answer ${label}, from point ${answer.point}, ${time}`);
  showSpent(answer);
  const top = answer.top?.[0] ?? [];
  bars(byId("top"), top.map((one) => [one.label, one.score, percent(one.score)]));
  const facts = [
    ["Point", answer.point, "point"],
    ["Its accuracy", percent(answer.accuracy, 2), "accuracy"],
    ["Predicted tail", ms(answer.predicted_ms), "predicted"],
    ["Computed in", ms(answer.compute_ms), "compute"],
    ["Waited", ms(answer.queue_ms), "queue"],
    ["In all, in the server", ms(answer.total_ms), "total"],
    ["Target", ms(answer.max_latency_ms), "asked"],
    ["Seen by this browser", ms(seenMs), "seen"],
  ];
  byId("facts").replaceChildren(
    ...facts.map(([name, value, key]) => {
      const group = element("div");
      group.append(element("dt", name), element("dd", value, { "data-fact": key }));
      return group;
    }),
  );
}

/** Show what the time went into, against the target. */
function showSpent({ queue_ms, compute_ms, total_ms, max_latency_ms }) {
  const spent = byId("spent");
  const whole = Math.max(total_ms, max_latency_ms);
  const share = (value) => `${(100 * value) / whole}%`;
  const [queue, compute, rest, target] = spent.children;
  queue.style.width = share(queue_ms);
  compute.style.width = share(compute_ms);
  rest.style.width = share(Math.max(0, total_ms - queue_ms - compute_ms));
  target.style.left = share(max_latency_ms);
  spent.setAttribute(
    "aria-label",
    `${ms(queue_ms)} waiting, ${ms(compute_ms)} computing, ${ms(total_ms)} in all, ` +
      `of a target of ${ms(max_latency_ms)}`,
  );
}
