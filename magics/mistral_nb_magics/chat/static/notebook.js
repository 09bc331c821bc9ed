// The notebook around the chat: its kernel's state, its cells and outputs. Each front end lets us see a different part.

/** The document of the notebook in JupyterLab and Notebook 7; null elsewhere. */
function documentContext(model) {
  const context = model.widget_manager && model.widget_manager.context;
  return context && context.model && context.model.cells ? context : null;
}

/** The address of a link in the transcript beside the widget, by which that output is found. */
const TRANSCRIPT_MARK = "mistral-nb-transcript";

/** What the kernel does, in Jupyter's words ("idle", "busy", "dead"); "unknown" where the front end does not say. */
function kernelStatus(model) {
  const manager = model.widget_manager || {};
  const kernel = manager.kernel;
  if (kernel && kernel.connectionStatus === "disconnected") return "disconnected";
  if (kernel === null || (kernel && kernel.isDisposed)) return "dead";
  return (kernel && kernel.status) || "unknown";
}

/**
 * Whether the widget's kernel is gone. anywidget hides its model's line to the kernel; that of the layout, which comes
 * and goes with it, can be seen.
 */
function isCut(model) {
  const layout = model.get("layout");
  return Boolean(layout) && layout.comm_live === false;
}

/** The index of the notebook's cell that shows `element`; -1 where that cannot be told. */
function cellIndex(element) {
  const cell = element.closest(".jp-Cell");
  if (!cell) return -1;
  if (cell.dataset.windowedListIndex) return Number(cell.dataset.windowedListIndex);
  return [...cell.parentElement.querySelectorAll(":scope > .jp-Cell")].indexOf(cell);
}

/** Puts cells below the one that shows `element`; false where the front end gives no way to. */
function insertCells(model, element, cells) {
  const context = documentContext(model);
  const index = cellIndex(element);
  const shared = context && context.model.sharedModel;
  if (!shared || index < 0 || !shared.insertCells) return false;
  try {
    shared.insertCells(index + 1, cells);
    return true;
  } catch (_) {
    return false; // JupyterLab 3 takes cells of its own making only
  }
}

/** The transcript beside the widget in the notebook's file: the cell's outputs, its index and what it is, or null. */
function findTranscript(model, element) {
  const context = documentContext(model);
  const index = cellIndex(element);
  const cell = context && index >= 0 ? context.model.cells.get(index) : null;
  const outputs = cell && cell.outputs;
  if (!outputs || !outputs.set) return null;
  for (let i = 0; i < outputs.length; i += 1) {
    const output = outputs.get(i).toJSON();
    if (isTranscript(output)) return { outputs, i, output };
  }
  return null;
}

/** Replaces the transcript in the notebook's file, where its display id is gone after a reload. */
function writeTranscript(model, element, data) {
  const found = findTranscript(model, element);
  if (!found) return;
  const { outputs, i, output } = found;
  if (!output.data || output.data["text/markdown"] !== data["text/markdown"]) outputs.set(i, { ...output, data });
}

/** What the transcript holds, in Markdown, without the line by which it is found; "" where there is none. */
function transcriptText(model, element) {
  const found = findTranscript(model, element);
  const text = found && found.output.data && found.output.data["text/markdown"];
  const lines = [text || ""].flat().join("").split("\n");
  return lines.filter((line) => !line.endsWith(`(#${TRANSCRIPT_MARK})`)).join("\n").trim();
}

/** @param {any} output one of a cell's outputs, as in the file */
function isTranscript(output) {
  const metadata = (output.metadata && output.metadata.mistral_nb) || {};
  return (
    Boolean(metadata.transcript) || String((output.data || {})["text/markdown"] || "").includes(`#${TRANSCRIPT_MARK}`)
  );
}

const OUTPUTS = ".jp-OutputArea, .output";
const OUTPUT = ":scope > .jp-OutputArea-child, :scope > .output_area";

/** Hides the transcript's output below the live widget; returns what shows it again. */
function hideTranscript(element) {
  const area = element.closest(OUTPUTS);
  const own = area && [...area.querySelectorAll(OUTPUT)].find((child) => child.contains(element));
  if (!own) return () => {};
  const marked = (child) => child !== own && child.querySelector(`a[href$="#${TRANSCRIPT_MARK}"]`) !== null;
  const each = (hide) => {
    for (const child of area.querySelectorAll(OUTPUT)) {
      const hidden = hide && marked(child);
      if (child.classList.contains("mnb-hidden") !== hidden) child.classList.toggle("mnb-hidden", hidden);
    }
  };
  const watcher = new MutationObserver(() => look());
  const look = () => {
    watcher.disconnect();
    watcher.observe(area, { childList: true });
    for (const child of area.querySelectorAll(OUTPUT)) {
      if (child !== own) watcher.observe(child, { childList: true, subtree: true });
    }
    each(true);
  };
  look();
  return () => (watcher.disconnect(), each(false));
}
