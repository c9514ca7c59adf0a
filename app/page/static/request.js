// What a model can be asked, what a draft asks of it, and back from what was asked to a draft.

/** What each task needs and what it may have besides: `TAKES` of app/schemas.py, with words for people. */
export const TASKS = {
  "text-to-image": { label: "From words", needs: ["prompt"], may: [] },
  "image-to-image": { label: "From a picture", needs: ["prompt", "image"], may: ["strength"] },
  inpaint: { label: "Repaint", needs: ["prompt", "image", "mask"], may: ["strength"] },
  variation: { label: "Variation", needs: ["image"], may: ["prompt", "end_prompt", "mix"] },
  interpolate: { label: "In between", needs: [], may: ["prompt", "image", "end_prompt", "end_image", "mix"] },
  upscale: { label: "Enlarge", needs: ["image"], may: ["prompt"] },
  "text-to-video": { label: "Film from words", needs: ["prompt"], may: [] },
  "image-to-video": { label: "Film from a picture", needs: ["prompt", "image"], may: [] },
};

export const PICTURES = ["image", "mask", "end_image", "control_image", "ip_adapter_image"];
const UNSET = {
  negative_prompt: "",
  prompt_weights: false,
  n: 1,
  best_of: 1,
  reproducible: false,
  priority: "normal",
};
const NOT_OF_THE_PICTURE = ["preview_every", "webhook"];
const BY_WHAT_IS_GIVEN = ["text-to-image", "image-to-image", "inpaint", "text-to-video", "image-to-video"];

export const EMPTY = { prompt: "", negative_prompt: "", n: 1, seed: null, guidance: {}, loras: {} };

export const taskOf = (model, draft) => (model.tasks.includes(draft.task) ? draft.task : model.tasks[0]);

/** The fields of a request that mean something to this model and task: the form shows these and no others. */
export function fieldsOf(model, task) {
  const { needs, may } = TASKS[task];
  const { size, limits } = model;
  const guided = limits.guidance_scale > 1;
  const told = !model.classes.length && [...needs, ...may].includes("prompt");
  const samples = model.schedulers.length > 1; // what writes codes, one a step, has no choice of either
  return new Set([
    ...needs,
    ...may,
    ...model.needs,
    ...(model.needs.includes("control_image") ? ["control_scale"] : []),
    ...(model.needs.includes("ip_adapter_image") ? ["ip_adapter_scale"] : []),
    ...(guided && told ? ["negative_prompt"] : []),
    ...(told && model.prompt_weights ? ["prompt_weights"] : []),
    ...(size.minimum < size.maximum ? ["width", "height"] : []),
    ...(samples || limits.num_inference_steps > model.defaults.num_inference_steps ? ["num_inference_steps"] : []),
    ...(guided ? ["guidance_scale"] : []),
    ...(samples ? ["scheduler"] : []),
    ...(limits.n > 1 ? ["n"] : []),
    ...(limits.best_of > 1 ? ["best_of"] : []),
    ...(model.loras.length ? ["loras"] : []),
    ...(model.video ? ["num_frames", "fps"] : []),
    ...model.guidance.filter((name) => name !== "classifier_free").map((name) => `guidance.${name}`),
    "seed",
    "output_format",
    "reproducible",
  ]);
}

/** What a field is if the draft leaves it open. */
export function defaultOf(model, task, field) {
  const { defaults, size, video } = model;
  const known = {
    width: size.width,
    height: size.height,
    num_inference_steps: defaults.num_inference_steps,
    guidance_scale: defaults.guidance_scale,
    scheduler: defaults.scheduler,
    strength: task === "inpaint" ? 1 : defaults.strength,
    mix: 0.5,
    control_scale: 1,
    ip_adapter_scale: 1,
    num_frames: video?.num_frames,
    fps: video?.fps,
    output_format: video ? "mp4" : "png",
  };
  return known[field] ?? UNSET[field] ?? null;
}

