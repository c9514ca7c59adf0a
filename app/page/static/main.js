// The page: what is typed, what is looked at, and how the two meet.

import { html, render, useCallback, useEffect, useReducer, useRef, useState } from "./vendor/preact-htm.js";
import { Problem, apiKey, blobOf, hasEnded, json, newKey, setApiKey } from "./api.js";
import { Bar, KeyBox } from "./bar.js";
import { pictureIn, readPicture } from "./canvas.js";
import { Differences } from "./compare.js";
import { Form, idOf, labelOf } from "./form.js";
import { Gallery } from "./gallery.js";
import { History } from "./history.js";
import { Icon } from "./icons.js";
import { EMPTY, TASKS, draftOf, requestOf, taskOf } from "./request.js";
import { Stage, standing } from "./stage.js";
import { recall, remember } from "./storage.js";

const EXAMPLES = [
  "a red apple on a blue background",
  "a small rocket in the top left corner on a dark blue background, twemoji style",
  "a lemon next to a strawberry",
  "a penguin, fluent 3d style",
  "an owl on a yellow background, noto style",
];

const history = new History();

function App() {
  const [, redraw] = useReducer((count) => count + 1, 0);
  const [models, setModels] = useState(null);
  const [draft, setDraft] = useState(() => ({ ...EMPTY, ...recall("draft", {}) }));
  const [pictures, setPictures] = useState({});
  const [problem, setProblem] = useState(null); // of what was asked for last; `attempt`: what to ask again
  const [sending, setSending] = useState(false);
  const [selected, setSelected] = useState(fromAddress);
  const [pinned, setPinned] = useState(null);
  const [asksKey, setAsksKey] = useState(false);

  useEffect(() => history.watch(redraw), []);
  useEffect(() => remember("draft", draft), [draft]);
  useEffect(() => {
    const go = () => setSelected(fromAddress());
    addEventListener("hashchange", go);
    return () => removeEventListener("hashchange", go);
  }, []);

  const loadModels = useCallback(async () => {
    try {
      setModels((await json("/v1/models")).data);
      setProblem(null);
    } catch (failure) {
      setProblem(failure);
      if (failure.status === 401) setAsksKey(true);
      else setTimeout(loadModels, 3000);
    }
  }, []);
  useEffect(() => void loadModels(), []);
  const refused = history.problem?.status === 401;
  useEffect(() => void (refused && setAsksKey(true)), [refused]);

  const model = models && (models.find(({ name }) => name === draft.model) ?? models[0]);
  const errors = Object.fromEntries((problem?.errors ?? []).map(({ field, detail }) => [field, detail]));

  const select = useCallback((place) => {
    setSelected(place);
    window.history.replaceState(null, "", place ? `#${place.id}/${place.index}` : location.pathname);
  }, []);

  const change = (next) => {
    setDraft(next);
    if (problem?.errors.length) setProblem(null);
  };
  const put = useCallback((field, picture) => {
    setPictures((before) => ({ ...before, [field]: picture, ...(field === "image" && { mask: null }) }));
  }, []);

  /** Asking the same again is the same request: its key says so. */
  const submit = async (again = null) => {
    if (sending || !model) return;
    const attempt = again ?? { body: requestOf(model, draft, pictures), key: newKey() };
    setSending(true);
    try {
      const generation = await history.submit(attempt.body, attempt.key);
      setProblem(null);
      select({ id: generation.id, index: 0 });
      if (matchMedia("(max-width: 860px)").matches) document.getElementById("stage").scrollIntoView({ block: "start" });
    } catch (failure) {
      setProblem(Object.assign(failure, { attempt: failure.passes ? attempt : null }));
      if (failure.status === 401) setAsksKey(true);
      const first = failure.errors.map(({ field }) => document.getElementById(idOf(field))).find(Boolean);
      requestAnimationFrame(() => first?.focus());
    } finally {
      setSending(false);
    }
  };

  /** A picture that somebody brings; where no task that is chosen wants one, one that does is. */
  const take = async (file, field = null) => {
    if (!model) return undefined;
    const wanted = field ? null : taskThatTakes(model, draft);
    if (!field && !wanted) return setProblem({ detail: `${model.title} starts from words only.`, errors: [] });
    const shape = { width: draft.width ?? model.size.width, height: draft.height ?? model.size.height };
    try {
      const picture = await readPicture(file, shape);
      if (wanted && wanted !== taskOf(model, draft)) change({ ...draft, task: wanted });
      put(field ?? (pictures.image && wanted === "interpolate" ? "end_image" : "image"), picture);
    } catch {
      const error = { field: field ?? "image", detail: "not a picture that this browser can read" };
      setProblem({ detail: error.detail, errors: [error] });
    }
    return undefined;
  };
  const taken = useRef(take);
  taken.current = take;
  useEffect(() => {
    const paste = (event) => {
      const file = pictureIn(event.clipboardData);
      if (file) taken.current(file);
    };
    const drop = (event) => {
      event.preventDefault();
      const file = pictureIn(event.dataTransfer);
      if (file) taken.current(file);
    };
    const over = (event) => event.preventDefault();
    addEventListener("paste", paste);
    addEventListener("dragover", over);
    addEventListener("drop", drop);
  }, []);

  const newest = history.newest;
  const shown = (selected && history.items.get(selected.id)) ?? (selected ? null : newest[0]);
  const index = selected && shown ? Math.min(selected.index, Math.max(0, shown.images.length - 1)) : 0;
  useEffect(() => {
    if (!selected || !history.loaded || history.items.has(selected.id)) return;
    history.fetch(selected.id).catch(() => select(null)); // an older one, by its link; or one that has gone
  }, [selected, history.loaded]);
  const held = pinned && history.items.get(pinned.id);

  const reuse = (generation, at) => {
    change(draftOf(generation, at));
    document.getElementById("f-prompt")?.focus();
  };
  const start = async (generation, at, which, task) => {
    let picture;
    try {
      picture = await readPicture(await blobOf(generation.images[at].url), which.size);
    } catch (failure) {
      const unread = { detail: "This browser cannot read that picture.", errors: [] };
      return setProblem(failure instanceof Problem ? failure : unread);
    }
    const { prompt, negative_prompt, prompt_weights } = draftOf(generation, at);
    change({ ...EMPTY, prompt, negative_prompt, prompt_weights, model: which.name, task });
    return setPictures({ image: picture });
  };
  const variation = models?.find(({ tasks }) => tasks.includes("variation"));
  const [editor, edit] = ["inpaint", "image-to-image"]
    .map((task) => [model && [model, ...models].find(({ tasks }) => tasks.includes(task)), task])
    .find(([found]) => found) ?? [];

  const stageOf = (generation, at, side) => html`<${Stage} key=${side} generation=${generation}
    live=${history.live.get(generation.id)} index=${at}
    model=${models?.find(({ name }) => name === generation.model)}
    onIndex=${(i) => (side === "held" ? setPinned({ ...pinned, index: i }) : select({ id: generation.id, index: i }))}
    onCancel=${() => history.cancel(generation.id).catch(setProblem)}
    actions=${{
      pinned: side === "held",
      onReuse: () => reuse(generation, at),
      onUse: editor && !isVideo(generation) && (() => start(generation, at, editor, edit)),
      onVary: variation && !isVideo(generation) && (() => start(generation, at, variation, "variation")),
      onPin: () => setPinned(side === "held" ? null : { id: generation.id, index: at }),
    }} />`;

  return html`
    <${Bar} here="/" onKey=${() => setAsksKey(true)} />
    <${Announcer} generation=${shown} live=${shown && history.live.get(shown.id)} problem=${problem} />
    <main class="room">
      <div class="bench">
        ${problem && html`<${Trouble} problem=${problem} onRetry=${() => submit(problem.attempt)}
          onClose=${() => setProblem(null)} onKey=${() => setAsksKey(true)} />`}
        ${model
          ? html`<${Form} models=${models} model=${model} draft=${draft} pictures=${pictures} errors=${errors}
            busy=${sending}
              onDraft=${change} onPicture=${put} onFile=${take} onSubmit=${() => submit()} />`
          : html`<div class="form loading" aria-hidden="true"></div>`}
      </div>
      <div class="wall">
        <h1 class="unseen">Darkroom playground</h1>
        ${history.problem && history.problem.status !== 401 && html`<p class="away"
          role="status">The service does not answer. What was accepted is kept; this page goes on when it is back.</p>`}
        <div id="stage" class="stage ${held ? "two" : ""}">
          ${held && stageOf(held, pinned.index, "held")}
          ${shown && (!held || shown.id !== held.id || index !== pinned.index)
            ? stageOf(shown, index, "shown")
            : held
              ? html`<div class="print empty-side"><p>Choose another picture in the gallery, or</p>
                  <button type="button" onClick=${() => reuse(held, pinned.index)}>change one of its settings</button>
                    </div>`
              : html`<${Empty} loaded=${history.loaded} model=${model}
                onExample=${(prompt) => (change({ ...draft, prompt }), document.getElementById("f-prompt")?.focus())} />`}
        </div>
        ${held && shown && (shown.id !== held.id || index !== pinned.index) && html`<${Differences}
          left=${{ generation: held, index: pinned.index }} right=${{ generation: shown, index }} />`}
        <${Gallery} history=${history} selected=${shown && { id: shown.id, index }} pinned=${held && pinned}
          onSelect=${(place) => {
          select(place);
          document.getElementById("stage").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
        }} />
      </div>
    </main>
    ${asksKey && html`<${KeyBox} wrong=${problem?.status === 401 && apiKey() ? problem.detail : null}
      onClose=${() => setAsksKey(false)} onKey=${(key) => {
      setApiKey(key);
      setProblem(null);
      history.forget();
      loadModels();
    }} />`}`;
}

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const isVideo = (generation) => generation.images.some(({ frames }) => frames > 1);

