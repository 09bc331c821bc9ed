// The chat as a file that the page makes itself, where there is no kernel to make it.

/** The formats that need no kernel. */
const KEPT = new Set(["md", "json"]);

/** Offers what `page` shows as a file. */
function exportHere(page, format) {
  const { turns, title } = page.store.state;
  const answer = (turn) => page.transcript.sideOf(turn.id).answer.source();
  if (format === "json") return download("chat.json", "application/json", asJson(turns, answer));
  const whole = !turns.some((turn) => turn.running) && transcriptText(page.model, page.el);
  return download("chat.md", "text/markdown", `# ${title || "Chat"}\n\n${whole || asMarkdown(turns, answer)}\n`);
}

function asMarkdown(turns, answer) {
  const quoted = (text) => text.replace(/^/gm, "> ");
  const part = (turn) => ["**You**", quoted(turn.prompt), `**${turn.who || "Answer"}**`, answer(turn), turn.error];
  return turns.flatMap(part).filter(Boolean).join("\n\n");
}

/** As `to_json` in mistral_nb/chat/files.py, of what stands on the page: `Chat.load` reads it. */
function asJson(turns, answer) {
  const kept = [];
  let head = null;
  for (const group of grouped(turns)) {
    const parent = head;
    for (const turn of group) kept.push(keptTurn(turn, parent, group.length > 1 ? group[0].id : null, answer(turn)));
    head = (group.find((turn) => turn.on_path) || group[0]).id;
  }
  return JSON.stringify({ format: "mistral-nb chat", version: 1, head, turns: kept }, null, 1);
}

function keptTurn(turn, parent, group, answer) {
  return {
    id: turn.id,
    parent,
    prompt: turn.prompt,
    choice: { backend: null, model: null, system: null, fields: {} },
    sent: null,
    attachments: turn.attachments.map(({ kind, name }) => ({ kind, name, text: "" })),
    answer,
    finish_reason: turn.finish || null,
    error: turn.error || null,
    footer: turn.footer,
    served: null,
    left_out: turn.left_out,
    group,
    asked_at: "",
  };
}
