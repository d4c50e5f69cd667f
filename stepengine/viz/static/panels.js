// The panels of the step player; see payload.py for the shape of their data.
// A panel is a function (data, step, hot, old) -> element; `old` is what it returned last time, for those that
// only move. Whatever belongs to a request carries data-r and takes its colours from `paint`.

const SVG = "http://www.w3.org/2000/svg";
const ROWS = { page: 32, room: 12 }; // requests (or slots) drawn; the others are folded into a count
const LINES = { page: 8, room: 12 }; // lines of a panel that lists a step's requests

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== undefined && child !== ""));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
const chip = (data, r) => html("span", { class: "sp-chip", "data-r": r }, data.requests[r].label);

function panel(name, title, sub, ...children) {
  return html("section", { class: "sp-panel", "data-panel": name, "aria-label": title }, html("h4", {}, title, html("span", {}, sub)), ...children);
}

// The requests that are drawn, where there are too many: those that have not ended make room for no one; the ended
// ones leave, but only every tenth step, so that rows do not move all the time.
function drawnRows(data, step) {
  const all = data.requests.map((_, r) => r);
  const limit = ROWS[data.size];
  if (all.length <= limit) return { rows: all, before: 0, after: 0 };
  const since = step - (step % 10);
  const live = all.filter((r) => data.requests[r].end < 0 || data.requests[r].end >= since).slice(0, limit);
  const ended = all.filter((r) => !live.includes(r) && data.requests[r].end >= 0 && data.requests[r].end < since);
  const recent = ended.sort((a, b) => data.requests[b].end - data.requests[a].end).slice(0, limit - live.length);
  const rows = [...live, ...recent].sort((a, b) => a - b);
  return { rows, before: ended.length - recent.length, after: all.length - ended.length - live.length };
}

// --- schedule ---------------------------------------------------------------------------------------------------

// Ids are drawn: each widget on a page has a copy of this module, and counts would begin anew in each.
const freshId = (prefix) => prefix + Math.random().toString(36).slice(2);

function schedule(data, step, hot, old) {
  const width = Math.max(240, Math.floor(data.widths.schedule || 560));
  const element = old && old.sp.width === width ? old : buildSchedule(data, width);
  moveSchedule(element, data, step);
  return element;
}

