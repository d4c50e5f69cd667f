// K/V in blocks: what each step's changes add up to, the pool as a map, the block tables. Drawn with the functions of
// panels.js, which follows in the same module.

const MAP = {
  page: { most: 512, pitch: 49, least: 15, height: (count) => (count > 200 ? 420 : 300) },
  room: { most: 96, pitch: 64, least: 30, height: () => 330 }, // and no more than leaves the page in one piece
};

// Fills in, for every step: tables and host slots by request, tokens held by request. What does not change is shared.
function addTables(data) {
  let tables = data.requests.map(() => []);
  let hosted = data.requests.map(() => []);
  let held = data.requests.map(() => 0);
  let kept = new Set();
  data.steps.forEach((s, t) => {
    if (s.tables) tables = [...tables];
    for (const [r, keep, ...blocks] of s.tables || []) tables[r] = [...tables[r].slice(0, keep), ...blocks];
    if (s.hosted) hosted = [...hosted];
    s.out = [];
    s.back = [];
    for (const [r, ...slots] of s.hosted || []) {
      if (slots.length) s.out.push(r);
      else if (data.requests[r].end !== t) s.back.push(r);
      hosted[r] = slots;
    }
    held = [...held];
    for (const [r, start, length] of s.chunks) held[r] = start + length;
    for (const [r, count] of s.held || []) held[r] = count;
    if (s.kept || s.unkept) {
      kept = new Set(kept);
      for (const block of s.unkept || []) kept.delete(block);
      for (const block of s.kept || []) kept.add(block);
    }
    Object.assign(s, { at: tables, host: hosted, tokensOf: held, findable: kept });
  });
  const limit = MAP[data.size].most;
  const all = Array.from({ length: data.slots }, (_, i) => i + 1);
  data.mapped = data.slots <= limit ? all : data.size === "page" && data.used.length ? data.used.slice(0, limit) : all.slice(0, limit);
  data.hostRow = Math.max(0, ...data.steps.map((s) => s.host.reduce((sum, slots) => sum + slots.length, 0)));
  data.anyKept = data.steps.some((s) => s.findable.size);
  data.anyShared = data.steps.some((s) => s.tables && new Set(s.at.flat()).size < s.at.flat().length);
}

// block -> { owners, tokens }: who has it in its table, and how many tokens it holds.
function ownersOf(data, s) {
  const found = new Map();
  s.at.forEach((table, r) => {
    table.forEach((block, i) => {
      const tokens = Math.min(Math.max(s.tokensOf[r] - i * data.slot_tokens, 0), data.slot_tokens);
      const entry = found.get(block);
      if (!entry) found.set(block, { owners: [r], tokens, entry: i });
      else {
        entry.owners.push(r);
        entry.tokens = Math.max(entry.tokens, tokens);
      }
    });
  });
  return found;
}

// --- the map ----------------------------------------------------------------------------------------------------

function blockMap(data, step, hot, old) {
  const width = Math.max(200, Math.floor(data.widths.kv || 420));
  const sign = [width, data.mapped.join(), data.hostRow, data.anyShared, data.anyKept, data.steps.some((s) => s.copies)].join(";");
  const element = old && old.sp && old.sp.sign === sign ? old : buildMap(data, width);
  element.sp.sign = sign;
  moveMap(element, data, step);
  return element;
}

function mapGrid(data, width, count) {
  const { pitch, least, height } = MAP[data.size];
  const most = data.size === "room" ? Math.min(height(), 720 - data.top - (data.hostRow ? 212 : 150)) : height(count);
  for (let p = pitch; p > least; p -= 1) {
    const columns = Math.floor(width / p);
    if (Math.ceil(count / columns) * p <= most) return { pitch: p, columns };
  }
  return { pitch: least, columns: Math.max(1, Math.floor(width / least)) };
}