/** The draft for another model: what that one cannot do falls back to its defaults. */
export function movedTo(model, draft) {
  const { size, limits, schedulers } = model;
  const fits = {
    width: (pixels) => pixels >= size.minimum && pixels <= size.maximum && pixels % size.multiple_of === 0,
    height: (pixels) => fits.width(pixels),
    num_inference_steps: (steps) => steps <= limits.num_inference_steps,
    guidance_scale: (scale) => scale <= limits.guidance_scale,
    scheduler: (name) => schedulers.includes(name),
    n: (count) => count <= limits.n,
    best_of: (count) => count <= limits.best_of,
    output_format: (format) => (format === "mp4") === Boolean(model.video),
  };
  const kept = Object.entries(draft).filter(([field, value]) => value === null || (fits[field]?.(value) ?? true));
  return { ...Object.fromEntries(kept), model: model.name };
}

/** The body of `POST /v1/generations`. */
export function requestOf(model, draft, pictures) {
  const task = taskOf(model, draft);
  const fields = fieldsOf(model, task);
  const body = { model: model.name, task };
  for (const field of fields) {
    if (field.startsWith("guidance.")) {
      const name = field.slice("guidance.".length);
      if (draft.guidance[name]) body.guidance = { ...body.guidance, [name]: draft.guidance[name] };
    } else if (PICTURES.includes(field)) {
      if (pictures[field]) body[field] = pictures[field].url;
    } else if (field === "loras") {
      const loras = Object.entries(draft.loras).filter(([name, scale]) => scale && model.loras.includes(name));
      if (loras.length) body.loras = loras.map(([name, scale]) => ({ name, scale }));
    } else if (field === "prompt" && model.classes.length && !model.classes.includes(draft.prompt)) {
      continue; // words that another model was told
    } else if (![null, undefined, "", defaultOf(model, task, field)].includes(draft[field])) {
      body[field] = draft[field];
    }
  }
  if (task === "interpolate") {
    if (body.image) delete body.prompt;
    if (body.end_image) delete body.end_prompt;
  }
  if (task === "variation" && !body.end_prompt) {
    delete body.mix;
    if (!body.best_of) delete body.prompt; // it says nothing alone, but to CLIP
  }
  const steps = draft.num_inference_steps ?? model.defaults.num_inference_steps;
  return { ...body, preview_every: Math.max(1, Math.round(steps / 12)) };
}

/** The least that asks for the same again; of pictures, which fields had them. */
export function repeated(parameters, model) {
  const task = parameters.task;
  const body = {};
  for (const [field, value] of Object.entries(parameters)) {
    const open = ["model", "prompt", "seed"].includes(field) ? null : model && defaultOf(model, task, field);
    if ([...PICTURES, ...NOT_OF_THE_PICTURE].includes(field)) continue;
    if ([null, "", open, UNSET[field]].includes(value)) continue;
    if (typeof value !== "object") body[field] = value;
    else if (Array.isArray(value) ? value.length : Object.keys(pruned(value)).length) body[field] = pruned(value);
  }
  if (BY_WHAT_IS_GIVEN.includes(task)) delete body.task;
  return { body, pictures: PICTURES.filter((field) => parameters[field]) };
}

const pruned = (value) =>
  Array.isArray(value) ? value : Object.fromEntries(Object.entries(value).filter(([, inner]) => inner !== null));

/** The draft that a generation was drawn by; its seed stays, unless it is to be another picture of the same. */
export function draftOf(generation, index = 0) {
  const { parameters } = generation;
  const draft = { ...EMPTY, ...pruned(parameters), guidance: pruned(parameters.guidance ?? {}) };
  for (const field of [...PICTURES, ...NOT_OF_THE_PICTURE, "metadata", "expires_in", "priority"]) delete draft[field];
  draft.loras = Object.fromEntries((parameters.loras ?? []).map(({ name, scale }) => [name, scale]));
  draft.seed = generation.images[index]?.seed ?? parameters.seed;
  return draft;
}
