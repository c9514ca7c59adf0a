// One generation, large: while it is drawn, and what came of it.

import { html, useState } from "./vendor/preact-htm.js";
import { apiKey, hasEnded } from "./api.js";
import { Dialog } from "./bar.js";
import { KINDS, code, toClipboard } from "./copy.js";
import { labelOf } from "./form.js";
import { Icon } from "./icons.js";
import { Picture, altOf, isFilm, useSource } from "./picture.js";
import { PICTURES } from "./request.js";

export function seconds(value) {
  return value < 90 ? `${Math.max(1, Math.round(value))} s` : `${Math.round(value / 60)} min`;
}

/** Where it stands, in words. */
export function standing(generation, live) {
  const { status, position, progress, images } = generation;
  const eta = live?.eta ?? generation.eta;
  const left = eta ? `, about ${seconds(eta)}${status === "running" ? " left" : ""}` : "";
  if (status === "queued") return position ? `Waiting: ${position} ahead${left}` : `Next in the queue${left}`;
  if (status === "running") {
    const step = live?.step ?? progress?.step;
    const stage = live?.stage ? `, ${live.stage}` : "";
    return step ? `Drawing: step ${step} of ${live?.steps ?? progress.steps}${stage}${left}` : "Drawing";
  }
  if (status === "succeeded") return images.length > 1 ? `${images.length} pictures are ready` : "The picture is ready";
  return { failed: "It failed", canceled: "Canceled", expired: "It expired before it was drawn" }[status];
}

export function Stage({ generation, live, index, model, onIndex, onCancel, actions }) {
  return html`<article class="print" aria-label=${generation.parameters.prompt || "A generation"}>
    ${generation.images.length
      ? html`<${Drawn} generation=${generation} index=${index} onIndex=${onIndex} />`
      : html`<${Developing} generation=${generation} live=${live} onCancel=${onCancel} />`}
    <div class="caption">
      <h2>${generation.parameters.prompt || altOf(generation, 0)}${generation.parameters.end_prompt ? html` <span
        class="to">→ ${generation.parameters.end_prompt}</span>` : null}</h2>
      ${generation.images.length > 0 && html`<${Actions} key=${imageOf(generation, index).url}
        generation=${generation} index=${index} model=${model} ...${actions} />`}
      ${hasEnded(generation) && !generation.images.length && html`<div class="actions">
        <button type="button" onClick=${actions.onReuse}><${Icon} name="reuse" />Reuse</button></div>`}
      ${generation.warnings.map((warning) => html`<p class="warning">${warning}</p>`)}
      <${Facts} generation=${generation} index=${index} />
    </div>
  </article>`;
}

const imageOf = ({ images }, index) => images[index] ?? images[0];

function Drawn({ generation, index, onIndex }) {
  const { images } = generation;
  const image = imageOf(generation, index);
  return html`<div class="drawn">
    <div class="frame" data-shape=${shapeOf(image)}>
      <${Picture} key=${image.url} url=${image.url} film=${isFilm(generation, image)} alt=${altOf(generation, index)}
        width=${image.width} height=${image.height} class="hero" />
    </div>
    ${images.length > 1 && html`<div class="strip">${images.map((one, i) => html`<button key=${one.url} type="button"
      class=${i === index ? "on" : ""}
      aria-pressed=${i === index ? "true" : "false"} onClick=${() => onIndex(i)}>
        <${Picture} url=${one.url} film=${isFilm(generation, one)} still alt=${altOf(generation, i)} /></button>`)}
        </div>`}
  </div>`;
}

const shapeOf = ({ width, height }) => (width > height ? "wide" : width < height ? "tall" : "square");

function Developing({ generation, live, onCancel }) {
  const { n, width, height } = generation.parameters;
  const ended = hasEnded(generation);
  const step = live?.step ?? generation.progress?.step ?? 0;
  const steps = live?.steps ?? generation.progress?.steps ?? generation.parameters.num_inference_steps;
  const done = generation.status === "running" ? step / steps : 0;
  return html`<div class="developing ${generation.status}">
    <div class="sheets" data-count=${Math.min(n, 4)}>${Array.from({ length: n }, (_, i) => html`<div key=${i}
      class="frame" data-shape=${shapeOf(generation.parameters)}>
      <div class="paper" style=${{ aspectRatio: `${width} / ${height}` }}>
        ${live?.previews[i] && html`<${Preview} url=${live.previews[i]} done=${done} number=${i} />`}
        ${ended && html`<span class="fate">${standing(generation)}</span>`}
      </div></div>`)}</div>
    ${generation.error && html`<p class="error">${generation.error.detail} <code>${generation.error.type}</code></p>`}
    ${!ended && html`<div class="progress">
      <progress max="1" value=${generation.status === "queued" ? null : done} aria-label="Progress"></progress>
      <div class="progress-row"><p>${standing(generation, live)}</p>
        <button type="button" class="quiet" onClick=${onCancel}><${Icon} name="close" />Cancel</button></div>
    </div>`}
  </div>`;
}

