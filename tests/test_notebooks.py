"The committed notebooks: small, clean, with an early picture and titled figures, and executed as committed."
import base64
import json
import math
import re

import numpy as np
from helpers import DATA, PLOTLY

# These train networks, whose last digits depend on the processor: only words and the structure of outputs are compared.
TRAINED = {"04_mhsa", "04a_multitask", "04d_bptt", "05_tbptt_trainer", "05e_network", "05h_walkforward", "05i_track", "06a_cli"}
LOCAL_PATH = re.compile(r"(?<![\w./])/(?:root|home|tmp|work|Users|private|var/folders)/[\w./-]*|[A-Z]:\\\\+Users")


def text_of(cell: dict) -> str: return "".join(cell["source"])


def code(notebook: dict) -> list[dict]: return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def figures(cells: list[dict]) -> list[dict]:
    "The plotly figures among the outputs of some cells."
    return [o["data"][PLOTLY] for c in cells for o in c["outputs"] if PLOTLY in o.get("data", {})]


def test_notebooks_are_small_and_clean(notebooks):
    found = []
    for name, notebook in notebooks.items():
        text = json.dumps(notebook, ensure_ascii=False)
        outputs = [o for c in code(notebook) for o in c["outputs"]]
        if len(text.encode()) > 1_500_000: found.append(f"{name}: over 1.5 MB")
        if any(len(json.dumps(f)) > 200_000 for f in figures(code(notebook))): found.append(f"{name}: a figure over 200 KB")
        found += [f"{name}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
        found += [f"{name}: a warning or progress bar {o['text']}" for o in outputs if o.get("name") == "stderr"]
        found += [f"{name}: a local path {path}" for path in LOCAL_PATH.findall(text)[:3]]
    assert not found


def test_a_notebook_opens_with_title_prose_and_a_picture_or_table(notebooks):
    found = []
    for name, notebook in notebooks.items():
        cells = notebook["cells"]
        if not re.fullmatch(r"# .+\n> .+", text_of(cells[0]).strip()): found.append(f"{name}: cell 0 is not title and subtitle")
        if cells[1]["cell_type"] != "markdown": found.append(f"{name}: no prose in cell 1")
        shown = next((k for k, c in enumerate(cells) if c.get("outputs")), len(cells))
        if shown > max(5, .15 * len(cells)): found.append(f"{name}: the first output is in cell {shown} of {len(cells)}")
    assert not found


def test_a_notebook_ends_with_what_would_break_it(notebooks):
    last = {name: re.findall(r"^## .*", "\n".join(text_of(c) for c in notebook["cells"] if c["cell_type"] == "markdown"), re.M)
            for name, notebook in notebooks.items()}
    assert {name for name, heads in last.items() if not heads or heads[-1] != "## What would break this"} == set()


def test_figures_have_titles_and_axis_titles(notebooks):
    found = []
    for name, notebook in notebooks.items():
        for layout in (f["layout"] for f in figures(code(notebook))):
            title = (layout.get("title") or {}).get("text")
            # An axis of names, such as models, needs no title; the other axis does.
            axes = [v for k, v in layout.items() if re.fullmatch(r"[xy]axis\d*", k) and v.get("visible", True)]
            titled = not axes or any((a.get("title") or {}).get("text") for a in axes)
            if not title or not titled: found.append(f"{name}, {title}: no title of the figure or of an axis")
    assert not found


# --- execution changes no output ------------------------------------------------------------------------------------------


def plain(value):
    "The data of a figure with typed arrays as lists."
    if isinstance(value, dict) and set(value) >= {"dtype", "bdata"}:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
        shape = [int(n) for n in str(value["shape"]).split(",")] if "shape" in value else [-1]
        return array.reshape(shape).tolist()
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def difference(one, other, exact: bool = True, where: str = "") -> str | None:
    "The first place where two outputs differ; numbers by more than 1e-6 of their size, and only if `exact`."
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) != set(other): return f"{where}: keys {sorted(set(one) ^ set(other))}"
        return next((d for k in one if (d := difference(one[k], other[k], exact, f"{where}.{k}"))), None)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other): return f"{where}: {len(one)} and {len(other)} entries"
        return next((d for k, pair in enumerate(zip(one, other)) if (d := difference(*pair, exact, f"{where}[{k}]"))), None)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    close = numbers and (not exact or math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9) or (one != one and other != other))
    return None if one == other or close else f"{where}: {one!r} and {other!r}"


def tokens(text: str, exact: bool) -> list:
    "Words and numbers of printed text; unless `exact`, words only."
    found = re.split(r"(?<![\w.])([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?![\w.])", text)
    if exact: return [float(t) if k % 2 else t.split() for k, t in enumerate(found)]
    return re.sub(r"[^A-Za-z]+", " ", re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", " ", text)).split()


def shown(outputs: list[dict], exact: bool) -> list:
    "What a cell shows, comparable: figures as data, tables and text as words and numbers; text that was printed as one."
    found, printed = [], "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    for data in (o.get("data", {}) for o in outputs):
        # HTML first: the plain text of a table depends on the width of the terminal.
        html = re.sub(r"<style.*?</style>|<[^>]+>", " ", "".join(data.get("text/html") or ""), flags=re.S)
        text = html or "".join(data.get("text/markdown") or data.get("text/plain") or "")
        if PLOTLY in data: found.append(plain(data[PLOTLY]["data"]))
        elif text: found.append(tokens(text, exact))
    return [tokens(printed, exact), *found]


def test_execution_changes_no_output(notebooks, executed):
    assert {p.stem for p in executed.glob("*.json")} == set(notebooks)
    found, compared = [], 0
    for name, notebook in notebooks.items():
        cells = code(notebook)
        if not DATA.is_dir() and any("shared/data" in text_of(c) for c in cells): continue  # other data, other outputs
        made = json.loads((executed / f"{name}.json").read_text())
        assert len(made) == len(cells), name
        exact = name not in TRAINED
        for k, (cell, outputs) in enumerate(zip(cells, made)):
            if re.search(r"^#\|\s*(gpu|slow|eval: *false)", text_of(cell), re.M): continue
            compared += 1
            if where := difference(shown(outputs, exact), shown(cell["outputs"], exact), exact):
                found.append(f"{name}, code cell {k}: {where}; execute the notebook and commit it")
    assert not found and compared > 500


def test_a_changed_number_is_found(notebooks):
    figure = next(f for f in figures(code(notebooks["06_results"])) if f["data"])
    one, other = plain(figure["data"]), plain(figure["data"])
    assert difference(one, other) is None
    key, trace = next((k, t) for t in other for k in ("x", "y") if any(isinstance(v, float) for v in t.get(k, [])))
    at = next(k for k, v in enumerate(trace[key]) if isinstance(v, float))
    trace[key][at] *= 1 + 1e-5
    assert difference(one, other).startswith("["), "one number changed by 1e-5"
    assert difference(tokens("loss 1.25 of 3", True), tokens("loss 1.26 of 3", True)) and tokens("a 1.5 b", False) == ["a", "b"]
