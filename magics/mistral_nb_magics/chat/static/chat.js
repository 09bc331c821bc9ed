// One view of a chat: its parts put together, one listener for all clicks, and the module that anywidget loads.

const UNDONE = { clear: "The conversation was cleared.", delete: "The turn was deleted." };
const LINES = {
  waiting: "Waiting for the kernel…",
  gone: "Not connected: the kernel was restarted or does not run. Running this cell starts an empty chat",
};

class ChatPage {
  /** @param {Store} store @param {any} model @param {HTMLElement} el */
  constructor(store, model, el) {
    this.store = store;
    this.model = model;
    this.el = el;
    this.patches = new Map();
    this.stale = true;
    this.build();
    this.frame = onNextFrame(() => this.draw());
    this.ends = [
      store.listen((what, detail) => this.heard(what, detail)),
      this.listenToKeys(),
      this.watchSize(),
      this.frame.drop,
    ];
    store.pages.push(this);
    this.draw();
  }

  build() {
    this.header = new Header(this.store, (message) => this.act(message));
    this.transcript = new Transcript();
    this.composer = new Composer(
      this.store,
      (error) => this.complain(error),
      () => this.transcript.toEnd(),
    );
    this.hollow = h(
      "div",
      { class: "mnb-hollow" },
      h("p", { text: "Ask a question to begin." }),
      h("p", { class: "mnb-detail", text: "{{name}} puts the value of a variable into it." }),
    );
    this.undo = h(
      "div",
      { class: "mnb-strip", hidden: true },
      h("span"),
      h("button", { type: "button", class: "mnb-button", "data-act": "undo", text: "Undo" }),
    );
    this.line = h("div", { class: "mnb-strip mnb-line", role: "status", hidden: true });
    this.trouble = h("div", { class: "mnb-strip mnb-trouble", role: "alert", hidden: true });
    this.said = h("div", { class: "mnb-sr", "aria-live": "polite" });
    const middle = h("div", { class: "mnb-middle" }, this.transcript.node, this.hollow, this.transcript.jump);
    this.root = h(
      "section",
      {
        class: "mnb-chat",
        "aria-label": "Chat",
        "data-jp-suppress-context-menu": "",
      },
      this.header.node,
      middle,
      this.undo,
      this.line,
      this.trouble,
      this.composer.node,
      this.said,
    );
    this.root.addEventListener("click", (event) => this.clicked(event));
    this.el.classList.add("mnb-host");
    this.el.append(this.root);
  }

  heard(what, detail) {
    if (what === "file" || what === "cells") return this.receive(what, detail);
    if (what === "transcript")
      return void (this.store.pages[0] === this && writeTranscript(this.model, this.el, detail.data));
    if (what === "patch") {
      const known = this.patches.get(detail.turn) || new Set();
      detail.indices.forEach((index) => known.add(index));
      this.patches.set(detail.turn, known);
    } else if (what === "state") this.staleBars = true;
    else if (what === "status") this.patches.set(detail.turn, this.patches.get(detail.turn) || new Set());
    else this.stale = true;
    if (detail && detail.ended) this.announce(detail.turn);
    return this.frame.ask();
  }

  draw() {
    if (this.stale) this.keepFocus(() => this.transcript.update(this.store.state.turns));
    else for (const [turn, indices] of this.patches) this.transcript.patch(turn, indices);
    if (this.stale || this.staleBars) this.drawBars();
    this.stale = this.staleBars = false;
    this.patches.clear();
  }

  /** Where `change` takes away what has the focus, gives it to what stands there now, or to the composer. */
  keepFocus(change) {
    const focused = document.activeElement;
    const rows = this.transcript.list;
    const at = rows.contains(focused) ? [...rows.children].indexOf(focused.closest(".mnb-turn")) : -1;
    change();
    if (at < 0 || rows.contains(focused)) return;
    const { act, step } = focused.dataset;
    const same =
      act &&
      rows.children[at] &&
      rows.children[at].querySelector(`[data-act="${act}"]${step ? `[data-step="${step}"]` : ""}`);
    (same || this.composer.area).focus({ preventScroll: true });
  }

  drawBars() {
    const { state, wire } = this.store;
    this.header.refresh();
    this.composer.refresh();
    this.hollow.hidden = state.turns.length > 0;
    const undone = state.undo && (UNDONE[state.undo] || `Undo: ${state.undo}`);
    if (undone && this.undo.hidden) this.say(`${undone} Undo is beside the composer.`);
    show(this.undo.firstChild, undone);
    this.undo.hidden = !state.undo;
    const advice = state.turns.length ? ": export this one first." : ".";
    show(this.line, (LINES[wire.state] || "") + (wire.state === "gone" ? advice : ""));
    const box = this.el.parentElement;
    if (box && box.classList.contains("jupyter-widgets")) box.classList.toggle("mnb-cut", wire.state === "gone");
  }

