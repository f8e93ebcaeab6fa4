// Video jobs: create, watch, cancel, play, delete.

import { get, post, remove } from "./api.js";
import { byId, element, keyed, setText } from "./dom.js";
import { runOnSubmit } from "./run.js";
import { formatSeconds } from "./units.js";

const FINISHED = new Set(["completed", "failed"]);

export function startVideos() {
  runOnSubmit(byId("videos-form"), async (signal) => {
    const video = await (await post("/v1/videos", fields(), { signal })).json();
    await refreshVideos();
    return `Created ${video.id}.`;
  });
  byId("panel-videos").addEventListener("show", () => {
    refreshVideos().catch((error) => setText(byId("videos-empty"), error.message));
  });
}

/** Show the newest jobs, if their panel is seen. Throws ApiError. */
export async function refreshVideos() {
  if (byId("panel-videos").hidden) return;
  const { data } = await (await get("/v1/videos?limit=20")).json();
  byId("videos-empty").hidden = data.length > 0;
  for (const child of byId("videos-list").children) {
    if (!data.some((video) => video.id === child.dataset.key)) letGo(child);
  }
  keyed(byId("videos-list"), data, (video) => video.id, createJob, fillJob);
}

function fields() {
  const form = new FormData();
  form.set("model", byId("videos-model").value);
  form.set("size", byId("videos-size").value);
  const optional = {
    prompt: byId("videos-prompt"),
    seconds: byId("videos-seconds"),
    seed: byId("videos-seed"),
  };
  for (const [name, { value }] of Object.entries(optional)) if (value) form.set(name, value);
  const [reference] = byId("videos-reference").files;
  if (reference) form.set("input_reference", reference);
  return form;
}

function createJob(video) {
  const title = video.prompt ?? video.id;
  const outcome = element("p", { className: "outcome" });
  outcome.setAttribute("role", "status");
  const progress = element("progress", { max: 100 });
  progress.setAttribute("aria-label", `Progress of ${title}`);
  const player = element("video", { controls: true, hidden: true });
  player.setAttribute("aria-label", title);
  const button = (name, work) => {
    const className = name.toLowerCase();
    const node = element("button", { type: "button", textContent: name, className });
    node.setAttribute("aria-label", `${name} ${title}`);
    node.onclick = async () => {
      try {
        await work();
      } catch (error) {
        setText(outcome, `${name}: ${error.message}`);
      }
    };
    return node;
  };
  const id = encodeURIComponent(video.id);
  return element(
    "li",
    { className: "card" },
    element("h4", { textContent: title }),
    element("p", { className: "state" }),
    progress,
    element(
      "div",
      { className: "buttons" },
      button("Play", () => play(id, player)),
      button("Cancel", async () => {
        await post(`/v1/videos/${id}/cancel`);
        await refreshVideos();
      }),
      button("Delete", async () => {
        await remove(`/v1/videos/${id}`);
        await refreshVideos();
        byId("videos-title").focus(); // the button that had it is gone
      }),
    ),
    outcome,
    player,
  );
}

function fillJob(card, video) {
  const finished = FINISHED.has(video.status);
  const told = [video.status.replaceAll("_", " "), video.model, video.size, `${video.seconds} s`];
  if (video.position !== null) told.push(`position ${video.position}`);
  if (video.eta_s !== null) told.push(`expected in ${formatSeconds(video.eta_s)}`);
  if (video.error !== null) told.push(video.error.message);
  setText(card.querySelector(".state"), told.join(" · "));
  const progress = card.querySelector("progress");
  progress.value = video.progress;
  progress.hidden = finished;
  card.querySelector(".play").hidden = video.status !== "completed";
  card.querySelector(".cancel").hidden = finished;
}

/** Fetched whole: a video element cannot send the key. */
async function play(id, player) {
  if (!player.src) {
    const response = await get(`/v1/videos/${id}/content`);
    player.src = URL.createObjectURL(await response.blob());
    player.hidden = false;
  }
  await player.play();
}

function letGo(card) {
  const { src } = card.querySelector("video");
  if (src) URL.revokeObjectURL(src);
}
