// A generation's picture on the page, however it may be fetched.

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { apiKey, blobOf, pause } from "./api.js";

/** Where an <img> finds this: with a key we fetch it, since an <img> cannot send one. The last one stays meanwhile. */
export function useSource(url) {
  const keyed = Boolean(apiKey());
  const [source, setSource] = useState(keyed ? null : url);
  useEffect(() => {
    if (!keyed || !url) {
      setSource(url);
      return undefined;
    }
    const left = new AbortController();
    const load = async () => {
      try {
        const blob = await blobOf(url);
        if (!left.signal.aborted) setSource(URL.createObjectURL(blob));
      } catch (failure) {
        if (left.signal.aborted) return;
        setSource(null);
        if (!failure.passes) return;
        await pause(1000 * Math.max(1, failure.retryAfter), left.signal);
        if (!left.signal.aborted) load();
      }
    };
    load();
    return () => left.abort();
  }, [url, keyed]);
  useEffect(() => () => source?.startsWith("blob:") && URL.revokeObjectURL(source), [source]);
  return source;
}

export function Picture({ url, alt, film = false, still = false, ...rest }) {
  const source = useSource(url);
  if (!source) return html`<span class="blank" role="img" aria-label=${alt}></span>`;
  if (film) return html`<video src=${source} aria-label=${alt} autoplay=${!still} loop muted playsinline
    controls=${!still} ...${rest}></video>`;
  return html`<img src=${source} alt=${alt} draggable=${false} ...${rest} />`;
}

export const isFilm = (generation, image) => image.frames > 1 && generation.parameters.output_format === "mp4";

const WORDLESS = { variation: "a variation", interpolate: "something in between", upscale: "an enlarged picture" };

export function altOf(generation, index) {
  const { parameters, images } = generation;
  const words = parameters.prompt || WORDLESS[parameters.task] || "a picture";
  return images.length > 1 ? `${words}, ${index + 1} of ${images.length}` : words;
}