  /** Sends what a button means; resolves to whether it was done. */
  async act(message) {
    const { store } = this;
    this.complain("");
    if (message.type === "export") {
      if (store.wire.state === "gone") return (exportHere(this, message.format), true);
      store.exporter = this;
    }
    const answer = await store.wire.ask(message);
    if (message.type === "export" && store.exporter === this) store.exporter = null;
    if (answer.type === "refused") this.complain(answer.error);
    return answer.type !== "refused";
  }

  complain(error) {
    show(this.trouble, error);
  }

  say(text) {
    this.said.textContent = text;
  }

  announce(turn) {
    const side = this.transcript.sideOf(turn.id);
    if (turn.error) return this.say(`The answer ended early: ${turn.error}`);
    if (side) side.answer.update(turn.blocks);
    const text = side ? side.answer.opening(500) : "";
    return this.say(`Answer: ${text.slice(0, 500)}${text.length > 500 ? "… The rest is in the conversation." : ""}`);
  }

  receive(what, message) {
    const { exporter, pages, wire } = this.store;
    if ((exporter || pages[0]) !== this || !wire.concerns(message)) return;
    if (what === "file") download(message.name, message.mime, message.text);
    else if (!insertCells(this.model, this.el, message.cells)) {
      download("chat.ipynb", "application/x-ipynb+json", notebookOf(message.cells));
      this.complain(
        "This front end lets no widget add cells: they came as the notebook chat.ipynb. Or use chat.to_cells().",
      );
    }
  }

  clicked(event) {
    const button = event.target.closest("[data-act]");
    if (!button || !this.root.contains(button) || button.getAttribute("aria-disabled") === "true") return;
    const act = ACTS[button.dataset.act];
    if (act) act(this, button);
  }

  listenToKeys() {
    const before = (event) => this.root.contains(event.target) && keepKey(event, this.root);
    window.addEventListener("keydown", before, true);
    this.root.addEventListener("keydown", (event) => this.key(event));
    for (const type of ["keyup", "keypress", "paste", "copy", "cut"])
      this.root.addEventListener(type, (event) => event.stopPropagation());
    return () => window.removeEventListener("keydown", before, true);
  }

  key(event) {
    if (!isForPage(event)) event.stopPropagation();
    if (event.defaultPrevented || event.isComposing) return;
    const row = event.target.closest(".mnb-turn");
    const toolbar = event.target.closest("[role=toolbar]");
    if (row && event.target.closest(".mnb-editor")) editorKey(this, row.row, event);
    else if (event.key === "Escape" && this.header.drawer.contains(event.target)) this.header.toggleSystem();
    else if (event.key === "Escape" && this.store.state.busy) this.act({ type: "stop" });
    else if (toolbar) toolbarKey(toolbar, event);
  }

  /** Follows the width, and what a notebook does that takes outputs off the page and puts them back. */
  watchSize() {
    let shown = false;
    let unhide = () => {};
    const watcher = new ResizeObserver(() => {
      const width = this.root.clientWidth;
      this.root.classList.toggle("mnb-narrow", width < 520);
      if (width && !shown) {
        unhide();
        unhide = hideTranscript(this.el);
        this.root.classList.toggle("mnb-paged", document.querySelector(".jp-Notebook, #notebook-container") !== null);
        this.transcript.node.scrollTop = this.transcript.top;
        fit(this.composer.area);
      }
      shown = width > 0;
      this.transcript.settle();
    });
    watcher.observe(this.root);
    watcher.observe(this.transcript.node);
    watcher.observe(this.transcript.list);
    return () => (watcher.disconnect(), unhide());
  }

  close() {
    this.store.pages.splice(this.store.pages.indexOf(this), 1);
    if (this.store.exporter === this) this.store.exporter = null;
    this.ends.forEach((end) => end());
    this.root.remove();
  }
}

/**
 * Has Lumino, whose shortcuts see a key before any element does, leave it to the chat. It looks from what has the focus
 * upwards for this attribute, and some of its selectors match just that element.
 */
function keepKey(event, root) {
  const name = "data-lm-suppress-shortcuts";
  if (!isForPage(event)) setProp(event.target, name, "true");
  else for (const node of root.querySelectorAll(`[${name}]`)) node.removeAttribute(name);
}

