// Measures what a widget shows: texts with their ink and the paper under them, marks with their tints, stops of Tab.

const parse = (color) => {
  const parts = color.match(/[\d.]+/g).map(Number);
  return [parts[0], parts[1], parts[2], parts[3] ?? 1];
};
const over = ([r, g, b, a], under) => [0, 1, 2].map((i) => [r, g, b][i] * a + under[i] * (1 - a)).concat(1);
const fade = (color, by) => [color[0], color[1], color[2], color[3] * by];
const above = (element) => {
  const chain = [];
  for (let e = element; e; e = e.parentElement) chain.unshift(e);
  return chain;
};
const opacity = (element) => above(element).reduce((all, e) => all * Number(getComputedStyle(e).opacity), 1);
// Clipped to a dot, as texts for listeners are, an element is not seen.
const dot = (element) => above(element).some((e) => getComputedStyle(e).clipPath === "inset(50%)" || (e.clientWidth === 1 && e.clientHeight === 1));
const seen = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });

// The colour under an element: the backgrounds of all that it lies in.
function paper(element) {
  return above(element)
    .filter((e) => !(e instanceof SVGElement) || e.tagName === "svg")
    .reduce((under, e) => over(fade(parse(getComputedStyle(e).backgroundColor), opacity(e)), under), [255, 255, 255, 1]);
}

// In a drawing, what was painted before and covers the middle of the text.
function painted(text) {
  const svg = text.ownerSVGElement;
  const box = text.getBoundingClientRect();
  const middle = new DOMPoint(box.x + box.width / 2, box.y + box.height / 2);
  const before = [...svg.querySelectorAll("rect, path, circle, polygon")].filter((shape) =>
    shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING && !shape.closest("defs") && seen(shape));
  return before.reduce((under, shape) => {
    const style = getComputedStyle(shape);
    const covers = style.fill !== "none" && !style.fill.startsWith("url") &&
      shape.isPointInFill(middle.matrixTransform(shape.getScreenCTM().inverse()));
    return covers ? over(fade(parse(style.fill), Number(style.fillOpacity) * opacity(shape)), under) : under;
  }, paper(svg));
}

function texts(root) {
  const found = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const box = element.getBoundingClientRect();
    if (!text || !seen(element) || dot(element) || !box.width || !box.height) continue;
    if (element.closest(":disabled, [aria-disabled='true'], title, desc, option")) continue; // WCAG leaves these out
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement;
    const under = drawn ? painted(element) : paper(element);
    const tint = fade(parse(drawn ? style.fill : style.color), opacity(element) * (drawn ? Number(style.fillOpacity) : 1));
    const name = element.getAttribute("class") || element.tagName.toLowerCase();
    found.push({ name, text: text.slice(0, 40), ink: over(tint, under), paper: under });
  }
  for (const field of root.querySelectorAll("input:not([type='range'], [type='radio'], [type='checkbox'])")) {
    if (!seen(field) || field.disabled) continue;
    const style = getComputedStyle(field, field.value ? null : "::placeholder");
    const under = paper(field);
    const tint = fade(parse(style.color), opacity(field) * (field.value ? 1 : Number(style.opacity)));
    found.push({ name: "input", text: field.value || field.placeholder, ink: over(tint, under), paper: under });
  }
  return found;
}

// What a mark is told from its surroundings by: its edge or its fill, whichever there is.
function marks(root, selectors) {
  const under = paper(root);
  const visible = (color) => color && color !== "none" && !color.startsWith("url") && parse(color)[3] > 0;
  return selectors.flatMap((selector) => [...root.querySelectorAll(selector)].filter((e) => seen(e) && !e.closest("defs")).map((element) => {
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement;
    const colors = drawn ? [style.stroke, style.fill] : [style.borderTopColor, style.borderLeftColor, style.backgroundColor];
    const alpha = drawn ? [Number(style.strokeOpacity), Number(style.fillOpacity)] : [1, 1, 1];
    const tints = colors.flatMap((c, i) => (visible(c) ? [over(fade(parse(c), alpha[i] * opacity(element)), under)] : []));
    return { selector, paper: under, tints };
  }));
}

// Numbers what Tab should reach: controls and whatever says that it can be reached; of radio buttons, one.
function stops(root) {
  const all = [...root.querySelectorAll("button, select, input, textarea, summary, a[href], [tabindex='0']"), root];
  const reachable = all.filter((e) => e.tabIndex >= 0 && !e.disabled && !e.closest("[hidden]") && seen(e));
  const group = (radio) => reachable.filter((e) => e.type === "radio" && e.name === radio.name);
  const chosen = (radio) => group(radio).find((e) => e.checked) || group(radio)[0];
  const kept = reachable.filter((e) => e.type !== "radio" || e === chosen(e));
  kept.forEach((e, i) => (e.dataset.stop = i));
  return kept.map((e) => e.outerHTML.slice(0, 90));
}

function focused() {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const outline = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
  return { stop: Number(element.dataset.stop ?? -1), ring: outline || style.boxShadow !== "none" };
}
