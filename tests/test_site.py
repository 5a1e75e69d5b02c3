"The site: the pages that nbdev_proc_nbs writes and, where Quarto is installed, the rendered HTML."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ENV, PLOTLY, ROOT

COLUMNS = 100  # a longer signature line would scroll


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder `_proc` that nbdev_proc_nbs writes in a copy of the checkout."
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "nbs", folder / "nbs", symlinks=True)
    shutil.copytree(ROOT / "results", folder / "results")
    for name in ("settings.ini", "README.md", "_quarto.yml"): shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "cryptopredict", folder / "cryptopredict", ignore=shutil.ignore_patterns("__pycache__"))
    tools = folder / "bin"  # nbdev looks for Quarto before it processes anything, though only rendering needs it
    tools.mkdir()
    if not shutil.which("quarto"):
        (tools / "quarto").write_text("#!/bin/sh\nexit 0\n")
        (tools / "quarto").chmod(0o755)
    env = ENV | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    argv = [sys.executable, "-c", "from nbdev.quarto import nbdev_proc_nbs; nbdev_proc_nbs()"]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert not re.search("Error in notebook|Traceback|Found cells containing imports", printed), printed
    return folder / "_proc"


@pytest.fixture(scope="module")
def pages(site) -> dict[str, list[dict]]:
    "Cells of each processed notebook, with their sources as text."
    made = {p.stem: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted(site.glob("[0-9]*.ipynb"))}
    return {name: [c | {"source": "".join(c["source"])} for c in cells] for name, cells in made.items()}


def documentation(cells: list[dict]) -> list[str]:
    "The Markdown that documents the exported definitions of a page."
    shown = [c for c in cells if c["cell_type"] == "code" and "show_doc(" in c["source"]]
    return ["".join(o["data"]["text/markdown"]) for c in shown for o in c["outputs"] if "text/markdown" in o.get("data", {})]


def test_every_notebook_is_a_page_with_title_subtitle_and_opening_prose(pages, notebooks):
    assert set(pages) == set(notebooks)
    found = []
    for name, cells in pages.items():
        title, _, about = "".join(notebooks[name]["cells"][0]["source"]).partition("\n")
        head = cells[0]["source"].replace("\n  ", " ").replace("''", "'")
        if title.removeprefix("# ") not in head or about.removeprefix("> ").strip() not in head: found.append(f"{name}: {head}")
        prose = next(c["source"] for c in cells[1:] if c["cell_type"] == "markdown" and not c["source"].startswith("<!--"))
        first = "".join(notebooks[name]["cells"][1]["source"])
        if first.split()[:4] != prose.split()[:4]: found.append(f"{name} begins with {prose[:60]!r}")
    assert not found


def test_the_home_page_has_one_title(site):
    home = (site / "index.qmd").read_text(encoding="utf-8")
    assert "{{< include ../README.md >}}" in home and not re.search(r"^title:|^# ", home, re.M)
    readme = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(re.findall(r"^# ", readme, re.M)) == 1
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert pictures and all((site / name).exists() and (ROOT / name).exists() for name in pictures)


def test_links_between_pages_are_relative_and_have_targets(pages, site):
    targets = {re.search(r"output-file: (\S+)", cells[0]["source"]).group(1) for cells in pages.values()} | {"index.html"}
    found, counted = [], 0
    for name, cells in pages.items():
        texts = [c["source"] for c in cells if c["cell_type"] == "markdown"] + documentation(cells)
        for link in (m for text in texts for m in re.findall(r"(?<!!)\]\(([^)\s]+)\)", text)):
            if link.startswith(("http", "#")): continue
            counted += 1
            if link.partition("#")[0] not in targets: found.append(f"{name}: {link}")
    assert not found and counted > 100


def test_no_page_fetches_anything_from_the_network(pages, site):
    found = []
    for name, cells in pages.items():
        text = json.dumps(cells)
        found += [f"{name}: {hit}" for hit in re.findall(r"cdn\.\w+|cdnjs\.\w+|unpkg\.com|\.invalid", text)]
        shown = [str(o.get("data", {}).get("text/html")) for c in cells for o in c.get("outputs", [])]
        found += [f"{name}: a script" for html in shown if "<script" in html]
    assert not found
    config = (site / "_quarto.yml").read_text() + (site / "site.js").read_text()
    assert "http" not in config and "html-math-method: mathml" in config


