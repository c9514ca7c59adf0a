// Before the first paint, or a page in the other theme would flash.
try {
  const theme = JSON.parse(localStorage.getItem("darkroom.theme"));
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage is off: the system's theme it is
}