function Preview({ url, done, number }) {
  const source = useSource(url);
  return source && html`<img class="preview" src=${source} alt="Picture ${number + 1}, half drawn"
    style=${{ "--blur": `${(1 - done) * 10}px` }} />`;
}

function Actions({ generation, index, model, pinned, onReuse, onUse, onVary, onPin }) {
  const [showsCode, setShowsCode] = useState(false);
  const source = useSource(imageOf(generation, index).url);
  return html`<div class="actions">
    <button type="button" onClick=${onReuse}><${Icon} name="reuse" />Reuse</button>
    ${onVary && html`<button type="button" onClick=${onVary}><${Icon} name="spark" />Vary</button>`}
    ${onUse && html`<button type="button" onClick=${onUse}><${Icon} name="brush" />Edit</button>`}
    <button type="button" aria-pressed=${pinned ? "true" : "false"} onClick=${onPin}><${Icon} name="compare" />
      ${pinned ? "Stop comparing" : "Compare"}</button>
    ${source && html`<a class="button" href=${source}
      download="${generation.id}-${index}.${generation.parameters.output_format}">
      <${Icon} name="download" />Download</a>`}
    <button type="button" aria-haspopup="dialog" onClick=${() => setShowsCode(true)}>
      <${Icon} name="code" />Copy as…</button>
    ${showsCode && html`<${CodeDialog} generation=${generation} model=${model} onClose=${() => setShowsCode(false)} />`}
  </div>`;
}

function CodeDialog({ generation, model, onClose }) {
  const [kind, setKind] = useState("curl");
  const [copied, setCopied] = useState(false);
  const text = code(kind, generation, model, { origin: location.origin, keyed: Boolean(apiKey()) });
  const copy = async () => {
    await toClipboard(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  return html`<${Dialog} label="Draw it from code" onClose=${onClose}>
    <fieldset class="tasks"><legend class="unseen">Language</legend>
      ${Object.entries(KINDS).map(([name, label]) => html`<label key=${name} class=${name === kind ? "on" : ""}>
      <input type="radio" name="kind" value=${name} checked=${name === kind} onChange=${() => setKind(name)} /><span>
        ${label}</span></label>`)}</fieldset>
    <pre class="code" tabindex="0" aria-label="Code"><code>${text}</code></pre>
    <button type="button" class="primary" onClick=${copy}>${copied ? "Copied" : `Copy as ${KINDS[kind]}`}</button>
    <p class="unseen" role="status">${copied ? "Copied" : ""}</p>
  </${Dialog}>`;
}

const ELSEWHERE = ["prompt", "seed", "guidance", "loras"];
const HIDDEN = [...ELSEWHERE, "metadata", "preview_every", "priority", "expires_in", "webhook", ...PICTURES];
const USUAL = {
  n: 1,
  best_of: 1,
  reproducible: false,
  negative_prompt: "",
  prompt_weights: false,
  output_format: "png",
};

/** What a picture was drawn by, as [field, label, text]. */
export function facts(generation, index = 0) {
  const { parameters, images } = generation;
  const { width, height, ...rest } = parameters;
  const shown = [
    ["seed", "Seed", String(images[index]?.seed ?? parameters.seed)],
    ["size", "Size", `${width} × ${height}`],
  ];
  for (const [field, value] of Object.entries(rest)) {
    if (HIDDEN.includes(field) || value === null || value === USUAL[field]) continue;
    shown.push([field, labelOf(field), String(value)]);
  }
  for (const [name, value] of Object.entries(parameters.guidance ?? {})) {
    if (value !== null) shown.push([`guidance.${name}`, capital(name), Array.isArray(value) ? value.join(" to ") : String(value)]);
  }
  for (const { name, scale } of parameters.loras ?? []) shown.push([`loras.${name}`, `LoRA ${name}`, String(scale)]);
  return shown;
}

const capital = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

function Facts({ generation, index }) {
  const { timings } = generation;
  return html`<dl class="facts">
    ${facts(generation, index).map(([field, label, text]) => html`<div key=${field}><dt>${label}</dt><dd>${text}</dd>
      </div>`)}
    ${timings.running !== undefined && html`<div><dt>Drawn in</dt><dd>${timings.running.toFixed(1)} s</dd></div>`}
  </dl>`;
}
