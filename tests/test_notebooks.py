"The committed notebooks: small, clean, executed, and re-executing one gives the figures that were committed."
import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import snapshot

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
# The results as committed, and two that draw what their own module computes; none of them needs files from outside.
AGAIN = ("00_leakage", "05d_calibration", "06_results")
PLOTLY = "application/vnd.plotly.v1+json"


def _code(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def _figures(cells: list[dict]) -> list[dict]:
    "The plotly figures among the outputs of some cells."
    return [o["data"][PLOTLY] for c in cells for o in c["outputs"] if PLOTLY in o.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_500_000
    outputs = [o for c in _code(path) for o in c["outputs"]]
    assert not [o["evalue"] for o in outputs if o["output_type"] == "error"]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"], "a warning or a progress bar"
    local = re.findall(r"(?<![\w./])/(?:root|home|tmp|work|Users|private|var/folders)/[\w./-]*|[A-Z]:\\\\+Users", text)
    assert not local, f"paths of one machine: {local[:3]}"
    assert max((len(json.dumps(f)) for f in _figures(_code(path))), default=0) < 200_000, "a figure is too large"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_title_and_last_section(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"]).splitlines()
    assert first[0].startswith("# ") and any(line.startswith("> ") for line in first)
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    heads = re.findall(r"^## .*", prose, re.M)
    assert "break" in heads[-1].lower(), f"the last section must list what would break this, and is {heads[-1]!r}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_are_titled(path):
    for layout in (f["layout"] for f in _figures(_code(path))):
        title = layout.get("title", {}).get("text")
        assert title, "a figure without a title"
        # A scale of names, such as models, needs no title; the other one does.
        axes = [v for k, v in layout.items() if re.fullmatch(r"[xy]axis\d*", k) and v.get("visible", True)]
        assert not axes or any((a.get("title") or {}).get("text") for a in axes), f"{title}: no axis has a title"


def _plain(value):
    "A figure's data with typed arrays as lists."
    if isinstance(value, dict) and set(value) >= {"dtype", "bdata"}:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
        shape = [int(n) for n in str(value["shape"]).split(",")] if "shape" in value else [-1]
        return array.reshape(shape).tolist()
    if isinstance(value, dict): return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _difference(one, other, where: str = "") -> str | None:
    "Where two figures' data first differ; numbers may by 1e-9 of their size."
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) != set(other): return f"{where}: keys {sorted(set(one) ^ set(other))}"
        return next((d for k in one if (d := _difference(one[k], other[k], f"{where}.{k}"))), None)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other): return f"{where}: {len(one)} and {len(other)} entries"
        return next((d for k, pair in enumerate(zip(one, other)) if (d := _difference(*pair, f"{where}[{k}]"))), None)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    close = numbers and (math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (one != one and other != other))
    return None if one == other or close else f"{where}: {one!r} and {other!r}"


@pytest.fixture(scope="module")
def executed():
    "Notebooks run from the top in `nbs`, their outputs kept in memory; no file of the checkout changes."
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    watched = [ROOT / "nbs", ROOT / "results", ROOT / "cryptopredict"]
    before = [snapshot(folder, times=False) for folder in watched]

    def run(name: str) -> list[dict]:
        notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
        place = {"metadata": {"path": ROOT / "nbs"}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
        return [c for c in json.loads(nbformat.writes(notebook))["cells"] if c["cell_type"] == "code"]
    yield run
    assert [snapshot(folder, times=False) for folder in watched] == before, "executing a notebook changed the checkout"


@pytest.mark.parametrize("name", AGAIN)
def test_figures_come_out_again(executed, name):
    committed = _figures(_code(ROOT / "nbs" / f"{name}.ipynb"))
    made = _figures(executed(name))
    assert len(made) == len(committed) > 0
    for k, (one, other) in enumerate(zip(made, committed)):
        title = other["layout"]["title"]["text"]
        assert one["layout"]["title"]["text"] == title
        assert not (where := _difference(_plain(one["data"]), _plain(other["data"]))), f"figure {k}, {title!r}: {where}"


def test_a_changed_figure_would_be_seen():
    figure = next(f for f in _figures(_code(ROOT / "nbs" / "06_results.ipynb")) if f["data"])
    one, other = _plain(figure["data"]), _plain(figure["data"])
    assert _difference(one, other) is None
    number = next(k for t in other for k in ("x", "y") if any(isinstance(v, float) for v in t.get(k, [])))
    trace = next(t for t in other if any(isinstance(v, float) for v in t.get(number, [])))
    at = next(k for k, v in enumerate(trace[number]) if isinstance(v, float))
    trace[number][at] *= 1 + 1e-7
    assert _difference(one, other).startswith("["), "one number changed by 1e-7"
