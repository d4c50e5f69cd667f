// One trace on the page: its data made ready, its panels drawn, its requests' colours. Several views may share what
// is pointed at (`hot`), and then show the same request in the same way.

// The chunks and token steps that were left out because they follow from the ones before.
function unpack(data) {
  const ends = [];
  for (const s of data.steps) {
    s.chunks = s.chunks.map((c) => (typeof c === "number" ? [c, ends[c], 1, 1, 0, 1, 0] : c));
    for (const [r, start, length] of s.chunks) ends[r] = start + length;
  }
  for (const request of data.requests) {
    request.tokens = request.tokens.flatMap(([a, b]) => Array.from({ length: b - a + 1 }, (_, i) => a + i));
  }
}

function prepare(data, size) {
  data.size = size;
  data.widths = {};
  unpack(data);
  if (data.layout === "blocks") addTables(data);
  const chunks = data.steps.flatMap((s) => s.chunks);
  data.longest = chunks.reduce((most, c) => Math.max(most, c[1] + c[2]), 1);
  data.mostChunks = data.steps.reduce((most, s) => Math.max(most, s.chunks.length), 1);
  data.anyAgain = chunks.some((c) => c[2] > c[3]);
  return data;
}

function prefersDark() {
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  const code = body.dataset.vscodeThemeKind;
  if (code) return code.includes("dark") || code === "vscode-high-contrast";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// What is pointed at, in one view or in several: `all()` is the set of requests, `change` is called by whom it concerns.
function makeHot(change) {
  const hot = { hovered: -1, pinned: new Set() };
  hot.all = () => (hot.hovered >= 0 ? new Set([...hot.pinned, hot.hovered]) : hot.pinned);
  hot.hover = (r) => {
    if (r === hot.hovered) return;
    hot.hovered = r;
    change("hover");
  };
  hot.pin = (r) => {
    hot.pinned.has(r) ? hot.pinned.delete(r) : hot.pinned.add(r);
    change("pin");
  };
  hot.clear = () => {
    hot.pinned.clear();
    change("pin");
  };
  return hot;
}

// `scope` holds the panels' `places` (name -> element) and gets the state in data attributes; `root` has the theme.
function makeView(root, scope, places, data, hot) {
  const style = html("style");
  const id = freshId("v");
  scope.dataset.view = id;
  scope.append(style);
  let painted = "";
  let wasHot = false;
  let shown = 0;

  function measure() {
    let changed = false;
    for (const name of data.panels) {
      const width = Math.floor(places[name].clientWidth);
      if (width && width !== data.widths[name]) {
        data.widths[name] = width;
        changed = true;
      }
    }
    const map = places.kv || places[data.panels[0]]; // what has to end with the page, in a room
    data.top = map.getBoundingClientRect().top - root.getBoundingClientRect().top;
    return changed;
  }

  // One colour per request, by rules rather than element by element; beyond eight requests only those that are
  // selected, pointed at or named in the sentence.
  function paint() {
    const named = new Set(data.steps[shown].named);
    const all = hot.all();
    const dark = root.dataset.theme === "dark";
    const rules = data.requests.map((request, r) => {
      const colored = data.colored || all.has(r) || named.has(r);
      const [c, i, e] = colored ? [request.color, request.ink, dark ? request.color : request.edge] : ["var(--grey)", dark ? "#ffffff" : "#14181c", "var(--greyedge)"];
      return `[data-view="${id}"] [data-r="${r}"] { --c: ${c}; --i: ${i}; --e: ${e}; }`;
    }).join("\n");
    if (rules !== painted) style.textContent = painted = rules;
    if (all.size || wasHot) {
      for (const element of scope.querySelectorAll("[data-r]")) {
        const r = Number(element.dataset.r);
        element.dataset.hot = all.has(r) ? "yes" : "no";
        element.classList.toggle("sp-dim", all.size > 0 && !all.has(r) && !element.parentElement.closest("[data-r]"));
      }
      for (const label of scope.querySelectorAll(".sp-label")) label.setAttribute("aria-pressed", String(hot.pinned.has(Number(label.dataset.r))));
    }
    wasHot = all.size > 0;
    root.dataset.hot = [...all].filter((r) => data.requests[r]).map((r) => data.requests[r].label).join(" ");
  }

  function draw(step, only) {
    shown = Math.min(step, data.steps.length - 1);
    const s = data.steps[shown];
    const all = [...hot.all()].filter((r) => data.requests[r]);
    for (const name of data.panels) {
      if (only && !only.includes(name)) continue;
      const old = places[name].firstElementChild;
      const made = PANELS[name](data, shown, all, old, hot.pinned);
      if (made !== old) places[name].replaceChildren(made);
    }
    const states = data.requests.map((request) => stateOf(request, shown));
    const count = (state) => states.filter((other) => other === state).length;
    Object.assign(scope.dataset, {
      step: shown, steps: data.blank ? 0 : data.steps.length, rows: s.chunks.length, running: count("running"), waiting: count("waiting"), finished: count("finished"),
      tokens: s.chunks.reduce((sum, c) => sum + c[2], 0), again: s.chunks.reduce((sum, c) => sum + c[2] - c[3], 0), idle: s.idle || 0,
    });
    paint();
  }

  return {
    measure, paint, draw,
    get data() { return data; },
    get say() { return data.steps[shown].say; },
    replace(next) {
      const { widths, top } = data;
      data = Object.assign(next, { widths, top });
      if (places.schedule) places.schedule.replaceChildren(); // it draws the whole run at once
    },
    // Panels that list a few of many requests follow the pointer only when it is gone, or they would run away from it.
    refold: () => data.requests.length > LINES[data.size] && ["texts", "tables"].some((name) => data.panels.includes(name)),
  };
}

// Theme and width, as long as the widget is there; the function that ends it.
function watch(root, size, repaint, resized) {
  const theme = () => {
    root.dataset.theme = size === "room" || !prefersDark() ? "light" : "dark";
    repaint();
  };
  const themes = new MutationObserver(theme);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", theme);
  const sizes = new ResizeObserver(resized);
  sizes.observe(root);
  theme();
  return () => {
    themes.disconnect();
    sizes.disconnect();
    media.removeEventListener("change", theme);
  };
}