/** Whether a key is the page's own even in the chat: saving the notebook. */
function isForPage(event) {
  return (event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "s";
}

function editorKey(page, row, event) {
  if (event.key === "Escape") row.endEdit();
  else if (event.key === "Enter" && !event.shiftKey && event.target === row.editor.area) sendEdit(page, row);
  else return;
  event.preventDefault();
}

async function sendEdit(page, row) {
  const text = row.editor.area.value;
  if (text.trim() && (await page.act({ type: "edit", id: row.turns[0].id, text }))) row.endEdit();
}

/** Arrows walk along a toolbar, and up and down to the toolbars of other turns. */
function toolbarKey(toolbar, event) {
  const buttons = rove(toolbar);
  const at = buttons.indexOf(event.target);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (step) buttons[(at + step + buttons.length) % buttons.length].focus();
  else if (rows) {
    const all = [...toolbar.closest(".mnb-list").querySelectorAll("[role=toolbar]")].filter(
      (each) => !each.closest("[hidden]"),
    );
    const other = all[all.indexOf(toolbar) + rows];
    const target = other && rove(other).find((button) => button.tabIndex === 0);
    if (target) target.focus();
  } else return;
  rove(event.target.ownerDocument.activeElement.closest("[role=toolbar]"), event.target.ownerDocument.activeElement);
  event.preventDefault();
}

function notebookOf(cells) {
  return JSON.stringify({ cells, metadata: {}, nbformat: 4, nbformat_minor: 5 }, null, 1);
}

const rowOf = (button) => button.closest(".mnb-turn").row;
const idOf = (button) => button.closest(".mnb-side").dataset.id;

/** Says by the button itself that a text was copied. */
async function copied(page, button, promise) {
  const label = button.getAttribute("aria-label");
  const worked = await copyText(promise);
  if (!worked) return page.complain("The browser did not allow copying: select the text and copy it yourself.");
  relabel(button, "check", "Copied");
  page.say("Copied.");
  return setTimeout(() => relabel(button, "copy", label), 1500);
}

async function sourceOf(page, id) {
  const gone = page.store.wire.state === "gone";
  const answer = gone ? {} : await page.store.wire.ask({ type: "text", id });
  return typeof answer.text === "string" ? answer.text : page.transcript.sideOf(id).answer.text();
}

async function continueFrom(page, id) {
  if (!(await page.act({ type: "select", id }))) return;
  page.say("The next question follows this answer.");
  page.composer.area.focus({ preventScroll: true });
}

/** What the buttons mean. */
const ACTS = {
  send: (page) => page.composer.send().then(() => page.composer.area.focus({ preventScroll: true })),
  stop: (page) => page.act({ type: "stop" }),
  "stop-one": (page, button) => page.act({ type: "stop", id: idOf(button) }),
  attach: (page) => page.composer.attacher.toggle(),
  detach: (page, button) => page.composer.detach(Number(button.dataset.index)),
  compare: async (page) => {
    if (page.composer.toggleCompare()) return;
    if (page.store.state.panel || (await page.act({ type: "panel", open: true })))
      page.complain("Say in the settings whom to compare with.");
  },
  regenerate: (page, button) => page.act({ type: "regenerate", id: idOf(button) }),
  retry: (page, button) => page.act({ type: "retry", id: idOf(button) }),
  edit: (page, button) => rowOf(button).edit(),
  "edit-send": (page, button) => sendEdit(page, rowOf(button)),
  "edit-cancel": (page, button) => rowOf(button).endEdit(),
  delete: (page, button) => page.act({ type: "delete", id: rowOf(button).turns[0].id }),
  continue: (page, button) => continueFrom(page, idOf(button)),
  copy: (page, button) => copied(page, button, sourceOf(page, idOf(button))),
  "copy-code": (page, button) => copied(page, button, Promise.resolve(button.closest(".mnb-code").source())),
  branch: (page, button) => {
    const id = rowOf(button).side(idOf(button)).neighbour(Number(button.dataset.step));
    if (id) page.act({ type: "select", id });
  },
  clear: (page) => page.act({ type: "clear" }).then(() => page.composer.area.focus({ preventScroll: true })),
  undo: (page) => page.act({ type: "undo" }).then(() => page.composer.area.focus({ preventScroll: true })),
  system: (page) => page.header.toggleSystem(),
  "system-save": (page) => page.header.saveSystem(),
  "system-cancel": (page) => page.header.endSystem(),
  panel: (page) => page.act({ type: "panel", open: !page.store.state.panel }),
  jump: (page) => page.transcript.toEnd(),
};

/** anywidget calls this once for each model. */
export default () => {
  let store;
  return {
    initialize({ model }) {
      store = new Store(model);
      return () => store.close();
    },
    render({ model, el }) {
      const page = new ChatPage(store, model, el);
      return () => page.close();
    },
  };
};
