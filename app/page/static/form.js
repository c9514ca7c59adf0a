// The form: of a model and a task, only what they can do.

import { html, useState } from "./vendor/preact-htm.js";
import { MaskEditor, PictureWell } from "./canvas.js";
import { Icon } from "./icons.js";
import { TASKS, defaultOf, fieldsOf, movedTo, taskOf } from "./request.js";

const SCHEDULERS = {
  dpmpp_2m: "DPM++ 2M",
  dpmpp_2m_sde: "DPM++ 2M SDE",
  ddim: "DDIM",
  ddpm: "DDPM",
  euler: "Euler",
  euler_a: "Euler ancestral",
  euler_trailing: "Euler, trailing",
  heun: "Heun",
  deis: "DEIS",
  unipc: "UniPC",
  pndm: "PNDM",
  lcm: "LCM",
  tcd: "TCD",
};

const GUIDES = {
  clip: { label: "CLIP guidance", help: "How hard CLIP pulls to the prompt.", max: 10, step: 0.1 },
  classifier: { label: "Classifier guidance", help: "How hard a classifier pulls to the class.", max: 10, step: 0.1 },
  rescale: { label: "Rescale", help: "How much of the contrast that guidance adds is taken back.", max: 1, step: 0.05 },
  every: { label: "Guidance every … steps", help: "The steps between use what it added last.", max: 10, step: 1 },
  dynamic_threshold: { label: "Dynamic threshold", help: "Values kept unclipped, such as 0.995.", max: 1, step: 0.005 },
};

const SHAPES = [["Square", 1, 1], ["Wide", 3, 2], ["Tall", 2, 3]];

export const labelOf = (field) => LABELS[field] ?? field;
const LABELS = {
  prompt: "Prompt",
  negative_prompt: "Without",
  end_prompt: "To, in words",
  image: "Picture",
  mask: "Mask",
  end_image: "To, a picture",
  control_image: "Picture to follow",
  ip_adapter_image: "Picture to take up",
  width: "Width",
  height: "Height",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  scheduler: "Scheduler",
  seed: "Seed",
  n: "Pictures",
  best_of: "Best of",
  strength: "Strength",
  mix: "Mix",
  control_scale: "How closely",
  ip_adapter_scale: "How much of it",
  num_frames: "Frames",
  fps: "Frames a second",
  output_format: "Format",
  prompt_weights: "Brackets weigh words",
  reproducible: "Reproducible",
  model: "Model",
  task: "Task",
};

/** The id of a field's control, for the summary of errors to point at. */
export const idOf = (field) => `f-${field.replaceAll(".", "-")}`;