function buildSchedule(data, width) {
  const room = data.size === "room";
  const n = data.steps.length;
  const span = Math.max(n, data.span || 0); // steps of the longer of two runs: both have the same scale
  const id = freshId("sp");
  const shown = Math.min(data.requests.length, ROWS[data.size]);
  const font = room ? 18 : 11;
  const longest = Math.max(...data.requests.map((request) => request.label.length));
  const left = Math.ceil(Math.max(5.2, longest + 1) * font * 0.64) + 4;
  const rowHeight = room ? (shown > 9 || data.span ? 26 : 36) : Math.max(14, Math.min(28, Math.floor(440 / shown)));
  const plot = width - left - 10;
  const least = room ? 16 : 11;
  const cell = Math.max(least, Math.min(room ? 40 : 30, plot / (span + 0.6)));
  const columns = Math.max(1, Math.floor(plot / cell - 0.5));
  const height = shown * rowHeight + font + 14;
  const tall = rowHeight * 0.8;
  const low = Math.max(4, rowHeight * 0.26);
  const gap = cell > 8 ? 1 : 0.5;

  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Requests by step" });
  const clip = (name, ...rest) => svg("clipPath", { id: id + name }, svg("rect", { y: -4, height: height + 8, ...Object.assign({}, ...rest) }));
  const pastClip = clip("p", { x: -1, width: 0 });
  const nextClip = clip("n", { x: 0, width: n * cell + 20 });
  const hatch = svg("pattern", { id: id + "h", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("line", { class: "sp-hatch", x1: 0, y1: 0, x2: 0, y2: 5 }));
  root.append(svg("defs", {}, pastClip, nextClip, clip("v", { x: left - 3, width: width - left + 3 }), hatch));

  const back = svg("g");
  const labels = svg("g");
  const next = svg("g", { "clip-path": `url(#${id}n)` });
  const past = svg("g", { "clip-path": `url(#${id}p)` });
  const axis = svg("g");
  const cursor = svg("rect", { class: "sp-cursor", y: 1, height: shown * rowHeight, width: cell, rx: 2 });
  const moving = svg("g", {}, next, past, axis, cursor);
  root.append(back, svg("g", { "clip-path": `url(#${id}v)` }, moving), labels);

  const box = (t, high) => `M${(t * cell + gap).toFixed(2)} ${((rowHeight - high) / 2).toFixed(2)}h${(cell - 2 * gap).toFixed(2)}v${high.toFixed(2)}h${(-(cell - 2 * gap)).toFixed(2)}z`;
  const work = data.requests.map(() => ({ tall: "", low: "", counts: [], hits: [], away: [], out: [], back: [] }));
  const total = data.steps.reduce((sum, s) => sum + s.chunks.length, 0);
  data.steps.forEach((s, t) => {
    for (const [r, start, length, fresh, cached, , isTall] of s.chunks) {
      if (isTall) work[r].tall += box(t, tall);
      else work[r].low += box(t, low);
      if (isTall && (total < 1500 || fresh > 1)) work[r].counts.push([t, length]);
      if (cached) work[r].hits.push(t);
    }
    for (const r of s.preempted || []) work[r].away.push(t);
    for (const r of s.out || []) work[r].out.push(t);
    for (const r of s.back || []) work[r].back.push(t);
  });

  const rows = data.requests.map((request, r) => {
    const y = rowHeight / 2;
    const line = (spans, name) => spans.map(([a, b]) => svg("path", { class: name, d: `M${a * cell + 1} ${y}H${(b + 1) * cell - 1}` }));
    const group = (...children) => svg("g", { "data-r": r }, ...children);
    const backRow = group(svg("rect", { class: "sp-band", x: 0, y: 0, width, height: rowHeight }), svg("path", { class: "sp-rule", d: `M${left} ${y}H${width - 4}` }));
    const label = svg("g", { class: "sp-label", "data-r": r, tabindex: r ? -1 : 0, role: "button", "aria-pressed": "false", "aria-label": `request ${request.label}, ${plural(request.prompt, "prompt token")}` },
      svg("rect", { x: 1, y: 1, width: left - 8, height: rowHeight - 2 }),
      svg("text", { x: 4, y: y + font * 0.36, "font-size": font }, request.label));
    const pastRow = group(...line(request.wait, "sp-wait"), ...line(request.swap, "sp-swap"));
    for (const [a, b] of request.idle) {
      pastRow.append(svg("rect", { class: "sp-idle", x: a * cell + gap, y: (rowHeight - low * 1.6) / 2, width: (b - a + 1) * cell - 2 * gap, height: low * 1.6, fill: `url(#${id}h)` }));
    }
    pastRow.append(svg("path", { class: "sp-work", d: work[r].low }), svg("path", { class: "sp-work", d: work[r].tall }));
    const nextRow = group(svg("path", { class: "sp-next", d: work[r].low + work[r].tall }));
    for (const [t, count] of work[r].counts) {
      const digits = String(count);
      const wide = digits.length * font * 0.61 + 2 <= cell;
      const size = wide ? font : Math.min(font, (tall - 2) / (digits.length * 0.61), cell - 1);
      if (size < (room ? 13 : 8)) continue; // too small to read: the token panel has the number
      const x = (t + 0.5) * cell;
      const turn = wide ? undefined : `rotate(-90 ${x} ${y})`;
      pastRow.append(svg("text", { class: "sp-count", x, y: y + size * 0.36, "font-size": size.toFixed(1), "text-anchor": "middle", transform: turn }, digits));
    }
    for (const t of work[r].hits) pastRow.append(svg("path", { class: "sp-wedge", d: `M${t * cell} 0h${cell}l${-cell / 2} ${Math.min(6, rowHeight / 4)}z` }));
    const arm = Math.min(4, cell / 3);
    for (const t of work[r].away) pastRow.append(svg("path", { class: "sp-cross", d: `M${(t + 0.5) * cell - arm} ${y - arm}l${2 * arm} ${2 * arm}m0 ${-2 * arm}l${-2 * arm} ${2 * arm}` }));
    const arrow = (t, up) => {
      const [top, bottom] = up ? [y + tall / 2, y - tall / 2] : [y - tall / 2, y + tall / 2]; // out: down to the host
      const x = (t + 0.5) * cell;
      const lean = up ? -arm : arm;
      return svg("path", { class: "sp-move", d: `M${x} ${top}V${bottom}m${-arm} ${-lean}l${arm} ${lean}l${arm} ${-lean}` });
    };
    for (const t of work[r].out) pastRow.append(arrow(t, false));
    for (const t of work[r].back) pastRow.append(arrow(t, true));
    const groups = [backRow, label, pastRow, nextRow];
    if (request.end >= 0) {
      const ring = () => svg("circle", { class: "sp-ring", cx: (request.end + 1) * cell, cy: y, r: Math.min(3.4, cell / 3) });
      nextRow.append(ring());
      groups.ring = ring();
      groups.ring.setAttribute("data-r", r);
    }
    back.append(backRow);
    labels.append(label);
    past.append(pastRow);
    next.append(nextRow);
    return groups;
  });
  const rings = svg("g");
  for (const groups of rows) if (groups.ring) rings.append(groups.ring);
  moving.insertBefore(rings, axis);

  const every = [1, 2, 5, 10, 20, 50, 100].find((gapSteps) => gapSteps * cell >= font * 3) || 100;
  for (let t = 0; t < span; t += every) axis.append(svg("text", { class: "sp-axis", x: (t + 0.5) * cell, y: shown * rowHeight + font + 6, "font-size": font, "text-anchor": "middle" }, String(t)));
  labels.append(svg("text", { class: "sp-axis", x: 4, y: shown * rowHeight + font + 6, "font-size": font }, "step"));

  const fold = html("div", { class: "sp-fold" });
  const key = html("div", { class: "sp-key" });
  const element = panel("schedule", "Schedule", "who runs when, and how many tokens", root, fold, key);
  key.append(...scheduleKey(data, work).map((text) => html("span", {}, text)));
  element.sp = { width, cell, left, columns, rowHeight, rows, moving, cursor, fold, axis, font, past: pastClip.firstChild, next: nextClip.firstChild };
  return element;
}

// Without a prefix cache, what a request starts from is in use by others; with one it may be nobody's.
const fromShared = (data) => data.anyShared && !data.caching;

function scheduleKey(data, work) {
  const texts = [data.layout === "none" ? "tall: the prompt, and all tokens so far again, with their number" : "tall: prompt tokens, with their number"];
  const short = data.layout === "blocks" && data.size === "room"; // more signs, and no more room
  if (short) texts[0] = "tall: prompt tokens";
  if (work.some((w) => w.low)) texts.push("low: one token");
  if (data.requests.some((request) => request.wait.length)) texts.push("dotted: waiting");
  if (data.requests.some((request) => request.idle.length)) texts.push("hatched: idle slot");
  if (work.some((w) => w.away.length)) texts.push("✕ preempted");
  if (work.some((w) => w.out.length)) texts.push("↓ to the host, ↑ back", ...(short ? [] : ["dashed: on the host"]));
  if (work.some((w) => w.hits.length)) texts.push(!fromShared(data) ? "▾ found in the cache" : short ? "▾ shared" : "▾ starts from shared blocks");
  if (data.requests.some((request) => request.end >= 0)) texts.push("○ ended");
  texts.push("outline: still to come");
  return texts;
}

function moveSchedule(element, data, step) {
  const sp = element.sp;
  const span = Math.max(data.steps.length, data.span || 0);
  const first = Math.max(0, Math.min(span - sp.columns, (data.at ?? step) - Math.floor(sp.columns * 0.7)));
  sp.moving.setAttribute("transform", `translate(${(sp.left - first * sp.cell).toFixed(2)} 0)`);
  sp.past.setAttribute("width", ((step + 1) * sp.cell + 1).toFixed(2));
  sp.next.setAttribute("x", ((step + 1) * sp.cell).toFixed(2));
  sp.cursor.setAttribute("x", ((data.at ?? step) * sp.cell).toFixed(2));
  const drawn = drawnRows(data, step);
  const sign = drawn.rows.join();
  if (sp.sign !== sign) {
    sp.sign = sign;
    sp.rows.forEach((groups, r) => {
      const place = drawn.rows.indexOf(r);
      const visible = place >= 0;
      for (const group of groups.ring ? [...groups, groups.ring] : groups) {
        group.style.display = visible ? "" : "none";
        group.setAttribute("transform", `translate(0 ${place * sp.rowHeight})`);
      }
    });
  }
  for (const tick of sp.axis.children) { // a number cut in two would be another number
    const from = Number(tick.getAttribute("x")) - first * sp.cell;
    const half = tick.textContent.length * sp.font * 0.32;
    tick.style.visibility = from - half < -3 || from + half > sp.width - sp.left ? "hidden" : "";
  }
  sp.rows.forEach((groups, r) => {
    if (groups.ring) groups.ring.style.visibility = data.requests[r].end <= step ? "" : "hidden";
  });
  const folded = [drawn.before ? `${drawn.before} that have ended` : "", drawn.after ? `${drawn.after} that come later` : ""].filter(Boolean);
  sp.fold.textContent = folded.length ? `${drawn.rows.length} of ${plural(data.requests.length, "request")} shown; folded: ${folded.join(", ")}` : "";
}

// --- this step's tokens -----------------------------------------------------------------------------------------

// A chunk's tokens in words.
function chunkNote(data, [, start, length, fresh, cached]) {
  const found = fromShared(data) ? "shared" : "found";
  const kept = cached > start ? `${cached} ${found}` : start ? `${start} ${cached ? found : "kept"}` : "";
  const ran = cached > start ? `${length} rerun` : fresh ? `${fresh} new` : ""; // a prompt found whole: its last token runs even so
  return [length - fresh ? `${length - fresh} again` : "", kept, ran].filter(Boolean).join(" + ");
}

// Characters that the longest of all notes takes: bars must not change their scale from step to step.
function noteWidth(data) {
  data.longestNote ??= data.steps.reduce((most, s) => s.chunks.reduce((wide, chunk) => Math.max(wide, chunkNote(data, chunk).length), most), 12);
  return data.longestNote + 1;
}

function tokens(data, step) {
  const chunks = data.steps[step].chunks;
  const ran = chunks.reduce((sum, c) => sum + c[2], 0);
  const again = ran - chunks.reduce((sum, c) => sum + c[3], 0);
  const sub = `${plural(ran, "token")} run${again ? `, ${again.toLocaleString("en-US")} of them again` : ""}`;
  const body = html("div");
  if (data.budget && data.layout !== "none") body.append(...budgetBar(data, chunks, ran));
  const lines = Math.min(LINES[data.size], data.mostChunks);
  const list = html("div", { style: `min-height: calc(var(--row) * ${lines}); --note: ${noteWidth(data)}ch` });
  const shown = chunks.length > lines ? chunks.slice(0, lines - 1) : chunks;
  for (const chunk of shown) {
    const [r, start, length, fresh] = chunk;
    const share = (count) => `width: ${((100 * count) / data.longest).toFixed(3)}%`;
    const bar = html("div", { class: "sp-bar" });
    if (start) bar.append(html("i", { class: "sp-kept", style: share(start) }));
    if (length - fresh) bar.append(html("i", { class: "sp-again", "data-r": r, style: share(length - fresh) }));
    if (fresh) bar.append(html("i", { class: "sp-new", "data-r": r, style: share(fresh) }));
    list.append(html("div", { class: "sp-line", "data-r": r }, chip(data, r), bar, html("span", { class: "sp-note" }, chunkNote(data, chunk))));
  }
  const rest = chunks.slice(shown.length);
  if (rest.length) list.append(html("div", { class: "sp-fold" }, `and ${plural(rest.length, "more request")}: ${plural(rest.reduce((sum, c) => sum + c[2], 0), "token")}`));
  body.append(list);
  const key = html("div", { class: "sp-key" });
  const entry = (name, text) => key.append(html("span", {}, html("i", { class: name }), text));
  entry("sp-new", "run for the first time");
  if (data.anyAgain) entry("sp-again", "run again");
  if (data.layout !== "none") entry("sp-kept", "K/V kept from earlier steps, not run");
  return panel("tokens", "This step’s tokens", sub, body, key);
}

function budgetBar(data, chunks, ran) {
  const bar = html("div", { class: "sp-budget", role: "img", "aria-label": `${ran} of ${data.budget} tokens` });
  for (const [r, , length] of chunks) {
    const wide = (data.widths.tokens || 400) * Math.min(1, length / data.budget);
    const label = data.requests[r].label;
    const named = wide > label.length * (data.size === "room" ? 12 : 8) + 5 ? label : "";
    bar.append(html("i", { "data-r": r, style: `width: ${Math.min(100, (100 * length) / data.budget).toFixed(3)}%` }, named));
  }
  const least = chunks.length * 3 > 0.9 * (data.widths.tokens || 400); // many slivers would overrun the bar
  if (least) bar.replaceChildren(html("i", { style: `width: ${Math.min(100, (100 * ran) / data.budget)}%; --c: var(--grey)` }));
  return [bar, html("div", { class: "sp-ends" }, html("span", {}, `${plural(ran, "token")} in ${plural(chunks.length, "request")}`), html("span", {}, `max_num_batched_tokens ${data.budget}`))];
}

// --- K/V slots --------------------------------------------------------------------------------------------------

function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  while (count >= 1000 && unit < 3) {
    count /= 1000;
    unit += 1;
  }
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
}

