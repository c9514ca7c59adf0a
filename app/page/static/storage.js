// What this browser remembers. Where storage is off, nothing, and the page works all the same.

export function recall(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(`darkroom.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`darkroom.${name}`);
    else localStorage.setItem(`darkroom.${name}`, JSON.stringify(value));
  } catch {
    // full or off
  }
}
