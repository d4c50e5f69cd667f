// The controls that step through a run, or through two at once, by pointer and by keyboard.

// plan: { model, root, sentence, count(): steps, kinds(): [[kind, name]], kindsAt(t): kinds of the step, or ["any"],
// hot, live: whether there is an engine behind the last step }.
function makeSteer({ model, root, sentence, count, kinds, kindsAt, hot, live }) {
  const button = (label, name, action) => {
    const made = html("button", { type: "button", "aria-label": name, title: name }, label);
    made.addEventListener("click", action);
    return made;
  };
  let timer = 0;
  const last = () => count() - 1;
  const at = () => Math.max(0, Math.min(last(), model.get("step")));
  const waiting = () => live && model.get("answered") < model.get("asked");
  const go = (step) => {
    const next = Math.max(0, Math.min(last(), step));
    if (next === model.get("step")) return;
    model.set("step", next);
    model.save_changes();
  };
  // The engine's next step: Python runs it and answers with new data.
  const ask = () => {
    if (waiting()) return;
    model.set("asked", model.get("asked") + 1);
    model.save_changes();
    root.dataset.busy = "yes";
  };
  const on = () => (at() < last() ? go(at() + 1) : live && ask());
  const wanted = (t) => kindsAt(t).includes(choice.value);
  const seek = (by) => {
    let t = at() + by;
    while (t > 0 && t < last() && !wanted(t)) t += by;
    if (t >= 0 && t <= last() && wanted(t)) return go(t);
    if (choice.value === "any") return go(by > 0 ? last() : 0);
    told.textContent = `No ${by > 0 ? "later" : "earlier"} ${choice.selectedOptions[0].textContent}.`;
  };

  const back = button("‹", "One step back (left arrow)", () => go(at() - 1));
  const forward = button("Step ›", live ? "One step on; at the last one, the engine's next (right arrow)" : "One step on (right arrow)", on);
  const before = button("«", "To the event before (p)", () => seek(-1));
  const event = button("Next event »", "To the next event (n)", () => seek(1));
  const choice = html("select", { "aria-label": "Kind of event", title: "Kind of event" });
  const play = button("Play", "Play or pause (space)", () => toggle());
  const speed = html("select", { "aria-label": "Steps per second", title: "Steps per second" });
  for (const rate of [1, 2, 5, 10]) speed.append(html("option", { value: rate }, `${rate}/s`));
  speed.value = "2";
  speed.addEventListener("change", () => timer && (stop(), toggle()));
  const slider = html("input", { type: "range", min: 0, step: 1, "aria-label": "Step" });
  slider.addEventListener("input", () => go(Number(slider.value)));
  const readout = html("span", { class: "sp-at" });
  const told = html("span", { class: "sp-told", role: "status" });

  function choices() {
    const all = [["any", "any event"], ...kinds()];
    const sign = all.map(([kind]) => kind).join();
    if (choice.dataset.kinds === sign) return;
    const value = choice.value;
    choice.replaceChildren(...all.map(([kind, name]) => html("option", { value: kind }, name)));
    choice.value = all.some(([kind]) => kind === value) ? value : "any";
    choice.dataset.kinds = sign;
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    root.dataset.playing = "no";
    sentence.setAttribute("aria-live", "polite");
  }
  function toggle() {
    if (timer) return stop();
    if (at() === last() && !live) go(0);
    play.textContent = "Pause";
    root.dataset.playing = "yes";
    sentence.setAttribute("aria-live", "off"); // a sentence every half second is noise to a listener
    timer = setInterval(() => (at() < last() || live ? on() : stop()), 1000 / Number(speed.value));
  }
  function show(blank) {
    const step = at();
    choices();
    told.textContent = "";
    slider.max = last();
    slider.value = step;
    slider.setAttribute("aria-valuetext", `step ${step} of ${last()}`);
    readout.textContent = blank ? "no step yet" : `${step} of ${last()}`;
    back.disabled = before.disabled = step === 0;
    event.disabled = step === last();
    forward.disabled = step === last() && !live;
  }

  function moveFocus(by) {
    const labels = [...root.querySelectorAll(".sp-label")].filter((label) => label.style.display !== "none");
    if (!labels.length) return;
    const now = labels.indexOf(document.activeElement);
    const next = labels[now < 0 ? 0 : Math.max(0, Math.min(labels.length - 1, now + by))];
    for (const label of labels) label.setAttribute("tabindex", label === next ? 0 : -1);
    next.focus();
  }
  const requestAt = (target) => {
    const found = target instanceof Element ? target.closest("[data-r]") : null;
    return found && root.contains(found) ? Number(found.dataset.r) : -1;
  };
  root.addEventListener("pointerover", (e) => hot.hover(requestAt(e.target)));
  root.addEventListener("pointerleave", () => hot.hover(-1));
  root.addEventListener("focusin", (e) => hot.hover(requestAt(e.target)));
  root.addEventListener("focusout", () => hot.hover(-1));
  root.addEventListener("click", (e) => {
    const r = requestAt(e.target);
    if (r >= 0) hot.pin(r);
  });
  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const tag = e.target.tagName;
    if (tag === "SELECT" || (tag === "INPUT" && ["ArrowUp", "ArrowDown", "PageUp", "PageDown"].includes(e.key))) return;
    const pressed = tag === "BUTTON" && (e.key === " " || e.key === "Enter");
    const label = requestAt(e.target);
    const actions = {
      ArrowLeft: () => go(at() - 1), ArrowRight: on, Home: () => go(0), End: () => go(last()),
      ArrowUp: () => moveFocus(-1), ArrowDown: () => moveFocus(1), n: () => seek(1), N: () => seek(-1), p: () => seek(-1),
      " ": () => (label >= 0 ? hot.pin(label) : toggle()), Enter: () => label >= 0 && hot.pin(label), Escape: hot.clear,
    };
    if (pressed || !(e.key in actions)) return;
    e.preventDefault();
    e.stopPropagation();
    actions[e.key]();
  });

  const answered = () => {
    root.dataset.busy = "no";
    if (model.get("notice")) stop();
  };
  return {
    element: html("div", { class: "sp-controls" }, back, forward, html("span", { class: "sp-events" }, before, choice, event), html("span", { class: "sp-plays" }, play, speed), slider, readout, told),
    at, show, stop, answered,
    get playing() { return timer !== 0; },
  };
}
