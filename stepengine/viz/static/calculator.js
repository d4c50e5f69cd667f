// The calculator's page: sends what was chosen as `asked`, and shows `data`, which Python answers. It computes nothing.

const FIELDS = [
  { name: "model", label: "Model", kind: "select" },
  { name: "gpu", label: "GPU", kind: "select" },
  { name: "weights", label: "Weights", kind: "select" },
  { name: "kv_bits", label: "K/V", kind: "select", unit: "bits" },
  { name: "context", label: "Context, tokens", kind: "number" },
  { name: "batch", label: "Batch, sequences", kind: "number" },
  { name: "utilisation", label: "Memory used, 0 to 1", kind: "number" },
];
const MORE = [
  { name: "group_size", label: "Group size (int8, int4)", kind: "number" },
  { name: "table_bits", label: "Embedding and head", kind: "select", unit: "bits" },
  { name: "reserve_gb", label: "Reserve for activations, GB", kind: "number" },
];

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function prefersDark() {
  const body = document.body.dataset;
  if (body.jpThemeLight) return body.jpThemeLight === "false";
  if (body.vscodeThemeKind) return body.vscodeThemeKind.includes("dark");
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function render({ model, el }) {
  const id = `calc${Math.random().toString(36).slice(2)}`; // each widget has a copy of this module: no counting
  const read = () => JSON.parse(model.get("data"));
  const inputs = {};
  let turn = 0;
  let last = null; // the field that was asked about last

  function ask(name, value) {
    last = name;
    turn += 1;
    model.set("asked", JSON.stringify({ [name]: value, turn }));
    model.save_changes();
  }

  function field({ name, label, kind, unit }) {
    const key = `${id}-${name}`;
    const attributes = { id: key, "data-field": name, "aria-describedby": `${id}-problem` };
    const input = kind === "select" ? html("select", attributes) : html("input", { ...attributes, type: "text", inputmode: "decimal", autocomplete: "off", spellcheck: "false" });
    input.calcUnit = unit;
    input.addEventListener("change", () => ask(name, input.value));
    // Jupyter's own shortcuts must not see what is typed here.
    input.addEventListener("keydown", (event) => event.stopPropagation());
    inputs[name] = input;
    return html("div", { class: "calc-field" }, html("label", { for: key }, label), input);
  }

  const problem = html("p", { class: "calc-problem", id: `${id}-problem`, role: "alert" });
  const say = html("p", { class: "calc-say", "aria-live": "polite" });
  const bar = html("div", { class: "calc-bar", role: "img" });
  const scale = html("div", { class: "calc-scale", "aria-hidden": "true" });
  const rest = html("p", { class: "calc-rest" });
  const blocks = html("div", { class: "calc-blocks" });
  const note = html("p", { class: "calc-note" });
  const root = html(
    "div",
    { class: "calculator", role: "group", "aria-label": "Calculator: memory and least times of a model on a GPU" },
    html("div", { class: "calc-head" }, html("b", {}, "Calculator"), html("span", {}, "computed, not measured")),
    html("div", { class: "calc-fields" }, ...FIELDS.map(field)),
    html("details", { class: "calc-more" }, html("summary", {}, "Grouping, embedding, reserve"), html("div", { class: "calc-fields" }, ...MORE.map(field))),
    problem,
    say,
    html("section", { "aria-label": "GPU memory" }, bar, scale, rest),
    blocks,
    note,
  );

  function fill(data) {
    for (const [name, input] of Object.entries(inputs)) {
      const options = data.choices[name];
      if (options && input.options.length !== options.length) {
        input.replaceChildren(...options.map((each) => html("option", { value: each }, input.calcUnit ? `${each} ${input.calcUnit}` : `${each}`)));
      }
      const wrong = data.problem !== "" && name === last;
      input.setAttribute("aria-invalid", wrong ? "true" : "false");
      if (!wrong) input.value = `${data.settings[name]}`; // what was typed wrongly stays, to be corrected
    }
  }

  function drawBar(data) {
    const total = Math.max(data.memory.bytes, data.bar.reduce((sum, part) => sum + part.bytes, 0));
    bar.setAttribute("aria-label", `Memory ${data.bar_text}`);
    bar.replaceChildren(
      ...data.bar.map((part) => {
        const name = part.name === "K/V" ? (data.sequences > 1 ? `K/V of ${data.sequences.toLocaleString("en-US")} sequences` : "K/V of one sequence") : part.name;
        const element = html("div", { class: "calc-part", "data-part": part.name, "data-bytes": part.bytes, title: `${name} ${part.size}` }, html("span", {}, html("b", {}, name), ` ${part.size}`));
        element.style.width = `${(100 * part.bytes) / total}%`;
        return element;
      }),
    );
    const share = data.memory.usable / total;
    const end = data.memory.bytes / total;
    for (const [place, name] of [[share, "usable"], [end, "memory"]]) {
      const line = html("i", { class: "calc-line", "data-line": name });
      line.style.left = `${100 * place}%`;
      bar.append(line);
    }
    const over = end < 0.999;
    const used = html("span", {}, `${data.settings.utilisation} may be used`);
    const all = html("span", { class: "calc-all" }, over ? `the GPU ends at ${data.memory.size}` : data.memory.size);
    used.hidden = over; // the sentence says it, and the two lines would be too near
    scale.replaceChildren(used, all);
    used.style.right = `${100 * (1 - share)}%`;
    if (over) all.style.right = `${Math.max(0, 100 * (1 - end))}%`;
    fitLabels();
  }

  // A label stays inside where it has room; the others stand in a line below, with their colour.
  function fitLabels() {
    const outside = [];
    for (const part of bar.querySelectorAll(".calc-part")) {
      const label = part.firstElementChild;
      label.style.visibility = "visible";
      if (label.scrollWidth + 12 <= part.clientWidth) continue;
      label.style.visibility = "hidden";
      if (Number(part.dataset.bytes) > 0) outside.push(html("span", {}, html("i", { class: "calc-swatch", "data-part": part.dataset.part }), part.title));
    }
    rest.replaceChildren(...outside);
    const [used, all] = scale.children;
    if (!used) return;
    // The two words under the bar go on lines of their own where they would meet, or leave the page on the left.
    scale.dataset.tight = "no";
    const [a, b, box] = [used.getBoundingClientRect(), all.getBoundingClientRect(), scale.getBoundingClientRect()];
    const meet = !used.hidden && a.right + 8 > b.left && b.right + 8 > a.left;
    if (meet || (!used.hidden && a.left < box.left) || b.left < box.left) scale.dataset.tight = "yes";
  }

  function draw() {
    const data = read();
    Object.assign(root.dataset, { model: data.settings.model, gpu: data.settings.gpu, fits: data.fits ? "yes" : "no", sequences: data.sequences, problem: data.problem ? "yes" : "no" });
    fill(data);
    problem.textContent = data.problem;
    problem.hidden = !data.problem;
    if (say.textContent !== data.sentence) say.textContent = data.sentence;
    blocks.replaceChildren(
      ...data.blocks.map((block) =>
        html(
          "section",
          { class: "calc-block", "data-block": block.name, "data-value": block.value, "aria-label": block.title },
          html("h4", {}, block.title),
          html("p", { class: "calc-value" }, block.value),
          html("ul", { class: "calc-lines" }, ...block.lines.map((line) => html("li", {}, line))),
          html("ul", { class: "calc-sources", "aria-label": "sources" }, ...block.sources.map((line) => html("li", {}, line))),
        ),
      ),
    );
    note.textContent = data.note;
    drawBar(data);
  }

  const theme = () => (root.dataset.theme = prefersDark() ? "dark" : "light");
  model.on("change:data", draw);
  const themes = new MutationObserver(theme);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", theme);
  let width = 0;
  const sizes = new ResizeObserver(() => {
    if (bar.clientWidth === width) return;
    width = bar.clientWidth;
    fitLabels();
  });
  sizes.observe(root);
  el.append(root);
  theme();
  draw();
  return () => {
    themes.disconnect();
    sizes.disconnect();
    media.removeEventListener("change", theme);
    model.off("change:data", draw);
  };
}

export default { render };
