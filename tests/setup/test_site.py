"""The site: a small notebook becomes a page with a live figure and a live player, and nothing comes from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("sphinx", reason="needs the packages of the site; `make site` and `make test` install them")
pytest.importorskip("myst_nb", reason="needs the packages of the site; `make site` and `make test` install them")

from tests.setup.conftest import load_script  # noqa: E402

RUN = """from stepengine import LLM, SamplingParams
from stepengine.lesson import Predictions, show
from stepengine.viz.figures import step_time
from stepengine.viz.player import StepPlayer
from stepengine.viz.template import new_figure

guesses = Predictions()
llm = LLM("tiny-random", stage=2, max_num_seqs=2, max_model_len=64, num_blocks=16, trace=True)
_ = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))"""
FIGURE = """figure = new_figure("The finding", "units", 'A <bar> of "three" & more', height=200)
figure.add_bar(x=[1, 2], y=[3, 4])
figure.show()"""
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """scripts/site.py; it runs a notebook again for changed cells only, whoever edits the package meanwhile."""
    script = load_script("site")
    script.READ_BY_NOTEBOOKS = ("docs/site/kernel.py",)
    return script


def _book(folder: Path, *sources: str, name: str = "00_small") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    head = new_markdown_cell("# 00 · A small one\n\n**The question.** It is short. What does it cost, in dollars ($5)?")
    colab = new_code_cell("secret_colab = 1", metadata={"tags": ["colab"]})
    nbformat.write(new_notebook(cells=[head, colab, *map(new_code_cell, sources)]), folder / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def built(site: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("site")
    books = _book(home / "books", RUN, FIGURE, "StepPlayer(llm.trace, step=1)", 'guesses.ask("k", "How many?")')
    _book(books / "solutions", "print('the worked one')")
    assert site.main(["--notebooks", str(books), "-o", str(home / "out"), "--work", str(home / "work")]) == 0
    return home


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def all(self, tag: str, **where: str) -> list[dict[str, str]]:
        found = [a for name, a in self.tags if name == tag]
        return [a for a in found if all(value in a.get(key.rstrip("_"), "") for key, value in where.items())]


def test_no_page_fetches_anything_from_elsewhere(built: Path) -> None:
    pages, out = sorted((built / "out").rglob("*.html")), built / "out"
    assert len(pages) >= 8
    for path in pages:
        for tag, attributes in _Page(path).tags:
            address = attributes.get(FETCHED.get(tag, ""), "")
            if not address or address.startswith(("data:", "#")):
                continue
            assert not re.match(r"(\w+:)?//", address), f"{path.name} fetches {address}"
            if attributes.get("rel") not in ("canonical",):
                assert (path.parent / address.split("?")[0].split("#")[0]).exists(), f"{path.name} lacks {address}"
    for style in out.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text), f"{style.name} fetches from elsewhere"


def test_the_player_stands_in_a_frame_with_a_title(built: Path) -> None:
    page = built / "out" / "notebooks" / "00_small.html"
    (frame,) = _Page(page).all("iframe")
    assert "StepPlayer(2 requests" in frame["title"]
    file = (page.parent / frame["src"]).resolve()
    text = file.read_text(encoding="utf-8")
    assert "jpThemeLight" in text and "postMessage" in text and json.loads(_traits(text))["step"] == 1


def _traits(text: str) -> str:
    (found,) = re.findall(r'<script id="traits" type="application/json">(.*?)</script>', text, re.DOTALL)
    return str(found)


def test_a_figure_has_its_data_and_its_text_alternative(built: Path) -> None:
    path = built / "out" / "notebooks" / "00_small.html"
    (figure,) = _Page(path).all("figure", class_="se-plot")
    assert figure["aria-label"] == 'A <bar> of "three" & more' and figure["role"] == "img"
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert json.loads(data)["data"][0]["type"] == "bar"
    scripts = list((built / "out").rglob("plotly*.js"))
    assert len(scripts) == 1 and scripts[0].stat().st_size > 1_000_000


def test_other_widgets_say_where_they_live(built: Path) -> None:
    text = (built / "out" / "notebooks" / "00_small.html").read_text(encoding="utf-8")
    assert "Predict(" in text and "Live in JupyterLab." in text and "Predict (k): How many?" in text
    assert "secret_colab" not in text


def test_the_landing_page_lists_the_series_with_its_questions(built: Path) -> None:
    page = _Page(built / "out" / "index.html")
    assert page.all("a", href="notebooks/00_small.html") and page.all("a", href="notebooks/solutions/00_small.html")
    assert "What does it cost, in dollars ($5)?" in (built / "out" / "index.html").read_text(encoding="utf-8")


def test_it_can_be_searched(built: Path) -> None:
    text = (built / "out" / "searchindex.js").read_text(encoding="utf-8")
    assert "notebooks/00_small" in text and "dollar" in text


def test_a_second_build_runs_nothing(
    site: ModuleType, built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it ran again")

    monkeypatch.setattr(site, "execute", never)
    arguments = ["--notebooks", str(built / "books"), "-o", str(built / "out"), "--work", str(built / "work")]
    assert site.main(arguments) == 0
    assert "2 notebooks" in capsys.readouterr().out
    assert site.main([*arguments, "--no-solutions"]) == 0
    assert not (built / "out" / "notebooks" / "solutions" / "00_small.html").exists()
    with pytest.raises(AssertionError, match="ran again"):
        _book(built / "books", RUN + "\nmore = 1")
        site.main(arguments)


def test_a_change_of_the_package_means_another_run(
    site: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "READ_BY_NOTEBOOKS", ("package", "absent"))
    (tmp_path / "package").mkdir()
    seen = set()
    for content in ("a", "b", "a"):
        (tmp_path / "package" / "part.py").write_text(content)
        seen.add(site.fingerprint(new_notebook(cells=[new_code_cell("1")])))
    assert len(seen) == 2


def test_a_failing_cell_stops_the_build_with_its_error(
    site: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = _book(tmp_path / "books", "1 / 0")
    arguments = ["--notebooks", str(books), "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert site.main(arguments) == 1
    said = capsys.readouterr().err
    assert "00_small.ipynb, cell 1 failed" in said and "ZeroDivisionError" in said and "\x1b" not in said
    assert not (tmp_path / "out").exists()
    assert site.main(arguments) == 1, "a run that failed is not kept"


def test_a_folder_that_is_no_site_is_not_written_over(
    site: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert site.main(["-o", str(tmp_path)]) == 1
    assert "holds no site" in capsys.readouterr().err


def test_an_unknown_notebook_is_named(site: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.main(["--only", "02z", "-o", str(tmp_path / "out")]) == 1
    assert "--only 02z names no notebook; there are 00_naive" in capsys.readouterr().err


def test_a_figure_that_is_operated_is_no_single_picture(site: ModuleType) -> None:
    assert 'role="group"' in site.figure({"data": [], "layout": {"sliders": [{}], "title": {"text": "<b>T</b>"}}})
    assert 'aria-label="T"' in site.figure({"data": [], "layout": {"title": {"text": "<b>T</b>"}}})
