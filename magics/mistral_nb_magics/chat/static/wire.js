// The line to the kernel: numbered messages, their answers, and whether anybody is there.

const SLOW_MS = 1000;
const NOT_CONNECTED = "The kernel does not answer.";
const PATIENCE_MS = 3000;

/** What only answers a question; anything else is also told to all who listen. */
const ANSWERS = new Set(["done", "refused", "names", "text"]);

class Wire {
  /**
   * @param {any} model anywidget's model
   * @param {(message: any) => void} hear gets every message that is not an answer to `ask`
   * @param {(state: "opening"|"live"|"waiting"|"gone") => void} tell gets the state of the line when it changes
   */
  constructor(model, hear, tell) {
    this.model = model;
    this.hear = hear;
    this.tell = tell;
    this.state = "opening";
    this.pending = new Map();
    this.first = Math.floor(Math.random() * 1e9) * 1000;
    this.ref = this.first;
    this.onMessage = (message) => this.take(message);
    this.cut = false;
    this.onLive = () => setTimeout(() => this.look());
    model.on("msg:custom", this.onMessage);
    model.on("comm_live_update", this.onLive);
    this.timer = setInterval(() => this.watch(), 500);
  }

  /** @param {any} message goes to the kernel; resolves to what answers it. */
  ask(message) {
    if (this.state === "gone" && message.type !== "hello")
      return Promise.resolve({ type: "refused", error: NOT_CONNECTED });
    const ref = (this.ref += 1);
    return new Promise((resolve) => {
      if (message.type === "hello") this.drop("hello");
      this.pending.set(ref, { resolve, since: Date.now(), message });
      try {
        this.model.send({ ...message, ref });
      } catch (error) {
        this.refuseAll(`The kernel cannot be reached: ${error.message || error}`);
      }
    });
  }

  /** Whether a message answers no other tab's question, of which this one hears too. */
  concerns({ ref }) {
    return typeof ref !== "number" || (ref > this.first && ref <= this.ref);
  }

  take(message) {
    if (!message || typeof message.type !== "string") return;
    this.setState("live");
    const waiting = this.pending.get(message.ref);
    this.pending.delete(message.ref);
    if (waiting) waiting.resolve(message);
    if (!ANSWERS.has(message.type)) this.hear(message);
  }

  /** Forgets the questions of a type: a newer one stands for them. */
  drop(type) {
    for (const [ref, { message }] of this.pending) if (message.type === type) this.pending.delete(ref);
  }

  /** Sees whether the widget has lost its kernel, or has it back. */
  look() {
    const cut = isCut(this.model);
    if (cut === this.cut) return;
    this.cut = cut;
    this.setState(cut ? "gone" : "opening");
  }

  /** Looks after questions that nobody answers. */
  watch() {
    this.look();
    if (this.state === "gone" || !this.pending.size) return;
    const waited = Date.now() - Math.min(...[...this.pending.values()].map((waiting) => waiting.since));
    const idle = ["idle", "dead", "terminating", "disconnected"].includes(kernelStatus(this.model));
    if (waited > PATIENCE_MS && idle) this.setState("gone");
    else if (waited > SLOW_MS) this.setState("waiting");
  }

  setState(state) {
    if (state === this.state) return;
    this.state = state;
    if (state === "gone") this.refuseAll(NOT_CONNECTED);
    this.tell(state);
  }

  refuseAll(error) {
    for (const waiting of this.pending.values()) waiting.resolve({ type: "refused", error });
    this.pending.clear();
  }

  close() {
    clearInterval(this.timer);
    this.model.off("msg:custom", this.onMessage);
    this.model.off("comm_live_update", this.onLive);
    this.refuseAll("The chat was closed.");
  }
}