function buildMap(data, width) {
  const room = data.size === "room";
  const count = data.mapped.length + 1; // block 0 is drawn too: it is there, and nobody's
  const { pitch, columns } = mapGrid(data, width - 4, count);
  const gap = pitch > 30 ? 5 : pitch > 20 ? 3 : 2;
  const side = pitch - gap;
  const rows = Math.ceil(count / columns);
  const hostTop = rows * pitch + 22;
  const high = rows * pitch + (data.hostRow ? 24 + pitch : 0) + 3;
  const sp = {
    width, pitch, side, columns, room, hostTop, cells: new Map(), picked: -1,
    font: Math.max(room ? 18 : 9, Math.min(room ? 22 : 16, Math.floor(side * 0.42))),
    small: room ? 18 : 10,
    ids: side >= (room ? 56 : 32),
  };
  const root = svg("svg", { width, height: high, viewBox: `0 0 ${width} ${high}`, role: "application", tabindex: 0, class: "sp-map", "aria-label": `Block pool, ${plural(data.slots, "block")}: arrow keys go from block to block` });
  const grid = svg("g", { transform: "translate(2 2)" });
  const corner = (i) => ({ x: (i % columns) * pitch, y: Math.floor(i / columns) * pitch });
  [0, ...data.mapped].forEach((number, i) => {
    const { x, y } = corner(i);
    const group = svg("g", { transform: `translate(${x} ${y})`, class: "sp-block", "data-block": number });
    group.append(svg("rect", { class: number ? "sp-empty" : "sp-padding", width: side, height: side, rx: side > 24 ? 4 : 2 }));
    const cell = { number, group, x, y, sign: "", content: svg("g") };
    group.append(cell.content);
    if (!number) {
      group.append(svg("path", { class: "sp-strike", d: `M2 ${side - 2}L${side - 2} 2` }));
    }
    if (sp.ids) group.insertBefore(svg("text", { class: "sp-id", x: 3, y: sp.small, "font-size": sp.small }, String(number)), cell.content);
    sp.cells.set(number, cell);
    grid.append(group);
  });
  sp.order = [0, ...data.mapped];
  sp.host = svg("g", { transform: `translate(0 ${hostTop})` });
  sp.arrows = svg("g", { class: "sp-arrows" });
  sp.pick = svg("rect", { class: "sp-pick", width: side + 6, height: side + 6, rx: 5, visibility: "hidden" });
  grid.append(sp.pick, sp.arrows);
  root.append(grid);
  if (data.hostRow) {
    root.append(svg("text", { class: "sp-axis", x: 2, y: rows * pitch + 17, "font-size": room ? 18 : 12 }, "on the host"), sp.host);
  }
  sp.readout = html("div", { class: "sp-readout", "aria-live": "polite" });
  sp.more = html("div", { class: "sp-fold" });
  const key = html("div", { class: "sp-key" });
  const texts = ["filled from the bottom: tokens", room ? "dark outline: new" : "dark outline: new in this step"];
  if (data.anyShared) texts.push(room ? "number: references" : "split, with a number: shared by so many");
  if (data.anyKept) texts.push("dotted: free, still findable");
  if (!room && data.steps.some((s) => s.copies)) texts.push("arrow: copied before a write");
  for (const text of room ? texts.slice(1) : texts) key.append(html("span", {}, text));
  const element = panel("kv", "Physical blocks", "", root, sp.readout, sp.more, key);
  sp.sub = element.querySelector("h4 span");
  element.sp = sp;

  const pick = (number) => {
    sp.picked = number;
    showPick(element, sp.data);
  };
  root.addEventListener("pointerover", (e) => {
    const found = e.target.closest("[data-block]");
    pick(found ? Number(found.dataset.block) : -1);
  });
  root.addEventListener("pointerleave", () => pick(-1));
  root.addEventListener("mousedown", (e) => e.preventDefault()); // a click selects a request and leaves the arrow keys to the steps
  root.addEventListener("focus", () => sp.picked < 0 && pick(sp.order[Math.min(1, sp.order.length - 1)]));
  root.addEventListener("blur", () => pick(-1));
  root.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[e.key];
    if (!by || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    e.stopPropagation();
    const next = sp.order.indexOf(sp.picked) + by;
    if (next >= 0 && next < sp.order.length) pick(sp.order[next]);
  });
  return element;
}