export function Form({ models, model, draft, pictures, errors, busy, onDraft, onPicture, onSubmit, onFile }) {
  const task = taskOf(model, draft);
  const fields = fieldsOf(model, task);
  const set = (field) => (value) => onDraft({ ...draft, [field]: value });
  const bind = (field) => ({ field, label: labelOf(field), error: errors[field], onValue: set(field) });
  const number = (field) => ({ ...bind(field), value: draft[field] ?? defaultOf(model, task, field) });
  const guides = Object.keys(GUIDES).filter((name) => fields.has(`guidance.${name}`));
  const formats = model.video ? ["mp4", "webp", "png", "avif"] : ["png", "jpeg", "webp", "avif"];
  const well = (field) => ({
    id: idOf(field),
    label: labelOf(field),
    picture: pictures[field],
    error: errors[field],
    onFile: (file) => onFile(file, field),
    onRemove: () => onPicture(field, null),
  });
  const submit = (event) => {
    event.preventDefault();
    onSubmit();
  };
  const [opened] = useState(!matchMedia("(max-width: 860px)").matches); // a phone shows the words and the picture
  const keys = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  };

  return html`<form class="form" noValidate onSubmit=${submit} onKeyDown=${keys} aria-label="What to draw">
    <div class="fields">
      <${ModelPicker} models=${models} model=${model} error=${errors.model}
        onValue=${(name) => onDraft(movedTo(models.find((one) => one.name === name), draft))} />
      ${model.tasks.length > 1 && html`<${Tasks} tasks=${model.tasks} task=${task} error=${errors.task}
        onValue=${set("task")} />`}

      ${fields.has("image") && fields.has("end_image")
        ? html`<${End} word=${{ ...bind("prompt"), label: "From, in words", value: draft.prompt }}
              well=${{ ...well("image"), label: "From, a picture" }} />
            <${End} word=${{ ...bind("end_prompt"), value: draft.end_prompt ?? "" }} well=${well("end_image")} />`
        : html`${fields.has("image") && html`<${PictureWell} ...${well("image")}>
              ${fields.has("mask") && pictures.image && html`<${MaskEditor} picture=${pictures.image}
                error=${errors.mask} onMask=${(mask) => onPicture("mask", mask)} />`}
            </${PictureWell}>
            ${fields.has("mask") && !pictures.image && errors.mask && html`
              <p class="error" id="f-mask">${errors.mask}</p>`}`}
            ${task === "variation" && html`
              <${Words} ...${bind("prompt")} label="From, in words" value=${draft.prompt} rows="2" />
              <${Words} ...${bind("end_prompt")} value=${draft.end_prompt ?? ""} rows="2"
                help="If set, the picture moves as this differs from the words above." />`}
            ${task !== "variation" && fields.has("prompt") && (model.classes.length
              ? html`<${Choice} ...${bind("prompt")} label="What to draw"
                value=${model.classes.includes(draft.prompt) ? draft.prompt : ""}
                placeholder="Choose one of ${model.classes.length}"
                options=${model.classes.map((name) => [name, name])} />`
              : html`<${Words} ...${bind("prompt")} value=${draft.prompt} rows="3"
                placeholder="a red apple on a blue background" />`)}`}
      ${fields.has("mix") && (fields.has("end_image") || draft.end_prompt) && html`
        <${Slider} ...${number("mix")} min="0" max="1" step="0.05" help="Where between the two: 0 is the first." />`}
      ${fields.has("strength") && html`<${Slider} ...${number("strength")} min="0.05" max="1" step="0.05"
        help="How far to leave the picture." />`}
      ${["control", "ip_adapter"].map((part) => fields.has(`${part}_image`) && html`
        <${PictureWell} ...${well(`${part}_image`)} />
        <${Slider} ...${number(`${part}_scale`)} min="0" max="2" step="0.05" />`)}
      ${fields.has("negative_prompt") && html`<${Words} ...${bind("negative_prompt")} value=${draft.negative_prompt}
        rows="1" placeholder="what to steer away from" />`}

      <details class="more" open=${opened}>
        <summary>Settings</summary>
        ${fields.has("width") && html`<${Size} model=${model} draft=${draft} errors=${errors} onDraft=${onDraft} />`}
        ${fields.has("num_inference_steps") && html`<${Slider} ...${number("num_inference_steps")} min="1"
          max=${model.limits.num_inference_steps} step="1" />`}
        ${fields.has("guidance_scale") && html`<${Slider} ...${number("guidance_scale")} min="0"
          max=${model.limits.guidance_scale} step="0.5" />`}
        <div class="pair">
          ${fields.has("scheduler") && html`<${Choice} ...${number("scheduler")}
            options=${model.schedulers.map((name) => [name, SCHEDULERS[name] ?? name])} />`}
          ${fields.has("n") && html`<${Numeric} ...${number("n")} min="1" max=${model.limits.n} />`}
        </div>
        <${Seed} ...${bind("seed")} value=${draft.seed} />
      </details>
      <details class="more">
        <summary>More</summary>
        ${fields.has("best_of") && html`<${Numeric} ...${number("best_of")} min="1" max=${model.limits.best_of}
          help="Candidates for each picture, of which CLIP keeps one." />`}
        ${guides.map((name) => html`<${Slider} key=${name} field=${`guidance.${name}`} ...${GUIDES[name]} min="0"
          error=${errors[`guidance.${name}`]} value=${draft.guidance[name] ?? 0}
          onValue=${(value) => onDraft({ ...draft, guidance: { ...draft.guidance, [name]: value || null } })} />`)}
        ${fields.has("guidance.interval") && html`<${Interval} value=${draft.guidance.interval}
          error=${errors["guidance.interval"]}
          onValue=${(interval) => onDraft({ ...draft, guidance: { ...draft.guidance, interval } })} />`}
        ${model.loras.map((name) => html`<${Slider} key=${name} field=${`loras.${name}`} label=${`LoRA: ${name}`}
          min="-2" max="2" step="0.05" value=${draft.loras[name] ?? 0}
          onValue=${(value) => onDraft({ ...draft, loras: { ...draft.loras, [name]: value } })} />`)}
        ${fields.has("num_frames") && html`<div class="pair"><${Numeric} ...${number("num_frames")} min="1"
          max=${model.video.maximum} step=${model.video.multiple_of} />
          <${Numeric} ...${number("fps")} min="1" max="120" /></div>`}
        <${Choice} ...${number("output_format")} options=${formats.map((it) => [it, it.toUpperCase()])} />
        ${fields.has("prompt_weights") && html`<${Check} ...${bind("prompt_weights")} value=${draft.prompt_weights}
          label="Brackets weigh words: (more:1.3), [less]" />`}
        <${Check} ...${bind("reproducible")} value=${draft.reproducible}
          label="Reproducible: same seed, same bytes, in any company" />
      </details>
    </div>
    <div class="submit">
      <button class="primary" disabled=${busy} aria-keyshortcuts="Control+Enter Meta+Enter">
        ${busy ? "Sending…" : "Draw"}</button>
      <span class="hint" aria-hidden="true"><kbd>Ctrl</kbd> <kbd>Enter</kbd></span>
    </div>
  </form>`;
}

