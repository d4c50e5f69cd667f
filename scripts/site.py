"""Build the site: every notebook executed, live figures and players, nothing fetched from another host.

    python scripts/site.py [--only NAME ...] [--no-solutions] [-o FOLDER] [--notebooks FOLDER] [--work FOLDER]

A notebook runs again when it, the package or the records it reads have changed; the runs are kept in build/site/.
A cell that fails stops the build with its error. Serve the folder with any file server, or open its index.html.
"""

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "site"
PLAN = "docs/instructors.md"  # it holds answers, and stays with the solutions
DOCUMENTS = ("docs/gptq.md", "docs/glossary.md", "ARCHITECTURE.md")
READ_BY_NOTEBOOKS = ("stepengine", "bench/records", "notebooks/traces", "docs/site/kernel.py")
PLOTLY = "application/vnd.plotly.v1+json"
FIGURE = """<figure class="se-plot" role="{role}" aria-label="{alt}"><div class="se-canvas"></div>
<figcaption class="se-alt">{alt}</figcaption><script type="application/json">{json}</script></figure>"""


class SiteError(Exception):
    """What stopped the build, in a sentence."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the site of the executed series.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these notebooks, such as 02a_paged")
    parser.add_argument("--no-solutions", action="store_true", help="leave the worked solutions out")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "site", metavar="FOLDER")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "site", metavar="FOLDER")
    chosen = parser.parse_args(argv)
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine wait for one another
    try:
        check_output(chosen.output)
        books = find(chosen.notebooks, chosen.only, not chosen.no_solutions)
        runs = {book: executed(book, chosen.notebooks, chosen.work / "runs") for book in books}
        prepare(chosen.work / "source", runs, chosen.notebooks, not chosen.no_solutions)
        render(chosen.work, chosen.output)
    except SiteError as error:
        print(f"make site stopped: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in chosen.output.rglob("*") if file.is_file())
    took = time.monotonic() - began
    print(f"{chosen.output / 'index.html'}: {len(books)} notebooks, {size / 1e6:.0f} MB, {took:.0f} s")
    return 0


def check_output(folder: Path) -> None:
    """A folder that is not a site of ours is not written over."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "searchindex.js").is_file():
        raise SiteError(f"{folder} is not empty and holds no site: name another folder with -o.")


def find(folder: Path, only: Iterable[str] | None, solutions: bool) -> list[Path]:
    """The notebooks to show; those of `only` with their solutions."""
    books = sorted(folder.glob("*.ipynb"))
    for name in only or ():
        if name not in [book.stem for book in books]:
            raise SiteError(f"--only {name} names no notebook; there are {', '.join(book.stem for book in books)}.")
    chosen = [book for book in books if not only or book.stem in set(only)]
    answers = [folder / "solutions" / book.name for book in chosen] if solutions else []
    return chosen + [answer for answer in answers if answer.is_file()]


# -- run ----------------------------------------------------------------------------------------------------------


