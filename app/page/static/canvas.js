// Pictures that people bring: dropped, pasted or chosen; and the mask that they paint on one.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { Icon } from "./icons.js";

const LONGEST = 1024; // pixels of a side: more than models look at, less than a body may hold

/** A file or blob as { url, width, height }: its middle, in the shape of the picture to be. */
export async function readPicture(file, shape) {
  const bitmap = await createImageBitmap(file);
  const ratio = shape.width / shape.height;
  const width = Math.min(bitmap.width, bitmap.height * ratio);
  const height = width / ratio;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  const left = (bitmap.width - width) / 2;
  const top = (bitmap.height - height) / 2;
  context.drawImage(bitmap, left, top, width, height, 0, 0, canvas.width, canvas.height);
  return { url: canvas.toDataURL("image/png"), width: canvas.width, height: canvas.height };
}

export const pictureIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

/** Where a picture is dropped or chosen. */
export function PictureWell({ id, label, picture, error, onFile, onRemove, children }) {
  const [over, setOver] = useState(false);
  const drop = (event) => {
    event.preventDefault();
    event.stopPropagation();
    setOver(false);
    const file = pictureIn(event.dataTransfer);
    if (file) onFile(file);
  };
  const leave = (event) => event.currentTarget.contains(event.relatedTarget) || setOver(false);
  const choose = html`<input
    id=${id} class="unseen" type="file" accept="image/*" aria-label=${label} aria-invalid=${error ? "true" : null}
    aria-describedby=${error ? `${id}-error` : null}
    onChange=${(event) => {
      if (event.target.files[0]) onFile(event.target.files[0]);
      event.target.value = "";
    }} />`;
  return html`<div class="field">
    <span class="label" aria-hidden="true">${label}</span>
    <div class="well ${over ? "over" : ""} ${picture ? "full" : ""}"
      onDragOver=${(event) => (event.preventDefault(), setOver(true))} onDragLeave=${leave} onDrop=${drop}>
      ${picture
        ? html`<div class="well-picture">
            ${children || html`<img src=${picture.url} alt="${label}: yours" />`}
            <div class="well-actions">
              <label class="quiet button">${choose} Another</label>
              <button type="button" class="quiet" onClick=${onRemove}>Remove</button>
            </div>
          </div>`
        : html`<label class="well-empty">${choose}<${Icon} name="picture" />
            <span><strong>Choose a picture</strong>, drop or paste one</span></label>`}
    </div>
    ${error && html`<p class="error" id="${id}-error">${error}</p>`}
  </div>`;
}

/** Paint over a picture: what is painted is drawn anew. White on black is what the service wants. */
export function MaskEditor({ picture, error, onMask }) {
  const canvas = useRef(null);
  const [strokes, setStrokes] = useState([]);
  const [size, setSize] = useState(24); // percent of the shorter side
  const [at, setAt] = useState(null); // the brush, for the keyboard
  const painting = useRef(null);
  const side = Math.min(picture.width, picture.height);
  const brush = (size / 100) * side;

  useEffect(() => setStrokes([]), [picture.url]);
  useEffect(() => {
    show(canvas.current, strokes, picture, at && { ...at, brush });
  }, [strokes, picture.url, at, brush]);
  useEffect(() => onMask(strokes.length ? maskOf(strokes, picture) : null), [strokes]);

  const place = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * picture.width,
      y: ((event.clientY - box.top) / box.height) * picture.height,
    };
  };
  const begin = (event) => {
    if (event.button) return;
    event.preventDefault();
    canvas.current.focus({ preventScroll: true });
    canvas.current.setPointerCapture(event.pointerId);
    painting.current = { brush, points: [place(event)] };
    setAt(null);
    show(canvas.current, [...strokes, painting.current], picture);
  };
  const go = (event) => {
    if (!painting.current) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) painting.current.points.push(place(one));
    show(canvas.current, [...strokes, painting.current], picture);
  };
  const end = () => {
    if (painting.current) setStrokes([...strokes, painting.current]);
    painting.current = null;
  };
  const undo = () => setStrokes(strokes.slice(0, -1));

  const press = (event) => {
    const here = at ?? { x: picture.width / 2, y: picture.height / 2 };
    const step = Math.max(1, brush / 3);
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (ways[event.key]) {
      const [x, y] = ways[event.key];
      const there = {
        x: Math.min(picture.width, Math.max(0, here.x + x * step)),
        y: Math.min(picture.height, Math.max(0, here.y + y * step)),
      };
      setAt(there);
      if (event.shiftKey) setStrokes([...strokes, { brush, points: [here, there] }]);
    } else if (event.key === " ") setStrokes([...strokes, { brush, points: [here] }]);
    else if (event.key === "Backspace" || (event.key === "z" && (event.ctrlKey || event.metaKey))) undo();
    else if (event.key === "[") setSize(Math.max(4, size - 4));
    else if (event.key === "]") setSize(Math.min(60, size + 4));
    else return;
    event.preventDefault();
  };

  return html`<div class="mask" aria-invalid=${error ? "true" : null}>
    <div class="mask-picture">
      <img src=${picture.url} alt="" draggable=${false} />
      <canvas ref=${canvas} id="f-mask" width=${picture.width} height=${picture.height} tabindex="0" role="application"
        aria-label="Mask: paint what is to be drawn anew"
          aria-describedby=${error ? "mask-help f-mask-error" : "mask-help"}
        onPointerDown=${begin} onPointerMove=${go} onPointerUp=${end} onPointerCancel=${end} onKeyDown=${press}
        onFocus=${() => painting.current || setAt({ x: picture.width / 2, y: picture.height / 2 })}
        onBlur=${() => setAt(null)}></canvas>
    </div>
    <div class="mask-tools">
      <label class="brush">Brush
        <input type="range" min="4" max="60" step="2" value=${size}
          onInput=${(event) => setSize(Number(event.target.value))} />
      </label>
      <button type="button" class="quiet" disabled=${!strokes.length} onClick=${undo}>Undo</button>
      <button type="button" class="quiet" disabled=${!strokes.length} onClick=${() => setStrokes([])}>Clear</button>
    </div>
    <p class="help" id="mask-help">Paint what is to be drawn anew. Keys: arrows move, space paints, shift and arrows
      paint a line, backspace undoes.</p>
    ${error && html`<p class="error" id="f-mask-error">${error}</p>`}
  </div>`;
}

function stroke(context, { brush, points }) {
  context.lineWidth = brush;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(points[0].x, points[0].y);
  for (const { x, y } of points) context.lineTo(x, y);
  context.lineTo(points.at(-1).x + 0.01, points.at(-1).y); // a dot is a line as well
  context.stroke();
}

function show(canvas, strokes, picture, cursor) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, picture.width, picture.height);
  context.strokeStyle = "#ff3b24";
  strokes.forEach((one) => stroke(context, one));
  if (!cursor) return;
  context.lineWidth = Math.max(1, picture.width / 128);
  for (const [colour, grow] of [["#fff", 0], ["#000", context.lineWidth]]) {
    context.strokeStyle = colour;
    context.beginPath();
    context.arc(cursor.x, cursor.y, cursor.brush / 2 + grow, 0, 2 * Math.PI);
    context.stroke();
  }
}

function maskOf(strokes, picture) {
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = "#fff";
  strokes.forEach((one) => stroke(context, one));
  return { url: canvas.toDataURL("image/png"), width: canvas.width, height: canvas.height };
}
