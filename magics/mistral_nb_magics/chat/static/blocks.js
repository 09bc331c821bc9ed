// Blocks of an answer: markup changed where it differs, and code as text with coloured runs.

const ACTIVE =
  "script,style,link,meta,base,iframe,frame,object,embed,applet,form,input,button,textarea,select,svg,img," +
  "picture,video,audio,source,track,canvas,template,noscript,dialog,portal,annotation-xml,maction,slot";
const ATTRIBUTES = new Set(
  (
    "href rel target title dir lang start style colspan rowspan scope alt aria-label display mathvariant mathsize " +
    "mathcolor stretchy fence separator form accent accentunder lspace rspace minsize maxsize movablelimits largeop " +
    "symmetric linethickness columnalign rowalign columnspacing rowspacing columnlines rowlines frame width height " +
    "depth voffset notation scriptlevel displaystyle xmlns data-marks"
  ).split(" "),
);
const SCHEMES = /^(https?|mailto|ftp):/i;
const STYLE = /^text-align:\s*(left|right|center);?$/;

/**
 * Markup as nodes that do nothing. The kernel sends nothing that acts; this is the second lock on the door.
 * @param {string} markup
 * @returns {DocumentFragment}
 */
function inert(markup) {
  const template = document.createElement("template");
  template.innerHTML = markup;
  for (const node of template.content.querySelectorAll(ACTIVE)) node.remove();
  for (const node of template.content.querySelectorAll("*")) {
    for (const { name, value } of [...node.attributes]) {
      const bad = (name === "href" && !SCHEMES.test(value)) || (name === "style" && !STYLE.test(value.trim()));
      if (bad || !ATTRIBUTES.has(name)) node.removeAttribute(name);
    }
    if (node.localName === "a") setProp(node, "rel", "noopener noreferrer nofollow");
    if (node.localName === "table") box(node, "Table");
    else if (node.localName === "pre") node.replaceWith(nested(node));
    else if (node.localName === "math" && node.textContent.length > 30) {
      if (node.getAttribute("display") === "block") box(node, "Formula");
      else setProp(node, "tabindex", "0");
    }
  }
  return template.content;
}

/** What is wide scrolls by itself, also by the keyboard, and the page does not. */
function box(node, label) {
  const outer = h("div", { class: "mnb-scroll", tabindex: "0", role: "group", "aria-label": label });
  node.replaceWith(outer);
  outer.append(node);
}

/** Code inside of another block, as any code. */
function nested(pre) {
  const { lang, textContent } = pre;
  const code = new CodeBlock();
  code.update({ body: textContent, language: lang, marks: pre.getAttribute("data-marks") || "" });
  return code.node;
}

