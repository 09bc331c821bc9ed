// The transcript: rows of one question and its answer, or its answers side by side.

const ENDINGS = {
  cancelled: "Stopped.",
  length: "Cut off at the most tokens that were allowed.",
  truncated: "The connection ended before the answer did.",
};

/** One answer, with what is below it. */
class Side {
  constructor() {
    this.answer = new Answer();
    this.who = h("div", { class: "mnb-side-who" });
    this.left = h("div", { class: "mnb-note" });
    this.status = h("div", { class: "mnb-status" }, h("span", { class: "mnb-dots", "aria-hidden": "true" }), h("span"));
    this.error = h("div", { class: "mnb-error" });
    this.footer = h("div", { class: "mnb-footer" });
    this.branch = h("span", { class: "mnb-branch" });
    this.followed = h("span", { class: "mnb-followed" }, icon("check"), "The next question follows this answer");
    this.follow = h("button", {
      type: "button",
      class: "mnb-button",
      "data-act": "continue",
      text: "Continue from this answer",
    });
    this.pick = h("div", { class: "mnb-pick" }, this.followed, this.follow);
    this.tools = this.makeTools();
    this.foot = h("div", { class: "mnb-foot" }, this.footer, this.tools);
    this.node = h(
      "div",
      { class: "mnb-side" },
      this.who,
      this.left,
      this.answer.node,
      this.error,
      this.status,
      this.pick,
      this.foot,
    );
  }

  makeTools() {
    this.stop = iconButton("stop-one", "stop", "Stop this answer");
    return h(
      "div",
      { class: "mnb-tools", role: "toolbar", "aria-label": "Answer" },
      this.branch,
      this.stop,
      iconButton("copy", "copy", "Copy the answer as Markdown"),
      iconButton("regenerate", "redo", "Answer again"),
    );
  }

  /** @param {any} turn @param {boolean} beside others */
  update(turn, beside) {
    this.node.dataset.id = turn.id;
    setProp(this.node, "aria-busy", turn.running ? "true" : null);
    this.answer.update(turn.blocks);
    show(this.who, beside && turn.who);
    show(this.left, turn.left_out ? `${turn.left_out} of the oldest turns did not fit and were left out.` : "");
    show(this.footer, [turn.footer, turn.settings].filter(Boolean).join(" · ") || ENDINGS[turn.finish] || "");
    setProp(this.footer, "title", ENDINGS[turn.finish] || null);
    this.footer.classList.toggle("mnb-cut", turn.finish in ENDINGS);
    this.stop.hidden = !(turn.running && beside);
    this.foot.hidden = turn.running && !beside;
    this.pick.hidden = !beside;
    this.followed.hidden = !turn.on_path;
    this.follow.hidden = turn.on_path;
    this.updateStatus(turn);
    this.updateError(turn);
    this.updateBranch(turn.branch);
    rove(this.tools);
  }

  updateStatus(turn) {
    this.status.hidden = !turn.running;
    if (turn.running)
      setText(this.status.lastChild, turn.status || (turn.blocks.length ? "" : "Waiting for the first token"));
  }

  updateError(turn) {
    if (this.error.dataset.error === (turn.error || "")) return;
    this.error.dataset.error = turn.error || "";
    this.error.hidden = !turn.error;
    const retry = h("button", { type: "button", class: "mnb-button", "data-act": "retry", text: "Retry" });
    this.error.replaceChildren(h("span", { dir: "auto", text: turn.error || "" }), retry);
  }

  updateBranch(branch) {
    const [k, n, ids] = branch || [1, 1, []];
    this.branch.hidden = n < 2;
    if (this.branch.dataset.of === `${k}/${n}`) return void (this.ids = ids);
    this.branch.dataset.of = `${k}/${n}`;
    this.ids = ids;
    const focused = this.branch.contains(this.branch.ownerDocument.activeElement);
    const count = h("span", { text: `${k}/${n}`, "aria-label": `Version ${k} of ${n}`, role: "img" });
    this.branch.replaceChildren(
      iconButton("branch", "left", "Previous version", { "data-step": -1, "aria-disabled": k <= 1 ? "true" : null }),
      count,
      iconButton("branch", "right", "Next version", { "data-step": 1, "aria-disabled": k >= n ? "true" : null }),
    );
    if (focused) this.branch.lastChild.focus();
  }

  /** The id of the version `step` further; undefined at the ends. */
  neighbour(step) {
    return this.ids[this.ids.indexOf(this.node.dataset.id) + step];
  }
}

/** Sets a text and hides what has none. */
function show(node, text) {
  setText(node, text || "");
  node.hidden = !text;
}

/** One of the buttons of a toolbar can be reached by Tab: the one that was used last, or the first. */
function rove(toolbar, wanted) {
  const all = [...toolbar.querySelectorAll("button")].filter((button) => !button.closest("[hidden]"));
  const stop = all.includes(wanted) ? wanted : all.find((button) => button.tabIndex === 0) || all[0];
  for (const button of toolbar.querySelectorAll("button")) button.tabIndex = button === stop ? 0 : -1;
  return all;
}

/** One question with its answers. */
class Row {
  constructor() {
    this.prompt = h("div", { class: "mnb-prompt", dir: "auto" });
    this.chips = h("div", { class: "mnb-chips" });
    const tools = h(
      "div",
      { class: "mnb-tools", role: "toolbar", "aria-label": "Question" },
      iconButton("edit", "edit", "Edit and ask again"),
      iconButton("delete", "trash", "Delete this turn"),
    );
    rove(tools);
    this.box = h("div", { class: "mnb-question" }, h("span", { class: "mnb-sr", text: "You: " }), this.prompt, tools);
    this.sides = h("div", { class: "mnb-sides" });
    this.node = h("article", { class: "mnb-turn" }, this.box, this.chips, this.sides);
    this.node.row = this;
    this.views = [];
    this.editor = null;
  }

