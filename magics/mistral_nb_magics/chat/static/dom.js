// Elements, icons, the clipboard and downloads: the little that every part needs.

/** Outlines on a 16 x 16 grid, drawn with the colour of the text. */
const ICONS = {
  send: "M8 13V3M3.5 7.5 8 3l4.5 4.5",
  stop: "M4.5 4.5h7v7h-7z",
  copy: "M5.5 5.5h7v8h-7zM10.5 5.5v-3h-7v8h2",
  check: "M3 8.5 6.5 12 13 4.5",
  edit: "M3 13l.6-2.8L10.8 3 13 5.2l-7.2 7.2zM9.3 4.5l2.2 2.2",
  redo: "M13 8a5 5 0 1 1-1.6-3.7M13 2v3h-3",
  trash: "M3 4.5h10M6.5 4.5V3h3v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5M6.8 7v3.8M9.2 7v3.8",
  left: "M9.5 4 5.5 8l4 4",
  right: "M6.5 4l4 4-4 4",
  down: "M8 3v10M3.5 8.5 8 13l4.5-4.5",
  clip: "M12.5 7.5 8 12a2.8 2.8 0 0 1-4-4l5-5a1.9 1.9 0 0 1 2.7 2.7l-5 5a.9.9 0 0 1-1.3-1.3L9.8 5",
  columns: "M2.5 3h11v10h-11zM8 3v10",
  system: "M3 3.5h10M3 6.5h10M3 9.5h6M3 12.5h4",
  preset: "M8 2.5l1.5 3.9 4 1.6-4 1.6L8 13.5 6.5 9.6l-4-1.6 4-1.6z",
  export: "M8 10V2.5M5 5.5l3-3 3 3M3 9.5v4h10v-4",
  clear: "M4.5 4.5l7 7M11.5 4.5l-7 7",
  undo: "M5.5 3 3 5.5 5.5 8M3 5.5h6.5a3.5 3.5 0 0 1 0 7H6",
  settings: "M2.5 4.5h6M11.5 4.5h2M2.5 11.5h2M7.5 11.5h6M10 3v3M6 10v3",
};

/**
 * An element. `props` are attributes; `text` sets the text, `class` the classes, false and null leave out.
 * @param {string} tag
 * @param {Record<string, any>} [props]
 * @param {...(Node|string|null|false)} children
 * @returns {any}
 */
function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) setProp(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== false && child !== undefined));
  return node;
}

/** @param {Element} node @param {string} name @param {any} value */
function setProp(node, name, value) {
  if (name === "text") setText(node, value);
  else if (value === false || value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : String(value));
}

/** Sets a text only when it differs, so that a selection in it and its layout stay. */
function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

/** @param {string} name one of ICONS */
function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon: `act` is what a click on it means, `label` its name and its tooltip. */
function iconButton(act, name, label, props) {
  const all = { type: "button", class: "mnb-icon", "data-act": act, "aria-label": label, title: label, ...props };
  return h("button", all, icon(name));
}

/** Swaps the icon and the name of a button made by `iconButton`. */
function relabel(button, name, label) {
  if (button.getAttribute("aria-label") === label) return;
  button.replaceChildren(icon(name));
  setProp(button, "aria-label", label);
  setProp(button, "title", label);
}

let lastId = 0;
/** An id that no other chat on the page has. */
function freshId() {
  lastId += 1;
  return `mnb-${Math.random().toString(36).slice(2, 10)}-${lastId}`;
}

/** @param {() => void} draw runs once before the next frame, however often it was asked for */
function onNextFrame(draw) {
  let asked = 0;
  const ask = () => {
    if (!asked) asked = requestAnimationFrame(() => ((asked = 0), draw()));
  };
  return { ask, drop: () => cancelAnimationFrame(asked) };
}

/** Copies the text that `promise` brings; resolves to whether it worked. Call it while handling a click or a key. */
async function copyText(promise) {
  const clipboard = navigator.clipboard;
  try {
    if (clipboard && clipboard.write && window.ClipboardItem) {
      const blob = promise.then((text) => new Blob([text], { type: "text/plain" }));
      await clipboard.write([new ClipboardItem({ "text/plain": blob })]);
      return true;
    }
  } catch (_) {
    // An older browser wants a text and not a promise of one; a page without permission wants the way below.
  }
  try {
    const text = await promise;
    return copySelected(text) || (clipboard ? (await clipboard.writeText(text), true) : false);
  } catch (_) {
    return false;
  }
}

/** The way that works on a page without https, where there is no navigator.clipboard. */
function copySelected(text) {
  const focused = document.activeElement;
  const area = h("textarea", { style: "position:fixed;opacity:0;top:0", readonly: true, "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (focused) focused.focus({ preventScroll: true });
  return copied;
}

/** Offers a text as a file. */
function download(name, mime, text) {
  const url = URL.createObjectURL(new Blob([text], { type: mime }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
