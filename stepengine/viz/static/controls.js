// The panel of Controls: fields, requests, Run, the sentence and the table. It proposes and draws; see controls.py.

function render({ model, el }) {
  const root = html("section", { class: "se-form controls", "aria-label": "Controls", "data-lm-suppress-shortcuts": "true" });
  const fields = html("div", { class: "ct-fields" });
  const requests = html("ul", { "aria-label": "Requests of the next run" });
  const pending = html("span", { class: "ct-pending", "data-pending": "", role: "status" });
  const say = html("p", { class: "ct-say", "data-sentence": "", role: "status", "aria-live": "polite" });
  const note = html("p", { class: "ct-note", "data-note": "", role: "status", "aria-live": "polite" });
  const run = html("button", { type: "button", "data-do": "run" }, "Run");
  const go = html("div", { class: "ct-go" }, run, pending);
  const table = html("div", {});
  const mayAdd = Boolean(model.get("own").tokens);
  const wait = asking(model, () => {
    root.dataset.state = "silent";
    run.textContent = "Run";
    run.removeAttribute("aria-disabled");
    note.textContent = SILENT;
  });

  const input = (name, attributes) => html("input", { "data-own": name, ...attributes });
  const text = input("text", { type: "text", autocomplete: "off", "aria-label": "Text of a request of your own", placeholder: "A request of your own: a few words for the model to go on from" });
  const tokens = input("tokens", { type: "number", min: 1, value: model.get("own").tokens });
  const arrival = input("arrival", { type: "number", min: 0, value: 0 });
  const add = html("button", { type: "button", "data-do": "add" }, "Add");
  const own = html("div", { class: "ct-own" },
    html("label", { class: "ct-text" }, text),
    html("label", {}, html("span", {}, "new tokens"), tokens),
    model.get("own").later ? html("label", {}, html("span", {}, "arrives in step"), arrival) : "",
    add);
  const mine = () => (mayAdd ? { text: text.value, tokens: tokens.value, arrival: arrival.value } : null);
  let taken = model.get("own").taken || 0;

  function field(f) {
    const set = (value) => wait.ask({ do: "set", name: f.name, value });
    let control;
    if (f.kind === "choice") {
      control = html("select", {}, ...f.options.map((option) => html("option", { value: option, selected: option === f.value }, option)));
      control.addEventListener("change", () => set(control.value));
    } else if (f.kind === "range") {
      control = html("input", { type: "number", min: f.low, max: f.high, step: f.step, value: f.value });
      control.addEventListener("change", () => set(control.value));
    } else {
      control = html("input", { type: "checkbox" });
      control.checked = f.value;
      control.addEventListener("change", () => set(control.checked));
    }
    control.dataset.control = f.name;
    control.disabled = Boolean(f.lacks);
    const limits = f.lacks || (f.kind === "range" ? `${f.low} to ${f.high}` : "");
    return html("label", { "data-lacks": f.lacks ? "yes" : "no" }, html("span", {}, f.name), control, limits ? html("span", { class: "ct-limits" }, limits) : "");
  }

  function request(r) {
    const late = r.arrival ? `, step ${r.arrival}` : "";
    const item = html("li", { "data-request": r.label, "data-mine": r.own >= 0 ? "yes" : "no" }, html("b", {}, r.label), html("span", {}, `${r.text} → ${r.tokens}${late}`));
    if (r.own >= 0) {
      const drop = html("button", { type: "button", "data-do": "drop", "aria-label": `Remove your request ${r.label}` }, "×");
      drop.addEventListener("click", () => wait.ask({ do: "drop", number: r.own }));
      item.append(drop);
    }
    return item;
  }

  // A first run is a line of counts; later ones a table of what moved, and a line of what did not.
  function counts(list) {
    const line = (items, head, shown) => html("p", { class: "ct-line" }, html("span", {}, head), ...items.map((item) => html("span", { "data-metric": item[0], "data-moved": "no" }, `${item[0]} `, html("b", {}, item[shown]))));
    if (!list.length) return [];
    if (list.every(([, before, , change]) => !before && !change)) return [line(list, "This run:", 2)];
    const moved = list.filter((item) => item[3] !== "same");
    const rest = list.filter((item) => item[3] === "same");
    const row = ([name, ...cells]) => html("tr", { "data-metric": name, "data-moved": "yes" }, html("th", { scope: "row" }, name), ...cells.map((cell) => html("td", {}, cell)));
    const heads = ["", "before", "now", "difference"].map((head) => html("th", { scope: "col" }, head));
    const table = html("table", { "aria-label": "What moved" }, html("thead", {}, html("tr", {}, ...heads)), html("tbody", {}, ...moved.map(row)));
    return [...(moved.length ? [table] : []), ...(rest.length ? [line(rest, "As before:", 2)] : [])];
  }

  function draw() {
    const busy = model.get("busy");
    if (!busy) wait.heard();
    const focused = document.activeElement && root.contains(document.activeElement) ? document.activeElement.dataset.control : undefined;
    const dropped = document.activeElement?.dataset?.do === "drop" && root.contains(document.activeElement);
    Object.assign(root.dataset, { state: busy ? "busy" : "idle", runs: model.get("runs"), requests: model.get("requests").length });
    fields.replaceChildren(...model.get("fields").map(field));
    requests.replaceChildren(...model.get("requests").slice(0, 12).map(request), ...(model.get("requests").length > 12 ? [html("li", {}, `and ${model.get("requests").length - 12} more`)] : []));
    if ((model.get("own").taken || 0) !== taken) {
      taken = model.get("own").taken;
      text.value = "";
    }
    run.textContent = busy ? "Running…" : "Run";
    run.setAttribute("aria-disabled", String(busy));
    pending.textContent = busy ? "" : model.get("pending");
    if (say.textContent !== model.get("sentence")) say.textContent = model.get("sentence");
    note.textContent = model.get("note");
    table.replaceChildren(...counts(model.get("table")));
    if (focused) fields.querySelector(`[data-control="${CSS.escape(focused)}"]`)?.focus();
    else if (dropped) (mayAdd ? text : run).focus();
  }

  function start() {
    if (run.getAttribute("aria-disabled") === "true") return;
    run.textContent = "Running…";
    run.setAttribute("aria-disabled", "true");
    root.dataset.state = "asked";
    note.textContent = "";
    wait.ask({ do: "run", request: mine() });
  }
  run.addEventListener("click", start);
  add.addEventListener("click", () => wait.ask({ do: "add", request: mine() }));
  own.addEventListener("keydown", (e) => e.key === "Enter" && !e.shiftKey && e.target.tagName === "INPUT" && wait.ask({ do: "add", request: mine() }));

  root.append(fields, requests, ...(mayAdd ? [own] : []), go, say, note, table);
  keepKeys(root);
  el.append(root);
  const loose = followTheme(root);
  draw();
  const lost = () => wait.ask({ do: "hello" });
  model.on("change:serial", draw);
  model.on("comm_live_update", lost);
  return () => {
    loose();
    wait.heard();
    model.off("change:serial", draw);
    model.off("comm_live_update", lost);
  };
}

export default { render };
