// One question's box. The page only proposes: what is committed, graded or refused is what the kernel says, so that
// a box whose kernel is gone cannot claim to have recorded anything. See predict.py for the traits.

function render({ model, el }) {
  const kind = model.get("kind");
  const options = model.get("options");
  const question = model.get("question");
  const letter = (i) => String.fromCharCode(97 + i);
  let order = options.map((_, i) => i);

  const root = html("div", { class: "se-form predict", role: "group", "aria-label": `Predict: ${question}`, "data-key": model.get("name"), "data-kind": kind, "data-lm-suppress-shortcuts": "true" });
  const row = html("div", { class: "pr-row" });
  const said = html("span", { class: "pr-said", "data-said": "", role: "status" });
  const grade = html("p", { class: "pr-grade", "data-grade": "" });
  const note = html("p", { class: "pr-note", "data-note": "" });
  const live = html("div", { role: "status", "aria-live": "polite" }, grade, note);
  const commit = html("button", { type: "button", "data-do": "commit" }, "Commit");
  const change = html("button", { type: "button", "data-do": "change" }, "Change");
  const wait = asking(model, () => {
    root.dataset.state = "silent";
    said.textContent = "";
    note.textContent = SILENT;
  });
  const serial = `pr${Math.random().toString(36).slice(2)}`;

  let field;
  let guess; // what the form says now, as a message
  if (kind === "number") {
    field = html("input", { type: "text", inputmode: "decimal", autocomplete: "off", placeholder: "a number", "aria-label": `Your guess. ${question}`, "data-field": "" });
    field.addEventListener("keydown", (e) => e.key === "Enter" && !e.shiftKey && send());
    guess = () => ({ guess: field.value });
    row.append(field);
  } else if (kind === "choice") {
    field = html("fieldset", { "data-field": "", "aria-label": `Your guess. ${question}` });
    options.forEach((option, i) => {
      const radio = html("input", { type: "radio", name: serial, value: i });
      radio.addEventListener("keydown", (e) => e.key === "Enter" && !e.shiftKey && send());
      field.append(html("label", { "data-option": letter(i) }, radio, `${letter(i)}) ${option}`));
    });
    guess = () => ({ places: [...field.querySelectorAll(":checked")].map((radio) => Number(radio.value)) });
    row.append(field);
  } else {
    field = html("ol", { "data-field": "", "aria-label": `Put in order, first on top. ${question}` });
    guess = () => ({ places: order });
    root.append(field);
    list();
  }

  // The list in its present order; `focus` is [item, "up" | "down"], so that one key can be pressed again and again.
  function list(focus) {
    const open = model.get("state") === "open";
    field.replaceChildren(...order.map((item, place) => {
      const move = (name, sign, by) => {
        if (!open) return "";
        const end = place + by < 0 || place + by >= order.length;
        const button = html("button", { type: "button", "data-do": name, "aria-disabled": String(end), "aria-label": `Move ${options[item]} ${name}, now ${place + 1} of ${order.length}` }, sign);
        button.addEventListener("click", () => shift(item, by, name));
        button.addEventListener("keydown", (e) => {
          const step = { ArrowUp: -1, ArrowDown: 1 }[e.key];
          if (!step || e.ctrlKey || e.metaKey || e.altKey) return;
          e.preventDefault();
          shift(item, step, name);
        });
        return button;
      };
      const text = html("span", { "data-item": letter(item) }, `${letter(item)}) ${options[item]}`);
      return html("li", {}, html("span", {}, `${place + 1}`), move("up", "↑", -1), move("down", "↓", 1), text);
    }));
    if (focus) field.children[order.indexOf(focus[0])].querySelector(`[data-do="${focus[1]}"]`).focus();
  }

  function shift(item, by, name) {
    const place = order.indexOf(item);
    const next = place + by;
    if (model.get("state") !== "open" || next < 0 || next >= order.length) return;
    [order[place], order[next]] = [order[next], order[place]];
    list([item, name]);
  }

  function send() {
    if (model.get("state") !== "open") return;
    note.textContent = "";
    wait.ask({ do: "commit", ...guess() });
  }

  function draw() {
    wait.heard();
    const state = model.get("state");
    const open = state === "open";
    const verdict = model.get("verdict");
    const shown = model.get("said");
    const active = root.contains(document.activeElement) ? document.activeElement : null;
    const onItem = active && active.closest("li") ? [...field.children].indexOf(active.closest("li")) : -1;
    Object.assign(root.dataset, { state, verdict, source: model.get("source") });
    if (kind === "order") {
      if (model.get("placed").length) order = [...model.get("placed")];
      list();
    } else if (kind === "choice") {
      for (const radio of field.querySelectorAll("input")) {
        radio.disabled = !open;
        if (model.get("placed").length) radio.checked = Number(radio.value) === model.get("placed")[0];
      }
    } else {
      field.hidden = field.disabled = !open;
      if (shown) field.value = shown;
    }
    commit.hidden = !open;
    change.hidden = state !== "committed" || model.get("source") === "cell";
    const where = model.get("source") === "cell" ? "committed in the cell" : "committed";
    const typed = kind === "number" && state === "revealed" && !shown && field.value.trim();
    said.textContent = shown ? `${where}: ${shown}` : typed ? `${typed} was typed, but not committed` : "";
    const mark = { right: "✓ right", off: "✗ off" }[verdict];
    grade.replaceChildren(...(mark ? [html("b", {}, mark)] : []), model.get("grade"));
    note.textContent = model.get("note");
    // Whoever pressed a button by keyboard stays where something can be done next.
    if (active && (active.hidden || active.disabled || !active.isConnected || onItem >= 0)) {
      const first = kind === "choice" ? field.querySelector(":checked") || field.querySelector("input") : kind === "order" ? field.querySelector("button") : field;
      if (open) first.focus();
      else if (!change.hidden) change.focus();
    }
  }

  commit.addEventListener("click", send);
  change.addEventListener("click", () => wait.ask({ do: "change" }));
  row.append(commit, said, change);
  root.append(row, live);
  keepKeys(root);
  el.append(root);
  const loose = followTheme(root);
  draw();
  model.on("change:serial", draw);
  const lost = () => wait.ask({ do: "hello" }); // the connection came or went: is what stands here still recorded?
  model.on("comm_live_update", lost);
  return () => {
    loose();
    wait.heard();
    model.off("change:serial", draw);
    model.off("comm_live_update", lost);
  };
}

export default { render };