function fromAddress() {
  const [, id, index] = location.hash.match(/^#([0-9a-f]{32})(?:\/(\d+))?$/) ?? [];
  return id ? { id, index: Number(index ?? 0) } : null;
}

function taskThatTakes(model, draft) {
  const takes = (task) => [...TASKS[task].needs, ...TASKS[task].may].includes("image");
  const now = taskOf(model, draft);
  return takes(now) ? now : model.tasks.find(takes);
}

/** For screen readers: where the picture stands, but not every step of it. */
function Announcer({ generation, live, problem }) {
  const [text, setText] = useState("");
  const followed = useRef(null);
  const step = live?.step ?? 0;
  const quarter = live?.steps ? Math.floor((4 * step) / live.steps) : 0;
  useEffect(() => {
    if (!generation) return;
    const wasFollowed = followed.current === generation.id;
    if (!hasEnded(generation)) followed.current = generation.id;
    if (wasFollowed || !hasEnded(generation)) setText(standing(generation, live));
  }, [generation?.id, generation?.status, generation?.position, quarter]);
  return html`<p class="unseen" role="status" aria-live="polite">${problem ? "" : text}</p>`;
}

/** What went wrong; what passes by itself is counted down, and asked again. */
function Trouble({ problem, onRetry, onClose, onKey }) {
  const [left, setLeft] = useState(null);
  const retry = useRef(onRetry);
  retry.current = onRetry;
  useEffect(() => {
    if (!problem.attempt) return setLeft(null);
    const at = performance.now() + 1000 * Math.max(1, problem.retryAfter);
    const tick = () => {
      const seconds = Math.ceil((at - performance.now()) / 1000);
      setLeft(Math.max(0, seconds));
      if (seconds <= 0) {
        clearInterval(timer);
        retry.current();
      }
    };
    const timer = setInterval(tick, 250);
    tick();
    return () => clearInterval(timer);
  }, [problem]);
  const go = (event, field) => {
    event.preventDefault();
    document.getElementById(idOf(field))?.focus();
  };
  return html`<div class="trouble" role="alert">
    <div>
      <strong>${titleOf(problem)}</strong>
      ${problem.errors.length
        ? html`<ul>${problem.errors.map(({ field, detail }) => html`<li key=${field}>
          <a href="#${idOf(field)}" onClick=${(event) => go(event, field)}>${labelOf(field)}</a>: ${detail}</li>`)}
          </ul>`
        : html`<p>${problem.detail}</p>`}
      ${left !== null && html`<p class="countdown" aria-live="off">Trying again in ${left} s. <button type="button"
        class="link" onClick=${onRetry}>Now</button></p>`}
      ${problem.status === 401 && html`<p><button type="button" class="link" onClick=${onKey}>Enter a key</button></p>`}
    </div>
    <button type="button" class="bare" aria-label="Dismiss" onClick=${onClose}><${Icon} name="close" /></button>
  </div>`;
}

const TITLES = {
  0: "No answer",
  401: "This service wants an API key",
  413: "That is too large",
  429: "Too many at once",
  503: "Not just now",
};

function titleOf({ status, errors }) {
  if (errors.length) return errors.length > 1 ? `${errors.length} things to put right` : "One thing to put right";
  return TITLES[status] ?? "That did not work";
}

function Empty({ loaded, model, onExample }) {
  if (!loaded) return html`<div class="empty" aria-hidden="true"></div>`;
  const prompts = model?.classes.length ? [] : EXAMPLES;
  return html`<div class="empty">
    <div class="tray" aria-hidden="true"><i></i><i></i><i></i></div>
    <h2>Nothing developed yet</h2>
    <p>Say what to draw, and watch it come up.</p>
    <ul class="examples">${prompts.map((prompt) => html`<li key=${prompt}><button type="button"
      onClick=${() => onExample(prompt)}>${prompt}</button></li>`)}</ul>
  </div>`;
}

render(html`<${App} />`, document.getElementById("app"));