function ModelPicker({ models, model, error, onValue }) {
  return html`<div class="field">
    <label class="label" for="f-model">Model</label>
    <div class="select"><select id="f-model" value=${model.name} onChange=${(event) => onValue(event.target.value)}
      aria-describedby="about-model">
      ${models.map(({ name, title }) => html`<option key=${name} value=${name} selected=${name === model.name}>
        ${title} · ${name}</option>`)}
    </select></div>
    <p class="help" id="about-model">${model.description} <a href=${model.licence_url} target="_blank"
      rel="noreferrer">${model.licence}</a></p>
    ${error && html`<p class="error">${error}</p>`}
  </div>`;
}

function Tasks({ tasks, task, error, onValue }) {
  return html`<fieldset class="field tasks" id="f-task"><legend class="unseen">Task</legend>
    ${tasks.map((name) => html`<label key=${name} class=${name === task ? "on" : ""}>
      <input type="radio" name="task" value=${name} checked=${name === task}
      onChange=${() => onValue(name)} /><span>${TASKS[name].label}</span></label>`)}
    ${error && html`<p class="error">${error}</p>`}
  </fieldset>`;
}

/** One end of an interpolation: words or a picture. */
function End({ word, well }) {
  return html`<div class="end">
    ${!well.picture && html`<${Words} ...${word} rows="2" />`}
    <${PictureWell} ...${well} />
  </div>`;
}

function Field({ field, label, error, help, aside, children }) {
  const id = idOf(field);
  const told = [error && `${id}-error`, help && `${id}-help`].filter(Boolean).join(" ") || null;
  return html`<div class="field ${error ? "wrong" : ""}">
    <div class="label-row"><label class="label" for=${id}>${label}</label>${aside}</div>
    ${children({ id, "aria-invalid": error ? "true" : null, "aria-describedby": told })}
    ${help && html`<p class="help" id="${id}-help">${help}</p>`}
    ${error && html`<p class="error" id="${id}-error">${error}</p>`}
  </div>`;
}

function Words({ value, onValue, rows, placeholder, ...field }) {
  return html`<${Field} ...${field}>${(control) => html`<textarea ...${control} rows=${rows}
    placeholder=${placeholder} spellcheck="true" value=${value}
    onInput=${(event) => onValue(event.target.value)}></textarea>`}</${Field}>`;
}

function Choice({ value, onValue, options, placeholder, ...field }) {
  return html`<${Field} ...${field}>${(control) => html`<div class="select"><select ...${control}
    onChange=${(event) => onValue(event.target.value)}>
    ${placeholder && html`<option value="" selected=${!value}>${placeholder}</option>`}
    ${options.map(([name, shown]) => html`<option key=${name} value=${name} selected=${name === value}>${shown}
      </option>`)}
  </select></div>`}</${Field}>`;
}

function Check({ field, label, error, value, onValue }) {
  return html`<div class="field"><label class="check"><input type="checkbox" id=${idOf(field)} checked=${!!value}
    onChange=${(event) => onValue(event.target.checked)} /><span>${label}</span></label>
    ${error && html`<p class="error">${error}</p>`}</div>`;
}

const numberIn = (text) => (text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text));

/** It shows what is typed until it is left: the page is drawn again in the middle, as at each step of a picture. */
function NumberBox({ value, onValue, ...control }) {
  const [typed, setTyped] = useState(null);
  const read = ({ target }) => {
    setTyped(target.value);
    onValue(numberIn(target.value));
  };
  return html`<input ...${control} type="number" value=${typed ?? value ?? ""} onInput=${read}
    onBlur=${() => setTyped(null)} />`;
}