def test_all_figures_are_drawn_by_one_local_copy_of_plotly(pages, site):
    drawn = 0
    for name, cells in pages.items():
        for output in (o for c in cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})):
            drawn += 1
            assert 'class="plotly-figure"' in "".join(output["data"]["text/html"]), name
    assert drawn >= 30 and (site / "plotly.min.js").stat().st_size > 1_000_000
    assert "resources: [plotly.min.js, site.js]" in (site / "_quarto.yml").read_text()


def test_signatures_fit_the_column_and_hold_no_links(pages):
    found, counted = [], 0
    for name, cells in pages.items():
        for doc in documentation(cells):
            counted += 1
            call = re.search(r"```python\n(.*?)\n```", doc, re.S)
            lines = call.group(1).splitlines() if call else []
            if not call or "](" in call.group(1) or max(map(len, lines)) > COLUMNS: found.append(f"{name}: {doc[:900]}")
    assert not found and counted > 200


def test_parameters_are_described_in_tables(pages):
    described = [doc for cells in pages.values() for doc in documentation(cells) if re.search(r"^\| Name \| Type \|", doc, re.M)]
    make_labels = next(d for d in described if d.startswith("### make_labels"))
    assert len(described) > 150 and "| `` threshold `` | `float` | `` 0.05 `` |" in make_labels


def test_definitions_are_documented_in_the_order_of_the_source(pages):
    heads = [re.match(r"### (\S+)", doc).group(1) for doc in documentation(pages["02_labels"])]
    source = (ROOT / "cryptopredict" / "labels.py").read_text()
    places = [re.search(rf"^(def|class) {name}\b", source, re.M).start() for name in heads]
    assert places == sorted(places) and len(places) >= 5


def test_cells_that_only_check_are_folded(pages):
    silent = [(name, c["source"]) for name, cells in pages.items() for c in cells
              if c["cell_type"] == "code" and not c.get("outputs")]
    is_check = re.compile(r"^\s*(assert\b|test_\w+\(|(with )?ExceptionExpected)", re.M)
    checks = [(name, text) for name, text in silent if is_check.search(text)]
    assert checks and not [(name, text) for name, text in checks if "code-fold: true" not in text]


def test_navigation_is_grouped_and_lists_every_page_once(site, notebooks):
    text = (site / "sidebar.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"- (\w+)\.ipynb", text)) == sorted(notebooks)
    assert re.findall(r"^      - section: (\w+)", text, re.M) == ["Learn", "Results", "Reference"]


@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed")
def test_rendered_pages_have_one_title_their_prose_and_a_dark_theme(site, notebooks):
    done = subprocess.run(["quarto", "render", "--no-cache"], cwd=site, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    docs = site / "_docs"
    assert (docs / "plotly.min.js").exists() and (docs / "site.js").exists()
    letters = lambda text: re.sub("[^a-z]", "", text.lower())
    for name, notebook in notebooks.items():
        page = (docs / f"{name.partition('_')[2]}.html").read_text(encoding="utf-8")
        main = page.partition("<main")[2].partition("</main>")[0]
        first = re.sub(r"\]\(.*?\)|\$.*?\$", "", "".join(notebook["cells"][1]["source"]))
        assert letters(first)[:30] in letters(re.sub(r"<[^>]+>", " ", main)), name
        assert len(re.findall(r"<h1\b", main)) == 1, name
        assert not re.search(r'(?:src|href)="https?://[^"]*(?:cdn|unpkg|fonts\.googleapis)', page), name
        assert "color-scheme" in page, name
    home = (docs / "index.html").read_text(encoding="utf-8").partition("<main")[2].partition("</main>")[0]
    assert len(re.findall(r"<h1\b", home)) == 1 and not re.search(r'href="[^"]*\.ipynb', home)
