// What goes with a question by name: the menu of variables, cells and the last error, and `{{name}}` in the text.

const KINDS = { variable: "Variable", cell: "Cell", error: "Error" };
const OPEN_NAME = /\{\{\s*([^{}\n]{0,80})$/;

/** Asks for names; only the newest question's answer counts. */
class Names {
  /** @param {Wire} wire @param {string[]} kinds @param {(names: any[]) => void} got */
  constructor(wire, kinds, got) {
    this.wire = wire;
    this.kinds = kinds;
    this.got = got;
    this.asked = 0;
  }

  async ask(prefix) {
    const asked = (this.asked += 1);
    const answer = await this.wire.ask({ type: "names", prefix, kinds: this.kinds });
    if (asked === this.asked) this.got(answer.names || []);
  }

  drop() {
    this.asked += 1;
  }
}

/** The button and the popup that attach a thing by name. */
class Attacher {
  /** @param {Wire} wire @param {(thing: {kind: string, name: string}) => void} add */
  constructor(wire, add) {
    this.button = iconButton("attach", "clip", "Attach a variable, a cell or the last error", {
      "aria-haspopup": "dialog",
      "aria-expanded": "false",
    });
    this.field = h("input", {
      type: "text",
      class: "mnb-field",
      placeholder: "Name",
      role: "combobox",
      "aria-label": "Name of what to attach",
      "aria-autocomplete": "list",
      "aria-expanded": "true",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.choices = new Choices(
      this.field,
      (thing) => (this.close(), add({ kind: thing.kind, name: thing.name })),
      "What can be attached",
    );
    this.empty = h("div", { class: "mnb-detail", text: "Nothing by that name." });
    this.popup = h(
      "div",
      { class: "mnb-popup", role: "dialog", "aria-label": "Attach", hidden: true },
      this.field,
      this.choices.node,
      this.empty,
    );
    this.node = h("span", { class: "mnb-anchor mnb-up" }, this.button, this.popup);
    this.names = new Names(wire, Object.keys(KINDS), (names) => this.offer(names));
    this.field.addEventListener("input", () => this.typed());
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("focusout", (event) => this.node.contains(event.relatedTarget) || this.close(false));
  }

  typed() {
    this.choices.narrow(this.field.value);
    this.names.ask(this.field.value);
  }

  toggle() {
    if (!this.popup.hidden) return this.close();
    this.popup.hidden = false;
    setProp(this.button, "aria-expanded", "true");
    this.field.value = "";
    keepInside(this.popup, this.button);
    this.field.focus({ preventScroll: true });
    show(this.empty, "Looking…");
    this.names.ask("");
  }

  offer(names) {
    this.choices.offer(
      names.map((each) => ({ ...each, detail: [KINDS[each.kind], each.detail].filter(Boolean).join(" · ") })),
    );
    setProp(this.field, "aria-expanded", String(names.length > 0));
    show(this.empty, names.length ? "" : "Nothing by that name.");
  }

  close(refocus = true) {
    if (this.popup.hidden) return;
    this.popup.hidden = true;
    this.choices.close();
    this.names.drop();
    setProp(this.button, "aria-expanded", "false");
    if (refocus) this.button.focus({ preventScroll: true });
  }

  key(event) {
    if (this.popup.hidden || event.isComposing) return;
    if (event.key === "Escape") this.close();
    else if (event.key === "Tab" || !this.choices.key(event)) return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** Completes `{{name` in a text area. */
class Completer {
  /** @param {Wire} wire @param {HTMLTextAreaElement} area */
  constructor(wire, area) {
    this.area = area;
    setProp(area, "aria-autocomplete", "list");
    this.choices = new Choices(area, (choice) => this.insert(choice.name), "Variables");
    this.node = h("div", { class: "mnb-completions mnb-up" }, this.choices.node);
    this.names = new Names(wire, ["variable"], (names) => this.prefix() === null || this.choices.offer(names));
    area.addEventListener("blur", () => this.close());
  }

  /** What is typed of a name so far; null where the caret is in none. */
  prefix() {
    const { value, selectionStart, selectionEnd } = this.area;
    const found = selectionStart === selectionEnd && OPEN_NAME.exec(value.slice(0, selectionStart));
    return found ? found[1] : null;
  }

  look() {
    const prefix = this.prefix();
    if (prefix === null) this.close();
    else {
      this.choices.narrow(prefix);
      this.names.ask(prefix);
    }
  }

  insert(name) {
    const { value, selectionStart } = this.area;
    const start = selectionStart - this.prefix().length;
    const after = value.slice(selectionStart).replace(/^\}\}/, "");
    this.area.value = `${value.slice(0, start)}${name}}}${after}`;
    this.area.setSelectionRange(start + name.length + 2, start + name.length + 2);
    this.close();
  }

  close() {
    this.names.drop();
    this.choices.close();
  }
}