function moveMap(element, data, step) {
  const sp = element.sp;
  const s = data.steps[step];
  sp.data = data;
  const owners = ownersOf(data, s);
  const fresh = new Set(s.fresh || []);
  for (const cell of sp.cells.values()) {
    const entry = owners.get(cell.number);
    const isNew = fresh.has(cell.number);
    const kept = !entry && s.findable.has(cell.number);
    const sign = entry ? `${entry.owners.join()}:${entry.tokens}:${isNew}` : kept ? "kept" : "";
    if (sign === cell.sign) continue;
    cell.sign = sign;
    cell.content.replaceChildren(...(entry ? drawBlock(data, sp, cell.number, entry, isNew) : kept ? drawKept(sp, cell.number) : []));
    cell.group.dataset.refs = entry ? entry.owners.length : 0;
    cell.group.dataset.tokens = entry ? entry.tokens : 0;
    cell.group.dataset.kept = kept ? "yes" : "no";
    cell.group.classList.toggle("sp-isnew", isNew);
  }
  const arrows = (s.copies || []).map(([r, , from, to]) => copyArrow(data, sp, r, sp.cells.get(from), sp.cells.get(to)));
  sp.arrows.replaceChildren(...[0, 1].flatMap((layer) => arrows.map((pair) => pair[layer])).filter(Boolean)); // halos below all arrows
  if (data.hostRow) sp.host.replaceChildren(...hostBlocks(data, sp, s));
  const held = [...owners.values()].reduce((sum, entry) => sum + entry.tokens, 0);
  const shared = [...owners.values()].filter((entry) => entry.owners.length > 1).length;
  const parts = [`${owners.size} of ${data.slots} in use`];
  if (s.findable.size) parts.push(`${s.findable.size}${sp.room ? "" : " free but"} findable`);
  if (shared) parts.push(`${shared} shared`);
  const percent = Math.floor((100 * held) / (owners.size * data.slot_tokens));
  if (!sp.room && owners.size && !(shared && s.findable.size)) parts.push(`${percent} % ${s.findable.size ? "full" : "of their slots filled"}`);
  sp.sub.textContent = sp.sub.title = parts.join(", ");
  const hidden = data.slots - data.mapped.length;
  sp.more.textContent = hidden ? `${data.mapped.length} of ${data.slots} blocks shown; of the others ${[...owners.keys()].filter((b) => !sp.cells.has(b)).length} are in use` : "";
  sp.now = { owners, fresh, s };
  showPick(element, data);
}

// Free, with K/V that a request may still find: inside the outline that every free block has.
function drawKept(sp, number) {
  const inset = Math.max(2, Math.round(sp.side * 0.1));
  const parts = [svg("rect", { class: "sp-kept-block", x: inset, y: inset, width: sp.side - 2 * inset, height: sp.side - 2 * inset, rx: 2 })];
  if (sp.ids) parts.push(...plate(sp, number));
  return parts;
}

// The id on paper of its own, where something lies under it.
function plate(sp, number) {
  const long = String(number).length * sp.small * 0.62 + 3;
  return [svg("rect", { class: "sp-plate", x: 1, y: 1, width: long, height: sp.small + 2, rx: 2 }), svg("text", { class: "sp-id", x: 2.5, y: sp.small, "font-size": sp.small }, String(number))];
}

// One block's contents: a strip per owner, all filled to the same height; letter, id, number of references.
function drawBlock(data, sp, number, { owners, tokens }, isNew) {
  const { side, font } = sp;
  const filled = Math.max(2, (side * tokens) / data.slot_tokens) * (tokens > 0);
  const radius = side > 24 ? 4 : 2;
  const parts = [];
  const many = owners.length > 1;
  const strips = owners.slice(0, Math.max(2, Math.floor(side / 6)));
  const wide = side / strips.length;
  const longest = Math.max(...strips.map((r) => data.requests[r].label.length));
  const size = many ? Math.min(font, sp.room ? 18 : Math.max(9, Math.floor(side * 0.3))) : font;
  const named = longest * size * 0.62 <= wide - 1 && (!many || side >= (sp.room ? 40 : 26));
  strips.forEach((r, i) => {
    const strip = svg("g", { "data-r": r }, svg("rect", { class: "sp-ground", x: i * wide, width: wide, height: side, rx: many ? 0 : radius }));
    if (filled) strip.append(svg("rect", { class: "sp-fill", x: i * wide, y: side - filled, width: wide, height: filled, rx: many ? 0 : Math.min(radius, filled / 2) }));
    if (named) {
      const inside = filled >= size + 4;
      const y = inside ? side - Math.max(3, side * 0.1) : Math.max(size * 0.82, side - filled - 3);
      strip.append(svg("text", { class: inside ? "sp-own" : "sp-own sp-out", x: (i + 0.5) * wide, y, "font-size": size, "text-anchor": "middle" }, data.requests[r].label));
    }
    if (!i && sp.ids && !many) {
      const over = filled > side - sp.small;
      strip.append(svg("text", { class: over ? "sp-id sp-on" : "sp-id", x: 3, y: sp.small, "font-size": sp.small }, String(number)));
    }
    parts.push(strip);
  });
  if (many && sp.ids) parts.push(...plate(sp, number));
  parts.push(svg("rect", { class: isNew ? "sp-edge sp-new" : "sp-edge", x: isNew ? -1 : 0.5, y: isNew ? -1 : 0.5, width: isNew ? side + 2 : side - 1, height: isNew ? side + 2 : side - 1, rx: radius }));
  if (many) {
    const digits = Math.max(sp.room ? 18 : 9, Math.min(sp.small + 1, side * 0.55));
    const half = Math.max(digits * 0.68, String(owners.length).length * digits * 0.34 + 2);
    const cx = named || sp.ids ? side - half + 1 : side / 2;
    const cy = named || sp.ids ? half - 1 : side / 2;
    parts.push(svg("rect", { class: "sp-badge", x: cx - half, y: cy - digits * 0.68, width: 2 * half, height: digits * 1.36, rx: digits * 0.68 }),
      svg("text", { class: "sp-refs", x: cx, y: cy + digits * 0.36, "font-size": digits, "text-anchor": "middle" }, String(owners.length)));
  }
  return parts;
}

