// The composer: what is typed, what goes with it, and the keys that send, stop and recall.

class Composer {
  /** @param {Store} store @param {(error: string) => void} complain @param {() => void} sent */
  constructor(store, complain, sent) {
    this.sent = sent;
    this.store = store;
    this.complain = complain;
    this.attached = [];
    this.recalled = -1;
    this.sending = false;
    this.compare = store.state.compare;
    this.area = h("textarea", {
      class: "mnb-area",
      rows: 1,
      dir: "auto",
      placeholder: "Ask anything",
      "aria-label": "Your question",
    });
    this.chips = h("div", { class: "mnb-chips", hidden: true });
    this.attacher = new Attacher(store.wire, (thing) => this.attach(thing));
    this.completer = new Completer(store.wire, this.area);
    this.comparing = iconButton("compare", "columns", "Compare two answers", { "aria-pressed": "false" });
    this.hint = h("span", { class: "mnb-hint", id: freshId() });
    this.button = iconButton("send", "send", "Send", { class: "mnb-icon mnb-send" });
    setProp(this.area, "aria-describedby", this.hint.id);
    const row = h("div", { class: "mnb-row" }, this.attacher.node, this.comparing, this.hint, this.button);
    this.node = h("div", { class: "mnb-composer" }, this.completer.node, this.chips, this.area, row);
    this.area.addEventListener("input", () => this.typed());
    this.area.addEventListener("keydown", (event) => this.key(event));
    this.refresh();
  }

  typed() {
    this.recalled = -1;
    this.complain("");
    fit(this.area);
    this.completer.look();
    this.refreshButton();
  }

  /** Shows whether something runs and whether the kernel is there. */
  refresh() {
    const { state, wire } = this.store;
    if (state.compare !== this.compareTold) this.compare = this.compareTold = state.compare;
    setProp(this.comparing, "aria-pressed", String(Boolean(this.compare)));
    const off = wire.state === "gone";
    for (const control of [this.area, this.attacher.button, this.comparing]) control.disabled = off;
    setText(this.hint, state.busy ? "Esc stops" : this.sending ? "Sending" : "Enter sends, Shift+Enter breaks");
    this.area.readOnly = this.sending;
    this.refreshButton();
  }

  refreshButton() {
    const { busy } = this.store.state;
    relabel(this.button, busy ? "stop" : "send", busy ? "Stop" : "Send");
    this.button.dataset.act = busy ? "stop" : "send";
    this.button.disabled = this.store.wire.state === "gone" || (!busy && (this.sending || !this.area.value.trim()));
  }

  key(event) {
    if (event.isComposing || event.keyCode === 229 || this.completer.choices.key(event)) return this.refreshButton();
    const plain = !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) this.send();
    else if (event.key === "ArrowUp" && plain && this.mayRecall()) this.recall(1);
    else if (event.key === "ArrowDown" && plain && this.recalled >= 0) this.recall(-1);
    else return undefined;
    return event.preventDefault();
  }

  mayRecall() {
    return this.store.state.history.length > 0 && (this.area.value === "" || this.recalled >= 0);
  }

  /** Puts an older (1) or newer (-1) question into the composer; newer than the newest is the empty one. */
  recall(step) {
    const history = this.store.state.history;
    this.recalled = Math.min(this.recalled + step, history.length - 1);
    this.area.value = this.recalled < 0 ? "" : history[history.length - 1 - this.recalled];
    this.area.setSelectionRange(this.area.value.length, this.area.value.length);
    fit(this.area);
    this.refreshButton();
  }

  attach(thing) {
    if (!this.attached.some((each) => each.kind === thing.kind && each.name === thing.name)) this.attached.push(thing);
    this.drawChips();
    this.area.focus({ preventScroll: true });
  }

  drawChips() {
    this.chips.hidden = !this.attached.length;
    this.chips.replaceChildren(
      ...this.attached.map((thing, index) =>
        h(
          "span",
          { class: "mnb-chip", title: thing.kind },
          icon("clip"),
          thing.name,
          iconButton("detach", "clear", `Remove ${thing.name}`, { "data-index": index }),
        ),
      ),
    );
  }

  detach(index) {
    this.attached.splice(index, 1);
    this.drawChips();
    this.area.focus({ preventScroll: true });
  }

  /** @returns {boolean} whether there is somebody to compare with */
  toggleCompare() {
    this.compare = !this.compare && Boolean(this.store.state.compare);
    this.refresh();
    return Boolean(this.store.state.compare);
  }

  async send() {
    const text = this.area.value;
    if (this.sending || !text.trim() || this.store.wire.state === "gone") return;
    if (this.store.state.busy) return void this.complain("An answer is still being written: Esc stops it.");
    this.setSending(true);
    this.complain("");
    const answer = await this.store.wire.ask({
      type: "send",
      text,
      attach: this.attached,
      compare: Boolean(this.compare),
    });
    if (answer.type === "done") (this.empty(), this.sent());
    this.setSending(false);
    if (answer.type === "refused") this.complain(answer.error);
  }

  setSending(sending) {
    this.sending = sending;
    this.refresh();
  }

  empty() {
    this.area.value = "";
    this.attached = [];
    this.recalled = -1;
    this.drawChips();
    this.completer.close();
    fit(this.area);
  }
}