function kv(data, step, hot, old) {
  if (data.layout === "blocks") return blockMap(data, step, hot, old);
  const s = data.steps[step];
  if (data.layout === "none") {
    const ran = s.chunks.reduce((sum, c) => sum + c[2], 0);
    const size = data.kv_bytes ? ` (${bytes(ran * data.kv_bytes)})` : "";
    const said = html("div", { class: "sp-nothing" }, html("b", {}, "nothing is kept"), html("span", {}, `keys and values of this step’s ${plural(ran, "token")}${size} are dropped when it ends`));
    return panel("kv", "K/V memory", "", said);
  }
  const held = s.kv.reduce((sum, entry) => sum + entry[2], 0);
  const reserved = s.kv.length * data.slot_tokens;
  const percent = reserved ? ` (${((100 * held) / reserved).toFixed(1)} %)` : "";
  const sub = `${s.kv.length} of ${data.slots} reserved; ${held.toLocaleString("en-US")} of ${reserved.toLocaleString("en-US")} ${data.size === "room" ? "tokens used" : `reserved tokens used${percent}`}`;
  const list = html("div", { style: `--note: ${data.size === "room" ? "18ch" : "17ch"}` });
  const bySlot = new Map(s.kv.map((entry) => [entry[0], entry]));
  const shown = Math.min(data.slots, ROWS[data.size]);
  let numbers = Array.from({ length: data.slots }, (_, i) => i + 1).slice(0, shown);
  for (const number of numbers) {
    const entry = bySlot.get(number);
    if (!entry) {
      list.append(html("div", { class: "sp-line", "data-slot": number, "data-used": 0 }, html("span", { class: "sp-chip sp-none" }, "·"), html("div", { class: "sp-slot sp-free" }), html("span", { class: "sp-note" }, "free")));
      continue;
    }
    const [, r, used] = entry;
    const fresh = (s.fresh || []).includes(number);
    const ends = (s.finished || []).includes(r);
    const bar = html("div", { class: `sp-slot${fresh ? " sp-fresh" : ""}` }, html("i", { style: `width: ${((100 * used) / data.slot_tokens).toFixed(3)}%`, "data-r": r }));
    list.append(html("div", { class: "sp-line", "data-r": r, "data-slot": number, "data-used": used }, chip(data, r), bar, html("span", { class: "sp-note" }, `${used} of ${data.slot_tokens}${ends ? " ○" : ""}`)));
  }
  const folded = data.slots - shown;
  const more = folded ? html("div", { class: "sp-fold" }, `and ${plural(folded, "more slot")}, ${s.kv.filter((entry) => entry[0] > shown).length} of them in use`) : "";
  const key = html("div", { class: "sp-key" });
  for (const text of ["bar: reserved", "filled: used", "dotted: free", "strong outline: new in this step", "○ given back after it"]) key.append(html("span", {}, text));
  return panel("kv", "K/V slots", sub, list, more, key);
}

