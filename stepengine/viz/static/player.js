// The step player: one trace, recorded or live, and its controls. Data comes as JSON; see payload.py for its shape.

function render({ model, el }) {
  const size = model.get("size");
  const live = Boolean(model.get("live"));
  const read = () => prepare(JSON.parse(model.get("data")), size);
  const root = html("div", { class: "stepplayer", tabindex: 0, role: "group", "aria-label": "Step player", "data-size": size, "data-lm-suppress-shortcuts": "true" });
  el.append(root);
  const first = read();
  const sentence = html("p", { class: "sp-say", "aria-live": "polite" });
  const notice = html("p", { class: "sp-notice", role: "alert", hidden: "" });
  const grid = html("div", { class: "sp-panels", "data-count": first.panels.length });
  const columns = first.panels.length > 1 ? [html("div", { class: "sp-col" }), html("div", { class: "sp-col" })] : [html("div", { class: "sp-col" })];
  grid.append(...columns);
  const places = {};
  first.panels.forEach((name) => {
    const right = columns.length > 1 && (["kv", "tables", "texts"].includes(name) || (first.panels.length === 2 && name === first.panels[1]));
    places[name] = html("div", {});
    columns[right ? 1 : 0].append(places[name]);
  });

  const hot = makeHot((what) => {
    if (what === "pin") return draw();
    view.refold() && hot.hovered < 0 ? draw(["texts", "tables"]) : view.paint();
  });
  const view = makeView(root, root, places, first, hot);
  const steer = makeSteer({
    model, root, sentence, hot, live,
    count: () => view.data.steps.length,
    kinds: () => view.data.kinds,
    kindsAt: (t) => [...(view.data.steps[t].event ? ["any"] : []), ...(view.data.steps[t].kinds || [])],
  });
  const facts = html("span", { class: "sp-sub" });
  const tag = live ? html("span", { class: "sp-live", title: "Step runs the engine at the last step" }, "live") : "";
  root.append(html("div", { class: "sp-head" }, html("div", { class: "sp-title" }, html("b", {}, first.title), tag, facts), steer.element), sentence, notice, grid);

  // Room for the longest sentence, so that nothing below it moves from step to step.
  let fitted = "";
  function fitSentence() {
    const longest = view.data.steps.reduce((most, s) => (s.say.length > most.length ? s.say : most), "");
    fitted = longest;
    sentence.style.minHeight = "0";
    sentence.setAttribute("aria-live", "off");
    sentence.textContent = longest;
    sentence.style.minHeight = `${sentence.offsetHeight}px`;
    sentence.textContent = view.data.steps[steer.at()].say;
    sentence.setAttribute("aria-live", steer.playing ? "off" : "polite");
  }
  function measure() {
    const changed = view.measure();
    if (changed) {
      fitSentence();
      view.measure(); // the sentence may have moved the panels
    }
    return changed;
  }

  let drawn = -1;
  function draw(only) {
    const step = steer.at();
    view.draw(step, only);
    drawn = model.get("step");
    if (sentence.textContent !== view.say) sentence.textContent = view.say;
    const told = model.get("notice") || "";
    const shown = told && step === view.data.steps.length - 1;
    notice.hidden = !shown;
    notice.textContent = shown ? told : "";
    facts.textContent = view.data.facts;
    root.dataset.live = live ? "yes" : "no";
    root.dataset.notice = shown ? "yes" : "no";
    steer.show(view.data.blank);
  }

  const onStep = () => draw();
  const onData = () => {
    view.replace(read());
    if (view.data.steps.some((s) => s.say.length > fitted.length)) fitSentence();
    if (model.get("step") === drawn) draw(); // else the change of the step follows, and draws
  };
  const onAnswer = () => {
    steer.answered();
    draw();
  };
  const listeners = [["change:step", onStep], ["change:data", onData], ["change:answered", onAnswer], ["change:notice", onStep]];
  for (const [name, call] of listeners) model.on(name, call);
  steer.stop();
  const unwatch = watch(root, size, view.paint, () => measure() && draw());
  measure();
  draw();
  return () => {
    steer.stop();
    unwatch();
    for (const [name, call] of listeners) model.off(name, call);
  };
}

export default { render };