/** Makes `target`'s children those of `source`, touching only what differs: selections in the rest stay. */
function morph(target, source) {
  let old = target.firstChild;
  for (const fresh of [...source.childNodes]) {
    if (!old) target.append(fresh);
    else {
      const next = old.nextSibling;
      if (!old.isEqualNode(fresh)) morphNode(old, fresh);
      old = next;
    }
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

function morphNode(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
  } else if (old.nodeType === Node.ELEMENT_NODE && old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) {
    morph(old, fresh);
  } else old.replaceWith(fresh);
}

class HtmlBlock {
  constructor() {
    this.node = h("div", { class: "mnb-block mnb-html", dir: "auto" });
    this.body = null;
  }

  update(block) {
    if (block.body === this.body) return;
    this.body = block.body;
    morph(this.node, inert(block.body));
  }
}

class CodeBlock {
  constructor() {
    this.code = h("code");
    this.name = h("span", { class: "mnb-language" });
    this.pre = h("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, this.code);
    const copy = iconButton("copy-code", "copy", "Copy code");
    this.node = h(
      "div",
      { class: "mnb-block mnb-code", dir: "ltr" },
      h("div", { class: "mnb-code-head" }, this.name, copy),
      this.pre,
    );
    this.node.source = () => this.node.querySelector("code").textContent;
    this.body = "";
    this.marks = "";
    this.runs = [];
    this.tail = document.createTextNode("");
    this.code.append(this.tail);
  }

  update(block) {
    setText(this.name, block.language || "text");
    if (block.body === this.body && block.marks === this.marks) return;
    this.dropRuns(commonLength(this.body, block.body), commonLength(this.marks, block.marks), block.marks);
    this.body = block.body;
    this.marks = block.marks;
    this.addRuns();
  }

  /** Drops the runs that a change after `sameBody` characters and `sameMarks` of the marks may have changed. */
  dropRuns(sameBody, sameMarks, marks) {
    const stays = (run) =>
      run.end <= sameBody && run.markEnd <= sameMarks && !(run.markEnd === sameMarks && isDigit(marks[sameMarks]));
    while (this.runs.length && !stays(this.runs[this.runs.length - 1])) this.runs.pop().node.remove();
  }

  /** Colours what the marks cover beyond the runs there are; the rest is one plain text. */
  addRuns() {
    const last = this.runs[this.runs.length - 1] || { end: 0, markEnd: 0 };
    let { end } = last;
    const pattern = /([a-z]+|_)(\d+)/g;
    pattern.lastIndex = last.markEnd;
    const made = document.createDocumentFragment();
    for (let found = pattern.exec(this.marks); found && end < this.body.length; found = pattern.exec(this.marks)) {
      const text = this.body.slice(end, (end += Number(found[2])));
      const node = found[1] === "_" ? document.createTextNode(text) : h("span", { class: `mnb-${found[1]}`, text });
      this.runs.push({ end, markEnd: pattern.lastIndex, node });
      made.append(node);
    }
    this.code.insertBefore(made, this.tail);
    const rest = this.body.slice(end);
    if (rest.startsWith(this.tail.data)) this.tail.appendData(rest.slice(this.tail.length));
    else this.tail.data = rest;
  }
}

function isDigit(char) {
  return char !== undefined && char >= "0" && char <= "9";
}

/** How many of their first UTF-16 code units two strings share. */
function commonLength(a, b) {
  if (b.startsWith(a)) return a.length;
  let low = 0;
  let high = Math.min(a.length, b.length);
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (a.slice(low, middle) === b.slice(low, middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

function fenced({ body, name }) {
  const longest = Math.max(2, ...[...body.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  const language = name.textContent === "text" ? "" : name.textContent;
  return `${fence}${language}\n${body}${body.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** The blocks of one answer. */
class Answer {
  constructor() {
    this.node = h("div", { class: "mnb-answer" });
    this.views = [];
  }

  /** @param {any[]} blocks @param {Iterable<number>} [indices] those that changed; without it, every one is compared */
  update(blocks, indices) {
    while (this.views.length > blocks.length) this.views.pop().node.remove();
    for (const index of indices || blocks.keys()) this.updateOne(index, blocks[index]);
  }

  updateOne(index, block) {
    if (!block) return;
    const Kind = block.kind === "code" ? CodeBlock : HtmlBlock;
    let view = this.views[index];
    if (!(view instanceof Kind)) {
      const fresh = new Kind();
      if (view) view.node.replaceWith(fresh.node);
      else this.node.append(fresh.node);
      this.views[index] = view = fresh;
    }
    view.update(block);
  }

  /** The first `limit` characters of its text or a little more, without a layout of the page. */
  opening(limit) {
    let text = "";
    for (const view of this.views) {
      if (text.length > limit) break;
      text += `${view instanceof CodeBlock ? view.body : view.node.textContent}\n`;
    }
    return text;
  }

  /** What the browser shows, as Markdown: its code in fences, the rest plain. */
  source() {
    return this.views.map((view) => (view instanceof CodeBlock ? fenced(view) : view.node.innerText)).join("\n\n");
  }

  /** What the browser shows, as plain text. */
  text() {
    return this.views.map((view) => (view instanceof CodeBlock ? view.body : view.node.innerText)).join("\n\n");
  }
}
