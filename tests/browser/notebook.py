"""One notebook open in JupyterLab on a page: run it, read it, change a cell, as a reader does."""

from pathlib import Path
from typing import Any

from tests.browser.lab import Lab
from tests.browser.watch import Watch

CELL_SECONDS, BOOK_SECONDS = 180, 1200  # against an endless wait; alone, the longest notebook takes two minutes

OPEN = """async () => {
  const panel = jupyterapp.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  jupyterapp.shell.collapseLeft();
}"""
RUN = """async ([command, seconds]) => {
  const late = new Promise((_, fail) => setTimeout(fail, 1000 * seconds, new Error(`not done in ${seconds} s`)));
  await Promise.race([jupyterapp.commands.execute(command), late]);
}"""
ASK = """async (expression) => {
  const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const content = { code: '', silent: true, store_history: false, user_expressions: { asked: expression } };
  const { asked } = (await kernel.requestExecute(content).done).content.user_expressions;
  return asked.status === 'ok' ? asked.data['text/plain'] : `${asked.ename}: ${asked.evalue}`;
}"""
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map((cell, at) => ({
  at, kind: cell.model.type, source: cell.model.sharedModel.getSource(), count: cell.model.executionCount ?? null,
  tags: cell.model.getMetadata('tags') || [], outputs: cell.model.outputs ? cell.model.outputs.toJSON() : [] }))"""
SCROLLER = """() => {
  let best = null;
  for (const element of document.querySelectorAll('.jp-NotebookPanel *')) {
    const flow = getComputedStyle(element).overflowY;
    const taller = !best || element.scrollHeight > best.scrollHeight;
    if ((flow === 'auto' || flow === 'scroll') && taller) best = element;
  }
  window.stepengineScroller = best;
  return [best.scrollHeight, best.clientHeight];
}"""


class Notebook:
    """A page with the notebook `name` of `lab`'s folder, its kernel ready, nothing run yet."""

    def __init__(self, page: Any, lab: Lab, name: str, watch: Watch) -> None:
        self.page, self.lab, self.name, self.watch = page, lab, name, watch
        page.goto(lab.url(name, Path(name).stem), timeout=90_000, wait_until="commit")
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)
        page.evaluate(OPEN)

    def run_all(self, seconds: float = BOOK_SECONDS) -> None:
        self.page.evaluate(RUN, ["notebook:run-all-cells", seconds])
        self.settle()

    def run_cell(self, at: int, seconds: float = CELL_SECONDS) -> None:
        self.page.evaluate("at => { jupyterapp.shell.currentWidget.content.activeCellIndex = at }", at)
        self.page.evaluate(RUN, ["notebook:run-cell", seconds])
        self.settle()

    def run_up_to(self, at: int, seconds: float = BOOK_SECONDS) -> None:
        """Run the cells before cell `at`."""
        self.page.evaluate("at => { jupyterapp.shell.currentWidget.content.activeCellIndex = at }", at)
        self.page.evaluate(RUN, ["notebook:run-all-above", seconds])
        self.settle()

    def run_imports(self) -> None:
        """Import what all cells together import, without running the rest of them."""
        lines = [line for cell in self.cells() if cell["kind"] == "code" for line in cell["source"].splitlines()]
        wanted = "\n".join(line for line in lines if line.startswith(("from ", "import ")))
        assert self.ask(f"exec({wanted!r}, globals())") == "None"

    def settle(self) -> None:
        """Wait until the kernel is idle and the widgets' modules have drawn."""
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(300)

    def ask(self, expression: str) -> str:
        """The repr of a Python expression in the notebook's kernel, without a cell."""
        return str(self.page.evaluate(ASK, expression))

    def cells(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.page.evaluate(CELLS)
        return found

    def check(self) -> None:
        """AssertionError if a cell has raised, unless it is tagged to."""
        for cell in self.cells():
            errors = [(o["ename"], o["evalue"]) for o in cell["outputs"] if o["output_type"] == "error"]
            assert not errors or "raises-exception" in cell["tags"], f"cell {cell['at']} of {self.name}: {errors}"

    def find(self, text: str, kind: str = "code") -> int:
        """The number of the one cell of this kind whose source holds `text`."""
        found = [cell["at"] for cell in self.cells() if cell["kind"] == kind and text in cell["source"]]
        assert len(found) == 1, f"{len(found)} {kind} cells of {self.name} hold {text!r}: {found}"
        return int(found[0])

    def cell(self, at: int) -> Any:
        """What the page shows of cell `at`."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(at)

    def printed(self, at: int) -> str:
        """The text that stands below cell `at` on the page."""
        return str(self.cell(at).locator(".jp-Cell-outputArea").inner_text())

    def type_into(self, at: int, source: str) -> None:
        """Replace the source of cell `at` by typing over it."""
        editor = self.cell(at).locator(".cm-content")
        editor.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)
        assert self.cells()[at]["source"] == source

    def shots(self, folder: Path) -> list[Path]:
        """Pictures of the whole notebook, one screen after another."""
        folder.mkdir(parents=True, exist_ok=True)
        height, view = self.page.evaluate(SCROLLER)
        taken = []
        for number, top in enumerate(range(0, height, view - 40)):
            self.page.evaluate("top => { window.stepengineScroller.scrollTop = top }", top)
            self.page.wait_for_timeout(80)
            taken.append(folder / f"{number:02d}.png")
            self.page.screenshot(path=taken[-1])
        return taken