// --- texts ------------------------------------------------------------------------------------------------------

const columnsOf = (text) => {
  let sum = 0;
  for (const character of text) sum += character.codePointAt(0) > 0x2e80 ? 1.8 : 1;
  return sum;
};

// The end of a text that fits in so many columns.
function tail(text, columns) {
  const characters = Array.from(text);
  let used = 0;
  let i = characters.length;
  while (i > 0 && used + columnsOf(characters[i - 1]) <= columns) used += columnsOf(characters[(i -= 1)]);
  return i > 0 ? `…${characters.slice(i + 1).join("")}` : text;
}

const visible = (text) => text.replace(/\r?\n/g, "↵").replace(/\t/g, "→");

function requestText(data, step, r) {
  const request = data.requests[r];
  const count = request.arrived > step ? 0 : request.tokens.filter((t) => t <= step).length; // a fork has its parent's
  const fresh = request.tokens[count - 1] === step ? 1 : 0;
  const line = html("p", request.pieces.length ? {} : { class: "sp-short" });
  const state = stateOf(request, step);
  if (!request.pieces.length) {
    line.append(html("span", { class: "sp-prompt" }, plural(request.prompt, "prompt token")), count ? `, ${plural(count, "token")} generated` : "");
  } else {
    const columns = Math.max(40, Math.floor(((data.widths.texts || 420) - 50) / (data.size === "room" ? 10.4 : 7.2)) * 2 - 10);
    const before = visible(request.pieces.slice(0, count - fresh).join(""));
    const newest = visible(fresh ? request.pieces[count - 1] : "");
    const note = state === "waiting" ? "  waiting" : state === "finished" ? `  ○ ${request.reason}` : "";
    const room = columns - columnsOf(newest) - note.length;
    const output = tail(before, room);
    const left = room - columnsOf(output);
    const prompt = left > 8 ? tail(visible(request.text), left) : "";
    line.append(html("span", { class: "sp-prompt" }, prompt), output, fresh ? html("mark", { "data-r": r }, newest || "…") : "", note ? html("span", { class: "sp-state" }, note) : "");
  }
  return html("div", { class: "sp-text", "data-r": r, "data-state": state, "data-generated": count }, chip(data, r), line);
}