def executed(book: Path, folder: Path, runs: Path) -> Path:
    """The folder with this notebook's run: run.ipynb and its players. Runs it unless the same has run before."""
    notebook = nbformat.read(book, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    label = book.relative_to(folder).with_suffix("").as_posix().replace("/", "-")
    run = runs / label / fingerprint(notebook)
    if (run / "run.ipynb").is_file():
        return run
    shutil.rmtree(runs / label, ignore_errors=True)
    run.mkdir(parents=True)
    began = time.monotonic()
    print(f"{label}: running", flush=True)
    execute(notebook, book, run, label)
    nbformat.write(notebook, run / "run.ipynb")  # last: only a whole run counts
    print(f"{label}: {time.monotonic() - began:.0f} s", flush=True)
    return run


def fingerprint(notebook: Any) -> str:
    """Of the cells and of everything they read."""
    digest = hashlib.sha256(json.dumps([(cell.cell_type, cell.source) for cell in notebook.cells]).encode())
    for place in READ_BY_NOTEBOOKS:
        files = [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def execute(notebook: Any, book: Path, run: Path, label: str) -> None:
    """Run all cells, with docs/site/kernel.py told to the kernel beforehand, outside of the notebook."""
    code = (PAGES / "kernel.py").read_text(encoding="utf-8")
    code += f"\nsaved = Saved(get_ipython(), {str(run.resolve())!r}, {label!r})\n"
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=50"],
        resources={"metadata": {"path": book.parent}},
    )
    try:
        with client.setup_kernel():
            ask(
                client,
                f"exec(compile({code!r}, 'kernel.py', 'exec'), _stepengine_site := {{'get_ipython': get_ipython}})",
            )
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            ask(client, "_stepengine_site['saved'].finish()")
    except CellExecutionError as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        raise SiteError(f"{book.name}, cell {number} failed; what ran before it is kept.\n{plain}") from error


def ask(client: NotebookClient, code: str) -> None:
    """Run code in the kernel that is no cell: it counts nowhere and leaves no output."""

    async def reply() -> Any:
        return await client.kc.execute(code, silent=True, reply=True, timeout=60)

    content = run_sync(reply)()["content"]
    if content["status"] != "ok":
        raise SiteError(f"docs/site/kernel.py failed in the kernel: {content.get('ename')}: {content.get('evalue')}")


# -- pages --------------------------------------------------------------------------------------------------------


def prepare(source: Path, runs: dict[Path, Path], folder: Path, solutions: bool) -> None:
    """The folder that Sphinx reads: settings, pages, players, one copy of plotly.js. Unchanged files stay untouched."""
    wanted: dict[Path, bytes] = {}
    for file in (*PAGES.glob("*.py"), *(PAGES / "static").iterdir()):
        if file.name != "kernel.py":
            wanted[file.relative_to(PAGES)] = file.read_bytes()
    wanted[Path("static/plotly.min.js")] = plotly_script().encode()
    series, answers = [], []
    for book, run in runs.items():
        place = Path("notebooks") / book.relative_to(folder)
        notebook = nbformat.read(run / "run.ipynb", as_version=4)
        up = "../" * len(place.parts[:-1])
        wanted[place] = nbformat.writes(page(notebook, up)).encode()
        (answers if place.parent.name == "solutions" else series).append((place, notebook))
        for player in run.glob("*.html"):
            wanted[Path("extra/players") / player.name] = bridged(player.read_text(encoding="utf-8")).encode()
    documents = [Path(name) for name in ((PLAN,) if solutions else ()) + DOCUMENTS if (ROOT / name).is_file()]
    wanted |= {name: (ROOT / name).read_bytes() for name in documents}
    wanted |= {name.relative_to(ROOT): name.read_bytes() for name in (ROOT / "docs/images").iterdir()}
    wanted[Path("index.md")] = index(series, [place for place, _ in answers], documents).encode()
    write_all(source, wanted)


def write_all(source: Path, wanted: dict[Path, bytes]) -> None:
    for old in source.rglob("*"):
        if old.is_file() and old.relative_to(source) not in wanted:
            old.unlink()
    for name, content in wanted.items():
        target = source / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def page(notebook: Any, up: str) -> Any:
    """The notebook as Sphinx gets it: figures with their text alternatives, players found from this page."""
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data:
                output.data = {"text/html": figure(data[PLOTLY])}
            elif "text/html" in data:
                output.data = {"text/html": data["text/html"].replace("{{players}}", f"{up}players")}
    return notebook


def figure(drawn: dict[str, Any]) -> str:
    """A Plotly figure as HTML that site.js draws. `layout.meta["alt"]` says in words what it shows."""
    layout = drawn.get("layout", {})
    title = layout.get("title", {}).get("text", "") if isinstance(layout.get("title"), dict) else layout.get("title")
    alt = (layout.get("meta") or {}).get("alt") or re.sub(r"<[^>]+>", "", title or "") or "figure without a description"
    is_operated = bool(drawn.get("frames") or layout.get("sliders") or layout.get("updatemenus"))
    return FIGURE.format(
        role="group" if is_operated else "img",  # what is inside an "img" cannot be reached by keyboard
        alt=html.escape(alt, quote=True),
        json=json.dumps(drawn, ensure_ascii=False).replace("<", "\\u003c"),
    )


def bridged(player: str) -> str:
    """The player's page, which now says how tall it is and follows the theme of the page around it."""
    bridge = (PAGES / "bridge.html").read_text(encoding="utf-8")
    head, closing, tail = player.rpartition("</body>")
    return head + bridge + closing + tail


def index(series: list[tuple[Path, Any]], answers: list[Path], documents: list[Path]) -> str:
    """The landing page: each notebook with its question, and the contents for the sidebar."""
    rows = ["| notebook | its question |", "| --- | --- |"]
    for place, notebook in series:
        first = notebook.cells[0].source if notebook.cells else ""
        title = first.splitlines()[0].lstrip("# ") if first.startswith("# ") else place.stem
        rows.append(f"| [{title}]({place.as_posix()}) | {question(first)} |")
    parts = {"The series": [place for place, _ in series], "To read": documents, "Worked solutions": answers}
    contents = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *(p.as_posix() for p in places), "```"])
        for caption, places in parts.items()
        if places
    ]
    text = (PAGES / "index.md").read_text(encoding="utf-8")
    picture = re.search(r"^!\[.*\]\(docs/images/.*\)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    text = text.replace("{{picture}}", picture[0] if picture else "")
    return text.replace("{{series}}", "\n".join(rows)) + "\n" + "\n\n".join(contents) + "\n"


def question(first_cell: str) -> str:
    """What the paragraph that begins with "The question" asks: its sentences with a question mark."""
    found = re.search(r"\*\*The question\.\*\*(.*?)(?:\n\n|\Z)", first_cell, re.DOTALL)
    asked = re.findall(r"[^.?!]+\?", " ".join(found[1].split())) if found else []
    asked = [sentence.strip().removeprefix("So: ") for sentence in asked]
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in asked).replace("|", "\\|")


def render(work: Path, output: Path) -> None:
    build = ["-q", "-b", "html", "-d", str(work / "doctrees"), str(work / "source"), str(output)]
    if subprocess.run([sys.executable, "-m", "sphinx", *build], stdin=subprocess.DEVNULL).returncode:
        raise SiteError("Sphinx failed and says why above.")
    shutil.rmtree(output / "_sources", ignore_errors=True)  # Sphinx makes the folder even if nothing goes there
    pages = {file.with_suffix(".html") for pattern in ("*.ipynb", "*.md") for file in files(work / "source", pattern)}
    pages |= {file.relative_to("extra") for file in files(work / "source", "*.html")} | {Path("search.html")}
    for page in files(output, "*.html"):  # of an earlier build, and the theme's templates
        if page not in pages:
            (output / page).unlink()


def files(folder: Path, pattern: str) -> list[Path]:
    """Paths below `folder`, relative to it."""
    return [file.relative_to(folder) for file in folder.rglob(pattern)]


if __name__ == "__main__":
    sys.exit(main())