function copyArrow(data, sp, r, from, to) {
  if (!from || !to) return [];
  const half = sp.side / 2;
  const [x1, y1, x2, y2] = [from.x + half, from.y + half, to.x + half, to.y + half];
  const far = Math.hypot(x2 - x1, y2 - y1) || 1;
  const [ux, uy] = [(x2 - x1) / far, (y2 - y1) / far];
  const cut = Math.min(half * 0.8, far / 3);
  const [ax, ay, bx, by] = [x1 + ux * cut, y1 + uy * cut, x2 - ux * cut, y2 - uy * cut];
  const bend = Math.min(sp.pitch * 0.5, far * 0.2) * (y1 === y2 || x1 === x2 ? 1 : 0.6);
  const [mx, my] = [(ax + bx) / 2 + uy * bend, (ay + by) / 2 - ux * bend];
  const turn = Math.atan2(by - my, bx - mx);
  const head = Math.max(5, Math.min(9, sp.side * 0.25));
  const corner = (angle) => `L${(bx - head * Math.cos(turn + angle)).toFixed(1)} ${(by - head * Math.sin(turn + angle)).toFixed(1)}`;
  const line = `M${ax.toFixed(1)} ${ay.toFixed(1)}Q${mx.toFixed(1)} ${my.toFixed(1)} ${bx.toFixed(1)} ${by.toFixed(1)}`;
  const tip = `M${bx.toFixed(1)} ${by.toFixed(1)}${corner(0.45)}${corner(-0.45)}z`;
  const halo = svg("path", { class: "sp-halo", d: line });
  const arrow = svg("g", { "data-copy": `${data.requests[r].label} ${from.number} ${to.number}` }, svg("path", { class: "sp-arrow", d: line }), svg("path", { class: "sp-tip", d: tip }));
  return [halo, arrow];
}

function hostBlocks(data, sp, s) {
  const all = s.host.flatMap((slots, r) => slots.map((slot, i) => ({ r, slot, i })));
  const room = all.length > sp.columns ? sp.columns - 1 : sp.columns;
  const shown = all.slice(0, room).map(({ r, slot, i }, place) => {
    const tokens = Math.min(Math.max(s.tokensOf[r] - i * data.slot_tokens, 0), data.slot_tokens);
    const group = svg("g", { transform: `translate(${2 + place * sp.pitch} 2)`, "data-hosted": slot }, ...drawBlock(data, { ...sp, ids: false }, slot, { owners: [r], tokens }, false));
    group.lastChild.setAttribute("class", "sp-edge sp-away");
    return group;
  });
  if (room < all.length) shown.push(svg("text", { class: "sp-axis", x: 2 + room * sp.pitch, y: sp.side / 2 + 6, "font-size": sp.room ? 18 : 11 }, `+${all.length - room}`));
  return shown;
}

