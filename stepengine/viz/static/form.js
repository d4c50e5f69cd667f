// What the small forms (Predict, Controls) share: elements, the reader's theme, and waiting for the kernel.

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== undefined && child !== ""));
  return element;
}

const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;

function prefersDark() {
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  const code = body.dataset.vscodeThemeKind;
  if (code) return code.includes("dark") || code === "vscode-high-contrast";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// The root follows the reader's theme until the returned function is called.
function followTheme(root) {
  const theme = () => (root.dataset.theme = prefersDark() ? "dark" : "light");
  const themes = new MutationObserver(theme);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", theme);
  theme();
  return () => {
    themes.disconnect();
    media.removeEventListener("change", theme);
  };
}

// Keys typed into a form are the form's: JupyterLab would move to another cell. Chords (save, run) go through.
function keepKeys(root) {
  root.addEventListener("keydown", (e) => {
    if (!(e.ctrlKey || e.metaKey || (e.shiftKey && e.key === "Enter"))) e.stopPropagation();
  });
}

const PATIENCE = 4000; // ms without an answer until the page says that there is none

// ask(message) sends it; until `heard` is called, `late` is told after a while that the kernel has not answered.
function asking(model, late) {
  let timer = 0;
  return {
    ask(message) {
      clearTimeout(timer);
      timer = setTimeout(late, PATIENCE);
      model.send(message);
    },
    heard: () => clearTimeout(timer),
  };
}

const SILENT = "No answer from the kernel yet: it is busy with a cell, or it was restarted; then run this cell again.";