function Numeric({ value, onValue, min, max, step = 1, ...field }) {
  return html`<${Field} ...${field}>${(control) => html`<${NumberBox} ...${control} inputmode="numeric"
    min=${min} max=${max} step=${step} value=${value} onValue=${onValue} />`}</${Field}>`;
}

/** A slider for hands and a number for those who know which. */
function Slider({ value, onValue, min, max, step, ...field }) {
  const exact = html`<${NumberBox} class="exact" inputmode="decimal" aria-label="${field.label}, exactly"
    min=${min} max=${max} step=${step} value=${value} onValue=${onValue} />`;
  const filled = `${((value - min) / (max - min)) * 100}%`;
  return html`<${Field} ...${field} aside=${exact}>${(control) => html`<input ...${control} type="range" min=${min}
    max=${max} step=${step} value=${value}
    style=${{ "--filled": filled }} onInput=${(event) => onValue(Number(event.target.value))} />`}</${Field}>`;
}

function Size({ model, draft, errors, onDraft }) {
  const { size } = model;
  const fit = (pixels) => {
    const whole = Math.round(pixels / size.multiple_of) * size.multiple_of;
    return Math.min(size.maximum, Math.max(size.minimum, whole));
  };
  const shaped = (across, down) => {
    const scale = Math.sqrt((size.width * size.height) / (across * down));
    return { width: fit(across * scale), height: fit(down * scale) };
  };
  const now = { width: draft.width ?? size.width, height: draft.height ?? size.height };
  const side = (field) => html`<${NumberBox} id=${idOf(field)} aria-label=${labelOf(field)} min=${size.minimum}
    max=${size.maximum} step=${size.multiple_of}
    value=${now[field]} aria-invalid=${errors[field] ? "true" : null}
      aria-describedby=${errors[field] ? `${idOf(field)}-error` : null}
    onValue=${(pixels) => onDraft({ ...draft, [field]: pixels })} />`;
  return html`<fieldset class="field size"><legend class="unseen">Size</legend>
    <div class="label-row"><span class="label" aria-hidden="true">Size</span>
      <div class="sides">${side("width")}<span aria-hidden="true">×</span>${side("height")}</div></div>
    <div class="shapes">${SHAPES.map(([name, across, down]) => {
      const shape = shaped(across, down);
      const on = shape.width === now.width && shape.height === now.height;
      return html`<button key=${name} type="button" class="shape ${on ? "on" : ""}"
        aria-pressed=${on ? "true" : "false"} onClick=${() => onDraft({ ...draft, ...shape })}>
        <i class=${name.toLowerCase()}></i>${name}</button>`;
    })}</div>
    ${["width", "height"].map((side) => errors[side] && html`<p class="error" id="f-${side}-error">
      ${LABELS[side]}: ${errors[side]}</p>`)}
  </fieldset>`;
}

function Seed({ value, onValue, ...field }) {
  const locked = value !== null && value !== undefined;
  const lock = html`<button type="button" class="lock ${locked ? "on" : ""}" aria-pressed=${locked ? "true" : "false"}
    onClick=${() => onValue(locked ? null : Math.floor(Math.random() * 2 ** 32))}>
      <${Icon} name=${locked ? "lock" : "unlock"} />${locked ? "Locked" : "Random"}</button>`;
  return html`<${Field} ...${field} aside=${lock}>${(control) => html`<${NumberBox} ...${control}
    inputmode="numeric" min="0" value=${value} onValue=${onValue} placeholder="a new one each time" />`}</${Field}>`;
}

function Interval({ value, error, onValue }) {
  const [from, to] = value ?? [0, 1];
  const set = (a, b) => onValue(a === 0 && b === 1 ? null : [a, b]);
  return html`<fieldset class="field" id="f-guidance-interval"><legend class="label">Guided part of the steps</legend>
    <div class="sides">
      <${NumberBox} aria-label="From" min="0" max="1" step="0.05" value=${from}
        onValue=${(start) => set(start ?? 0, to)} />
      <span aria-hidden="true">to</span>
      <${NumberBox} aria-label="To" min="0" max="1" step="0.05" value=${to}
        onValue=${(end) => set(from, end ?? 1)} />
    </div>
    ${error && html`<p class="error">${error}</p>`}
  </fieldset>`;
}
