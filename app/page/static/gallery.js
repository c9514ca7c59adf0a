// Everything that there is, newest first: contact prints.

import { html, useState } from "./vendor/preact-htm.js";
import { hasEnded } from "./api.js";
import { Picture, altOf, isFilm } from "./picture.js";
import { standing } from "./stage.js";

export function Gallery({ history, selected, pinned, onSelect }) {
  const [waiting, setWaiting] = useState(false);
  const more = async () => {
    setWaiting(true);
    await history.more().catch(() => {}); // the button is still there
    setWaiting(false);
  };
  const generations = history.newest;
  if (!generations.length) return null;
  return html`<section class="gallery" aria-labelledby="gallery">
    <h2 id="gallery">Gallery</h2>
    <ul class="tiles">
      ${generations.flatMap((generation) => tiles(generation, history.live.get(generation.id), selected, pinned, onSelect))}</ul>
    ${history.cursor && html`<button type="button" class="quiet more-tiles" disabled=${waiting}
      onClick=${more}>Older ones</button>`}
  </section>`;
}

function tiles(generation, live, selected, pinned, onSelect) {
  const marks = (index) => {
    const here = ({ id, index: i }) => id === generation.id && i === index;
    return [selected && here(selected) && "on", pinned && here(pinned) && "pinned"].filter(Boolean).join(" ");
  };
  if (generation.images.length) {
    return generation.images.map((image, i) => html`<li key=${image.url}><button type="button"
      class="tile ${marks(i)}" aria-current=${marks(i) ? "true" : null}
      onClick=${() => onSelect({ id: generation.id, index: i })}>
      <${Picture} url=${image.url} film=${isFilm(generation, image)} still alt=${altOf(generation, i)}
        loading="lazy" /></button></li>`);
  }
  const step = live?.step ?? generation.progress?.step ?? 0;
  const steps = live?.steps ?? generation.progress?.steps ?? 1;
  return [html`<li key=${generation.id}><button type="button" class="tile bare-tile ${generation.status} ${marks(0)}"
    aria-current=${marks(0) ? "true" : null}
    aria-label="${generation.parameters.prompt || "A generation"}: ${standing(generation, null)}"
      onClick=${() => onSelect({ id: generation.id, index: 0 })}>
    ${hasEnded(generation)
      ? html`<span>${generation.status}</span>`
      : html`<span class="ring" style=${{ "--done": generation.status === "running" ? step / steps : 0 }}></span>
        <span>${generation.status === "queued" ? "waiting" : "drawing"}</span>`}
  </button></li>`];
}
