// Menus of buttons: opened by a click or an arrow key, walked by arrows, closed by Esc or by leaving them.

class Menu {
  /**
   * @param {HTMLElement} button opens it
   * @param {() => {label: string, detail?: string, pick: () => void}[]} items what it holds, asked for when it opens
   */
  constructor(button, items) {
    this.button = button;
    this.items = items;
    this.node = h("div", { class: "mnb-menu", role: "menu", id: freshId(), hidden: true });
    setProp(button, "aria-haspopup", "menu");
    setProp(button, "aria-expanded", "false");
    setProp(button, "aria-controls", this.node.id);
    setProp(this.node, "aria-label", button.getAttribute("aria-label"));
    this.anchor = h("span", { class: "mnb-anchor" });
    button.replaceWith(this.anchor);
    this.anchor.append(button, this.node);
    button.addEventListener("click", () => (this.node.hidden ? this.open() : this.close()));
    this.anchor.addEventListener("keydown", (event) => this.key(event));
    this.anchor.addEventListener("focusout", (event) => this.anchor.contains(event.relatedTarget) || this.close(false));
  }

  open() {
    const items = this.items();
    this.node.replaceChildren(...items.map((item) => this.entry(item)));
    this.node.hidden = false;
    setProp(this.button, "aria-expanded", "true");
    keepInside(this.node, this.button);
    if (items.length) this.node.firstChild.focus({ preventScroll: true });
  }

  entry(item) {
    const detail = item.detail && h("span", { class: "mnb-detail", text: item.detail });
    const entry = h(
      "button",
      { type: "button", role: "menuitem", class: "mnb-item", tabindex: "-1" },
      item.label,
      detail,
    );
    entry.addEventListener("click", () => (this.close(), item.pick()));
    return entry;
  }

  close(refocus = true) {
    if (this.node.hidden) return;
    this.node.hidden = true;
    setProp(this.button, "aria-expanded", "false");
    if (refocus) this.button.focus({ preventScroll: true });
  }

  key(event) {
    const items = [...this.node.children];
    const at = items.indexOf(event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
    if (this.node.hidden) {
      if (event.key !== "ArrowDown") return;
      this.open();
    } else if (event.key === "Escape") this.close();
    else if (to !== undefined && items.length) items[(to + items.length) % items.length].focus({ preventScroll: true });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** Shifts an open popup sideways so that it stays within the chat, where an output's edge would cut it. */
function keepInside(popup, anchor) {
  const root = anchor.closest(".mnb-chat").getBoundingClientRect();
  popup.style.transform = "";
  const box = popup.getBoundingClientRect();
  const shift = Math.max(root.left + 4 - box.left, 0) + Math.min(root.right - 4 - box.right, 0);
  if (shift) popup.style.transform = `translateX(${shift}px)`;
}

/** A list of choices under a text field that keeps the focus: the field's arrow keys walk it. */
class Choices {
  /** @param {HTMLElement} field @param {(choice: any) => void} pick @param {string} label */
  constructor(field, pick, label) {
    this.field = field;
    this.pick = pick;
    this.node = h("div", {
      class: "mnb-menu mnb-choices",
      role: "listbox",
      id: freshId(),
      "aria-label": label,
      hidden: true,
    });
    setProp(field, "aria-controls", this.node.id);
    this.node.addEventListener("mousedown", (event) => event.preventDefault());
    this.node.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.pick(this.choices[[...this.node.children].indexOf(option)]);
    });
  }

  get isOpen() {
    return !this.node.hidden;
  }

  /** @param {{kind: string, name: string, detail: string}[]} choices */
  offer(choices) {
    this.choices = choices;
    this.node.replaceChildren(
      ...choices.map(({ name, detail }) =>
        h(
          "div",
          { role: "option", class: "mnb-item", id: freshId(), "aria-selected": "false" },
          name,
          detail && h("span", { class: "mnb-detail", text: detail }),
        ),
      ),
    );
    this.node.hidden = !choices.length;
    this.mark(0);
  }

  /** Leaves those that begin so, until an answer brings the names for what is typed now. */
  narrow(prefix) {
    const start = prefix.trim().toLowerCase();
    if (this.isOpen) this.offer(this.choices.filter(({ name }) => name.toLowerCase().startsWith(start)));
  }

  mark(at) {
    const options = [...this.node.children];
    this.at = options.length ? (at + options.length) % options.length : 0;
    options.forEach((option, index) => setProp(option, "aria-selected", String(index === this.at)));
    const marked = this.isOpen ? options[this.at] : null;
    setProp(this.field, "aria-activedescendant", marked ? marked.id : null);
    if (!marked) return;
    const { offsetTop, offsetHeight } = marked;
    if (offsetTop < this.node.scrollTop) this.node.scrollTop = offsetTop;
    else if (offsetTop + offsetHeight > this.node.scrollTop + this.node.clientHeight)
      this.node.scrollTop = offsetTop + offsetHeight - this.node.clientHeight;
  }

  close() {
    this.node.hidden = true;
    setProp(this.field, "aria-activedescendant", null);
  }

  /** @returns {boolean} whether the key was one of the list's */
  key(event) {
    if (!this.isOpen) return false;
    if (event.key === "ArrowDown") this.mark(this.at + 1);
    else if (event.key === "ArrowUp") this.mark(this.at - 1);
    else if (event.key === "Enter" || event.key === "Tab") this.pick(this.choices[this.at]);
    else if (event.key === "Escape") this.close();
    else return false;
    event.preventDefault();
    return true;
  }
}