function stateOf(request, step) {
  if (request.arrived > step) return "not arrived";
  if (request.end >= 0 && request.end <= step) return "finished";
  if (request.wait.some(([a, b]) => a <= step && step <= b)) return "waiting";
  if (request.swap.some(([a, b]) => a <= step && step <= b)) return "swapped";
  return "running";
}

// The requests that a panel of one line each lists: all, or those that are pointed at, named, at work, alive.
function shownRequests(data, step, hot) {
  const all = data.requests.map((_, r) => r);
  const limit = LINES[data.size];
  if (all.length <= limit) return all;
  const wanted = [...hot, ...data.steps[step].named, ...data.steps[step].chunks.map((c) => c[0]), ...all.filter((r) => stateOf(data.requests[r], step) !== "finished"), ...all];
  return [...new Set(wanted)].slice(0, limit).sort((a, b) => a - b);
}

function texts(data, step, hot) {
  const all = data.requests;
  const shown = shownRequests(data, step, hot);
  const list = shown.map((r) => requestText(data, step, r));
  const more = all.length > shown.length ? html("div", { class: "sp-fold" }, `and ${plural(all.length - shown.length, "more request")}`) : "";
  const key = html("div", { class: "sp-key" });
  for (const text of ["grey: prompt", "coloured: this step’s token"]) key.append(html("span", {}, text));
  return panel("texts", "Texts", "as they grow", ...list, more, key);
}

const PANELS = { schedule, tokens, kv, tables: blockTables, texts };
