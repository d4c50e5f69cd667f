// Two runs of the same requests, in step: a view of each, one set of controls, where they part, what each cost.

function render({ model, el }) {
  const size = model.get("size");
  const data = JSON.parse(model.get("data"));
  const root = html("div", { class: "stepplayer sp-compare", tabindex: 0, role: "group", "aria-label": `Compare ${data.sides[0].name} with ${data.sides[1].name}`, "data-size": size, "data-lm-suppress-shortcuts": "true" });
  el.append(root);
  const longest = Math.max(...data.sides.map((side) => side.steps));
  const sentence = html("p", { class: "sp-say" }, data.sentence);
  const hot = makeHot((what) => (what === "pin" ? draw() : sides.forEach((side) => side.view && side.view.paint())));

  const sides = data.sides.map((given) => {
    const name = html("h3", {}, given.name);
    const where = html("span", { class: "sp-sub" });
    name.append(" ", where);
    const says = html("p", { class: "sp-what", "aria-live": "polite" });
    const scope = html("section", { class: "sp-side", "aria-label": given.name, "data-name": given.name }, name, says);
    if (!given.data) {
      says.textContent = "No step is recorded: there is nothing to show.";
      return { scope };
    }
    const own = Object.assign(prepare(given.data, size), { span: longest });
    const places = Object.fromEntries(own.panels.map((panelName) => [panelName, html("div", {})]));
    scope.append(...Object.values(places));
    return { scope, places, where, says, view: makeView(root, scope, places, own, hot), steps: given.steps, facts: own.facts };
  });
  const shown = sides.filter((side) => side.view);
  const kinds = new Map(shown.flatMap((side) => side.view.data.kinds));
  if (data.differs !== null) kinds.set("differs", "first difference");
  const steer = makeSteer({
    model, root, sentence, hot, live: false,
    count: () => longest,
    kinds: () => [...kinds],
    kindsAt: (t) => [
      ...shown.flatMap(({ view }) => (view.data.blank || !view.data.steps[t] ? [] : [...(view.data.steps[t].event ? ["any"] : []), ...(view.data.steps[t].kinds || [])])),
      ...(t === data.differs ? ["any", "differs"] : []),
    ],
  });
  const grid = html("div", { class: "sp-sides" }, ...sides.map((side) => side.scope));
  root.append(html("div", { class: "sp-head" }, html("div", { class: "sp-title" }, html("b", {}, data.sides.map((side) => side.name).join(" and ")), html("span", { class: "sp-sub" }, "step by step")), steer.element), sentence, grid, table(data));

  function fitWhats() {
    for (const { says, view } of shown) {
      says.style.minHeight = "0";
      says.textContent = view.data.steps.reduce((most, s) => (s.say.length > most.length ? s.say : most), "");
      says.style.minHeight = `${says.offsetHeight}px`;
    }
    const high = Math.max(...shown.map(({ says }) => says.offsetHeight));
    for (const { says } of shown) says.style.minHeight = `${high}px`;
  }
  function measure() {
    const changed = shown.map(({ view }) => view.measure()).some(Boolean);
    if (!changed) return;
    fitWhats();
    draw();
    if (size !== "room") return;
    for (const { view, places } of shown) { // a map is made to fit below its schedule, which is there only now
      view.measure();
      places.kv.replaceChildren();
    }
    draw();
  }
  function draw() {
    const step = steer.at();
    for (const { view, where, says, steps, scope, facts } of shown) {
      view.data.at = step;
      view.draw(step);
      const over = step >= steps;
      scope.dataset.over = over ? "yes" : "no";
      where.textContent = over ? `ended after ${plural(steps, "step")}` : facts;
      says.textContent = over ? `Nothing left to run: its last step was ${steps - 1}.` : view.say;
    }
    Object.assign(root.dataset, { step, steps: longest, differs: data.differs === null ? "no" : data.differs, apart: data.differs !== null && step >= data.differs ? "yes" : "no" });
    steer.show(false);
  }

  const onStep = () => draw();
  model.on("change:step", onStep);
  steer.stop();
  const unwatch = watch(root, size, () => shown.forEach(({ view }) => view.paint()), measure);
  measure();
  return () => {
    steer.stop();
    unwatch();
    model.off("change:step", onStep);
  };
}

// The metrics: of the whole run, then the steps that brought each request its first and its last token.
function table(data) {
  const names = data.sides.map((side) => side.name);
  const ms = (value) => `${value < 1000 ? value.toPrecision(3) : Math.round(value).toLocaleString("en-US")} ms`;
  const number = (value, row) => {
    if (value === null || value === undefined) return "none";
    return row.wall ? ms(value) : value.toLocaleString("en-US");
  };
  const apart = (row) => {
    if (row.a === null || row.b === null) return row.a === row.b ? "=" : "";
    const by = row.b - row.a;
    if (!by) return "=";
    const size = row.wall ? ms(Math.abs(by)) : Math.abs(by).toLocaleString("en-US", { maximumFractionDigits: 2 });
    return `${by > 0 ? "+" : "−"}${size}`;
  };
  const cell = (text, row) => html("td", row && row.a !== row.b ? { class: "sp-apart" } : {}, text);
  const headed = (titles) => html("thead", {}, html("tr", {}, ...titles.map((title) => html("th", { scope: "col" }, title))));
  const whole = html("tbody");
  for (const row of data.table.filter((metric) => metric.request === "")) {
    whole.append(html("tr", { "data-metric": row.name, "data-differs": row.a === row.b ? "no" : "yes" },
      html("th", { scope: "row" }, row.name, row.wall ? html("span", { class: "sp-sub" }, " wall clock") : ""),
      cell(number(row.a, row), row), cell(number(row.b, row), row), cell(apart(row), row)));
  }
  const each = html("tbody");
  const byRequest = new Map();
  for (const row of data.table.filter((metric) => metric.request !== "")) byRequest.set(row.request, [...(byRequest.get(row.request) || []), row]);
  const most = 16;
  let left = [...byRequest.keys()];
  if (left.length > most) left = [...left.filter((label) => byRequest.get(label).some((row) => row.a !== row.b)), ...left].filter((label, i, all) => all.indexOf(label) === i).slice(0, most);
  for (const label of left) {
    const [first, last] = byRequest.get(label);
    each.append(html("tr", { "data-request": label }, html("th", { scope: "row" }, label), ...[first, last].flatMap((row) => [cell(number(row.a, row), row), cell(number(row.b, row), row)])));
  }
  const more = byRequest.size > left.length ? html("div", { class: "sp-fold" }, `${left.length} of ${plural(byRequest.size, "request")} shown, those that differ first`) : "";
  const both = data.sides.every((side) => side.data);
  return html("details", { class: "sp-metrics", ...(both ? { open: "" } : {}) }, html("summary", {}, "In numbers"),
    html("div", { class: "sp-tables" },
      html("table", {}, headed(["", ...names, "difference"]), whole),
      html("div", {}, html("table", {}, headed(["request", `first token, ${names[0]}`, names[1], `last token, ${names[0]}`, names[1]]), each), more)));
}

export default { render };
