// What a chat shows, kept once for every view of it: filled by snapshots, then changed by turns and patches.

const EMPTY = {
  turns: [],
  undo: "",
  busy: false,
  title: "",
  who: "",
  panel: false,
  compare: false,
  presets: [],
  system: "",
  history: [],
};

/** What the control characters from U+0080 on stand for in a patch: CODES of the reference receiver. */
const CODES = (
  '<mi> </mi> <mo> </mo> <mn> </mn> </mi><mi> </mi><mo> </mo><mi> </mo><mn> </mn><mo> </mi><mn> <msub><mi> ' +
  '</mn></msub> <msup><mi> </mn></msup> <mfrac> </mfrac> <mrow> </mrow> <math> </math> <math~display="block"> ' +
  '<mspace~width=" em"></mspace> <mtd~style="text-align: </mtd> </td><td> <strong> </strong> <code> </code>'
)
  .split(" ")
  .map((code) => code.replace("~", " "));
const spelled = (add) => add.replace(/[\x80-\x9f]/g, (sign) => CODES[sign.charCodeAt(0) - 128]);

/**
 * Applies one patch to blocks, in place: the mirror of `apply` in mistral_nb/rendering/patches.py.
 * @param {any[]} blocks
 * @param {{count?: number, set: any[][]}} patch
 * @returns {Set<number>|null} the blocks that changed; null when the patch does not fit, so that something was missed
 */
function applyPatch(blocks, patch) {
  const changed = new Set();
  const count = patch.count === undefined ? blocks.length : patch.count;
  blocks.length = Math.min(blocks.length, count);
  for (const [index, ...entry] of patch.set) {
    if (index > blocks.length) return null;
    const block = entry.length === 5 ? replaced(blocks[index], ...entry) : spliced(blocks[index], ...entry);
    if (!block) return null;
    blocks[index] = block;
    changed.add(index);
  }
  return blocks.length === count ? changed : null;
}

/** A block whose `field` is the first `keep` of what it was, and `add`; one of another kind starts empty. */
function replaced(old, kind, language, field, keep, add) {
  const block = old && old.kind === kind ? { ...old, language } : { kind, language, body: "", marks: "" };
  if (keep > block[field].length) return null;
  block[field] = block[field].slice(0, keep) + spelled(add);
  return block;
}

/** A block whose body has `add` in the place of the `drop` before its last `stay`. */
function spliced(old, add, stay = 0, drop = 0) {
  if (!old || old.body.length < stay + drop) return null;
  const end = old.body.length - stay;
  return { ...old, body: old.body.slice(0, end - drop) + spelled(add) + old.body.slice(end) };
}

class Store {
  /** @param {any} model anywidget's model */
  constructor(model) {
    this.model = model;
    this.state = { ...EMPTY, ...copyOf(model.get("saved")) };
    this.known = false;
    this.listeners = new Set();
    this.pages = [];
    this.exporter = null;
    this.wire = new Wire(
      model,
      (message) => this.take(message),
      (state) => this.lineChanged(state),
    );
    this.hello();
  }

  /** @param {(what: string, detail?: any) => void} listener @returns {() => void} ends the listening */
  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  changed(what, detail) {
    for (const listener of [...this.listeners]) listener(what, detail);
  }

  lineChanged(state) {
    clearInterval(this.calling);
    if (state === "opening") this.hello();
    if (state === "gone" && !this.wire.cut) this.calling = setInterval(() => this.hello(), 10000);
    this.changed("line");
  }

  turn(id) {
    return this.state.turns.find((turn) => turn.id === id);
  }

  hello() {
    this.wire.ask({ type: "hello", writes: documentContext(this.model) !== null });
  }

  take(message) {
    const heard = {
      snapshot: "takeSnapshot",
      state: "takeState",
      turn: "takeTurn",
      patch: "takePatch",
      status: "takeStatus",
    }[message.type];
    if (heard) this[heard](message);
    else this.changed(message.type, message);
  }

  takeSnapshot(message) {
    const statuses = new Map(this.state.turns.map((turn) => [turn.id, turn.status]));
    const { type, ref, ...state } = message;
    this.state = { ...EMPTY, ...state };
    for (const turn of this.state.turns) if (turn.running) turn.status = statuses.get(turn.id) || "";
    this.known = true;
    this.save();
    this.changed("snapshot");
  }

  /** What of all that is not the turns has changed. */
  takeState({ type, ref, ...state }) {
    Object.assign(this.state, state);
    this.changed("state");
  }

  takeTurn({ turn }) {
    const old = this.turn(turn.id);
    if (!turn.blocks) turn.blocks = old ? old.blocks : [];
    if (turn.running && old) turn.status = old.status;
    if (old) this.state.turns[this.state.turns.indexOf(old)] = turn;
    else {
      this.state.turns.push(turn);
      this.remember(turn.prompt);
    }
    this.state.busy = this.state.turns.some((each) => each.running);
    if (!turn.running) this.save();
    this.changed("turn", { turn, ended: Boolean(old && old.running && !turn.running) });
  }

  /** The questions that Up recalls come with a snapshot; those that are asked after it are added here. */
  remember(prompt) {
    this.state.history = [...this.state.history.filter((each) => each !== prompt), prompt];
  }

  takePatch(message) {
    const turn = this.turn(message.id);
    const indices = turn ? applyPatch(turn.blocks, message) : null;
    if (!indices) return this.catchUp();
    turn.status = "";
    return this.changed("patch", { turn, indices });
  }

  /** Asks for everything again, once: something was missed. */
  catchUp() {
    if (this.known) this.hello();
    this.known = false;
  }

  takeStatus({ id, text }) {
    const turn = this.turn(id);
    if (turn) turn.status = text;
    this.changed("status", { turn });
  }

  /** Keeps the transcript in the widget's state, on this side only: a saved notebook then shows it without a kernel. */
  save() {
    const { turns, title, who } = this.state;
    if (turns.length || this.known) this.model.set("saved", copyOf({ turns, title, who }));
  }

  close() {
    clearInterval(this.calling);
    this.wire.close();
    this.listeners.clear();
  }
}

/** @param {any} value made of JSON */
function copyOf(value) {
  return value ? JSON.parse(JSON.stringify(value)) : {};
}