// The block that is pointed at, in words.
function showPick(element, data) {
  const sp = element.sp;
  const cell = sp.cells.get(sp.picked);
  sp.pick.setAttribute("visibility", cell ? "visible" : "hidden");
  if (!cell) {
    sp.readout.textContent = "";
    return;
  }
  sp.pick.setAttribute("x", cell.x - 3);
  sp.pick.setAttribute("y", cell.y - 3);
  const { owners, fresh } = sp.now;
  const entry = owners.get(cell.number);
  const names = (list) => list.slice(0, 6).map((r) => data.requests[r].label).join(", ") + (list.length > 6 ? " and others" : "");
  if (!cell.number) sp.readout.textContent = "block 0: padding, never given to a request";
  else if (!entry) sp.readout.textContent = `block ${cell.number}: free${sp.now.s.findable.has(cell.number) ? `, still findable: ${data.slot_tokens} tokens’ K/V are there` : ""}`;
  else {
    const who = entry.owners.length > 1 ? `${entry.owners.length} references: ${names(entry.owners)}` : `held by ${names(entry.owners)}`;
    sp.readout.textContent = `block ${cell.number}: ${entry.tokens} of ${data.slot_tokens} tokens, ${who}, logical block ${entry.entry}${fresh.has(cell.number) ? ", new" : ""}`;
  }
}

// --- block tables -----------------------------------------------------------------------------------------------

function blockTables(data, step, hot, old, pinned) {
  const s = data.steps[step];
  const owners = ownersOf(data, s);
  const fresh = new Set(s.fresh || []);
  const copied = new Map((s.copies || []).map(([r, entry, from]) => [`${r} ${entry}`, from]));
  const digits = String(data.slots).length;
  const advance = data.size === "room" ? 11 : 7.3;
  const room = Math.max(3, Math.floor(((data.widths.tables || 420) - 40 - 11 * advance) / (digits * advance + 11)));
  const shown = shownRequests(data, step, hot);
  const list = shown.map((r) => {
    const request = data.requests[r];
    const state = stateOf(request, step);
    const host = s.host[r];
    const table = host.length ? host : s.at[r];
    const line = html("div", { class: "sp-table", "data-r": r, "data-blocks": s.at[r].join(" "), "data-hosted": host.length ? host.join(" ") : undefined }, chip(data, r));
    const cells = html("span", { class: "sp-ids" });
    const entry = (block, i) => {
      const from = copied.get(`${r} ${i}`);
      if (host.length) return html("span", { class: "sp-no sp-hosted" }, String(block));
      const many = owners.get(block).owners.length;
      const made = html("span", { class: `sp-no${many > 1 ? " sp-shared" : ""}${fresh.has(block) ? " sp-fresh" : ""}`, title: many > 1 ? `${many} references` : undefined });
      if (from !== undefined) made.append(html("s", {}, String(from)), " ");
      made.append(String(block));
      return made;
    };
    const wide = (s.copies || []).filter((copy) => copy[0] === r).length; // "4 9", struck and new
    const free = room - 2 * (host.length ? 1 : wide);
    if (table.length > free && !pinned.has(r)) { // the newest entries are the ones that change
      const end = Math.max(1, free - 3);
      cells.append(entry(table[0], 0), entry(table[1], 1), html("span", { class: "sp-state" }, "…"));
      for (let i = table.length - end; i < table.length; i += 1) cells.append(entry(table[i], i));
    } else table.forEach((block, i) => cells.append(entry(block, i)));
    if (host.length) cells.prepend(html("span", { class: "sp-state" }, "host"));
    else if (!table.length) cells.append(html("span", { class: "sp-state" }, (s.preempted || []).includes(r) ? "preempted" : state));
    line.append(cells, html("span", { class: "sp-note" }, table.length ? plural(s.tokensOf[r], "token") : ""));
    return line;
  });
  const more = data.requests.length > shown.length ? html("div", { class: "sp-fold" }, `and ${plural(data.requests.length - shown.length, "more request")}`) : "";
  const key = html("div", { class: "sp-key" });
  const texts = ["outlined: new in this step"];
  if (data.anyShared) texts.unshift("underlined: shared");
  if (data.hostRow) texts.push("dashed: slots on the host");
  for (const text of texts) key.append(html("span", {}, text));
  return panel("tables", "Block tables", "logical order, left to right", ...list, more, key);
}
