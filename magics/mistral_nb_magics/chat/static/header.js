// The bar above the conversation: who answers, presets, the system prompt, clear, export and settings.

const FORMATS = [
  { format: "md", label: "Markdown file" },
  { format: "json", label: "JSON file" },
  { format: "cells", label: "New cells below" },
];

class Header {
  /** @param {Store} store @param {(message: any) => void} act */
  constructor(store, act) {
    this.store = store;
    this.act = act;
    this.title = h("span", { class: "mnb-title" });
    this.who = h("span", { class: "mnb-who" });
    this.presets = iconButton("", "preset", "Presets");
    this.system = iconButton("system", "system", "System prompt", { "aria-expanded": "false" });
    this.clear = iconButton("clear", "trash", "Clear the conversation");
    this.exporting = iconButton("", "export", "Export");
    this.settings = iconButton("panel", "settings", "Settings", { "aria-expanded": "false" });
    const tools = h(
      "div",
      { class: "mnb-tools", role: "group", "aria-label": "Chat" },
      this.presets,
      this.system,
      this.clear,
      this.exporting,
      this.settings,
    );
    this.bar = h("div", { class: "mnb-bar" }, h("div", { class: "mnb-name" }, this.title, this.who), tools);
    this.drawer = this.makeDrawer();
    this.node = h("div", { class: "mnb-header" }, this.bar, this.drawer);
    new Menu(this.presets, () =>
      store.state.presets.map((name) => ({ label: name, pick: () => act({ type: "preset", name }) })),
    );
    new Menu(this.exporting, () =>
      FORMATS.filter(({ format }) => store.wire.state !== "gone" || KEPT.has(format)).map(({ format, label }) => ({
        label,
        pick: () => act({ type: "export", format }),
      })),
    );
    this.refresh();
  }

  makeDrawer() {
    this.area = h("textarea", {
      class: "mnb-area",
      rows: 2,
      dir: "auto",
      "aria-label": "System prompt",
      placeholder: "How to answer, for every question of this chat",
    });
    const save = h("button", {
      type: "button",
      class: "mnb-button mnb-primary",
      "data-act": "system-save",
      text: "Save",
    });
    const cancel = h("button", { type: "button", class: "mnb-button", "data-act": "system-cancel", text: "Cancel" });
    this.isDraft = false;
    this.area.addEventListener("input", () => (this.isDraft = true));
    return h(
      "div",
      { class: "mnb-drawer", id: freshId(), hidden: true },
      this.area,
      h("div", { class: "mnb-row" }, cancel, save),
    );
  }

  refresh() {
    const { state, wire } = this.store;
    setText(this.title, state.title || "Chat");
    setText(this.who, state.who || "");
    setProp(this.who, "title", state.who || null);
    setProp(this.settings, "aria-expanded", String(Boolean(state.panel)));
    setProp(this.system, "aria-controls", this.drawer.id);
    this.system.classList.toggle("mnb-on", Boolean(state.system));
    this.presets.hidden = !state.presets.length;
    const off = wire.state === "gone";
    for (const button of [this.presets, this.system, this.settings]) button.disabled = off;
    this.exporting.disabled = off && !state.turns.length;
    this.clear.disabled = off || !state.turns.length;
  }

  /** Opens or closes the drawer; what is typed in it stays until it is saved or cancelled. */
  toggleSystem() {
    this.drawer.hidden = !this.drawer.hidden;
    setProp(this.system, "aria-expanded", String(!this.drawer.hidden));
    if (this.drawer.hidden) return this.system.focus({ preventScroll: true });
    if (!this.isDraft) this.area.value = this.store.state.system || "";
    this.area.focus({ preventScroll: true });
    return fit(this.area);
  }

  async saveSystem() {
    if (await this.act({ type: "system", text: this.area.value })) this.endSystem();
  }

  endSystem() {
    this.isDraft = false;
    if (!this.drawer.hidden) this.toggleSystem();
  }
}