  /** @param {any[]} turns those of one comparison, or one */
  update(turns, index) {
    this.turns = turns;
    setProp(this.node, "aria-label", `Turn ${index + 1}`);
    setText(this.prompt, turns[0].prompt);
    setProp(this.prompt, "tabindex", turns[0].prompt.length > 500 ? 0 : null);
    this.updateChips(turns[0].attachments || []);
    this.sides.classList.toggle("mnb-columns", turns.length > 1);
    while (this.views.length > turns.length) this.views.pop().node.remove();
    turns.forEach((turn, i) => this.updateSide(i, turn));
  }

  /** Whether its editor is open, and `turn` is another version of what it shows. */
  isEdited(turn) {
    const versions = (turn.branch || [])[2] || [];
    return Boolean(this.editor) && this.turns.some(({ id }) => versions.includes(id));
  }

  updateSide(i, turn) {
    if (!this.views[i]) {
      this.views[i] = new Side();
      this.sides.append(this.views[i].node);
    }
    this.views[i].update(turn, this.turns.length > 1);
  }

  updateChips(attachments) {
    const key = JSON.stringify(attachments);
    if (this.chips.dataset.key === key) return;
    this.chips.dataset.key = key;
    this.chips.hidden = !attachments.length;
    this.chips.replaceChildren(
      ...attachments.map((each) => h("span", { class: "mnb-chip", title: each.kind }, icon("clip"), each.name)),
    );
  }

  side(id) {
    return this.views.find((view) => view.node.dataset.id === id);
  }

  /** Puts an editor where the question is. */
  edit() {
    if (this.editor) return this.editor.area.focus();
    const area = h("textarea", { class: "mnb-area", "aria-label": "Edit the question", rows: 1, dir: "auto" });
    area.value = this.turns[0].prompt;
    const send = h("button", {
      type: "button",
      class: "mnb-button mnb-primary",
      "data-act": "edit-send",
      text: "Ask again",
    });
    const cancel = h("button", { type: "button", class: "mnb-button", "data-act": "edit-cancel", text: "Cancel" });
    this.editor = { area, node: h("div", { class: "mnb-editor" }, area, h("div", { class: "mnb-row" }, cancel, send)) };
    this.box.after(this.editor.node);
    this.box.hidden = true;
    area.focus();
    fit(area);
  }

  endEdit() {
    if (!this.editor) return;
    const held = this.editor.node.contains(this.editor.node.ownerDocument.activeElement);
    this.editor.node.remove();
    this.editor = null;
    this.box.hidden = false;
    if (held) this.box.querySelector("[data-act=edit]").focus();
  }
}

/** Makes a text area as high as its text, up to what its style allows. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** All rows, and the scrolling that follows the newest text only while the reader is at the bottom. */
class Transcript {
  constructor() {
    this.list = h("div", { class: "mnb-list" });
    this.node = h(
      "div",
      { class: "mnb-transcript", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: "0" },
      this.list,
    );
    this.jump = h(
      "button",
      { type: "button", class: "mnb-jump", "data-act": "jump", hidden: true, "aria-label": "Jump to the latest" },
      icon("down"),
    );
    this.rows = [];
    this.follows = true;
    this.top = 0;
    this.node.addEventListener("scroll", () => this.scrolled(), { passive: true });
  }

  /** Shows these turns; rows that stay are kept with all that is in them, and so is one whose question is edited. */
  update(turns) {
    const groups = grouped(turns);
    const old = new Map(this.rows.map((row) => [row.key, row]));
    const stays = new Set(groups.map(([first]) => first.id));
    this.rows = groups.map((group, index) => {
      const edited = () => [...old.values()].find((each) => !stays.has(each.key) && each.isEdited(group[0]));
      const row = old.get(group[0].id) || edited() || new Row();
      old.delete(row.key);
      row.key = group[0].id;
      row.update(group, index);
      if (this.list.children[index] !== row.node) this.list.insertBefore(row.node, this.list.children[index] || null);
      return row;
    });
    for (const row of old.values()) row.node.remove();
    this.settle();
  }

  patch(turn, indices) {
    const side = this.sideOf(turn.id);
    if (!side) return;
    side.answer.update(turn.blocks, indices);
    side.updateStatus(turn);
    this.follow();
  }

  sideOf(id) {
    for (let i = this.rows.length - 1; i >= 0; i -= 1) {
      const side = this.rows[i].side(id);
      if (side) return side;
    }
    return undefined;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.node;
    const atBottom = scrollHeight - clientHeight - scrollTop < 24;
    if (atBottom) this.follows = true;
    else if (scrollTop < this.top - 1) this.follows = false;
    this.top = scrollTop;
    this.jump.hidden = this.follows;
  }

  /** After the content has changed: stays at the end if it was there, and where nothing can scroll it is. */
  settle() {
    const { clientHeight, scrollHeight } = this.node;
    if (!this.follows && clientHeight && scrollHeight <= clientHeight) this.toEnd();
    this.follow();
  }

  follow() {
    if (!this.follows) return;
    this.node.scrollTop = this.node.scrollHeight;
    this.top = this.node.scrollTop;
  }

  toEnd() {
    this.follows = true;
    this.jump.hidden = true;
    this.follow();
  }
}

/** Turns of one comparison together; each other turn alone. */
function grouped(turns) {
  const groups = [];
  for (const turn of turns) {
    const last = groups[groups.length - 1];
    const together = last && turn.group && turn.group.length > 1 && turn.group.includes(last[0].id);
    if (together) last.push(turn);
    else groups.push([turn]);
  }
  return groups;
}
