"Hints from reading source code: what each rule must find and must leave alone, and files of every kind."
import ast
import json
from pathlib import Path

import pytest

from cryptopredict import hints
from cryptopredict.hints import all_hints, lint


def expression(text: str) -> ast.expr:
    "The syntax tree of an expression."
    return ast.parse(text, mode="eval").body


def matches(rule, source: str) -> list[str]:
    "Names of the calls for which a rule holds."
    tree = ast.parse(source)
    return [hints.call_name(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and rule(n, hints.survey_source(tree))]


# --- reading a call -------------------------------------------------------------------------------------------------------


def test_a_chain_is_named_from_its_end():
    assert hints.call_chain(expression("df['x'].rolling(24).mean()")) == ["mean", "rolling", "df"]


@pytest.mark.parametrize("text, name", [("x.close.shift(1)", "shift"), ("flip(x)", "flip"), ("x.close", "close"), ("f(x)(y)", ""),
                                        ("3", "")])
def test_the_last_name_of_a_call(text, name):
    assert hints.call_name(expression(text)) == name


@pytest.mark.parametrize("text, value", [("f(x)", None), ("f(x, 5)", 5), ("f(cv=False)", False), ("f(cv=n)", ...),
                                         ("f(**o)", ...)])
def test_the_value_of_an_argument(text, value):
    assert hints.argument_value(expression(text), "cv", 1) is value


@pytest.mark.parametrize("text", ["-3", "-n", "-24 * days", "days * -1", "[1, -2]", "BACK"])
def test_negative_numbers(text):
    assert hints.is_negative(expression(text), {"BACK"})


@pytest.mark.parametrize("text", ["3", "n", "2 - 1", "-BACK", "-1 * -1", "- -3"])
def test_numbers_that_are_not_known_to_be_negative(text):
    assert not hints.is_negative(expression(text), {"BACK"})


@pytest.mark.parametrize("text, rows", [("x[3]", "3"), ("x[:n, 0]", ":n"), ("x.y", None)])
def test_what_selects_rows(text, rows):
    selector = hints.row_selector(expression(text))
    assert (selector and ast.unparse(selector)) == rows


# --- what surrounds a call ------------------------------------------------------------------------------------------------

SURVEY = hints.survey_source(ast.parse("""
BACK, r = 1, 2
STEP: int = -24
w = x.rolling(24)
for i, (j, k) in pairs: X.iloc[:i, 0]
text[:3], KFold(5), text.split(), folds.split(X), x.loc[3:], x.iloc[:, :2], [m for m in (1, -1)]
"""))


def test_a_survey_knows_negative_names_windows_loops_and_splits():
    assert (SURVEY.negative, SURVEY.windows, SURVEY.loops) == ({"STEP", "m"}, {"w"}, {"i", "j", "k", "m"})
    assert {ast.unparse(n) for n in SURVEY.splits} == {"KFold(5)", "folds.split(X)", "X.iloc[:i, 0]"}


def test_the_module_encloses_every_node():
    tree = ast.parse("y = f(x.sort_index()['a'].cumsum().max())")
    sort = next(n for n in ast.walk(tree) if hints.call_name(n) == "sort_index" and isinstance(n, ast.Call))
    assert hints.applied_names(sort, hints.survey_source(tree)) == {"cumsum", "max"}
    assert list(hints.enclosing_nodes(sort, hints.survey_source(tree)))[-1] is tree


# --- statistics of all rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, partial", [
    *((text, True) for text in ("x.rolling(9)", "x[:n]", "x.iloc[:n, 0]", "X_train", "X[train]", "x.head(9)", "fold.refit")),
    *((text, False) for text in ("x", "x[n:]", "x[:, :n]", "df['a']", "x.shift(1)")),
])
def test_windows_and_training_rows_are_not_all_rows(text, partial):
    assert hints.is_partial(expression(text), SURVEY) == partial


def test_module_calls_differ_from_method_calls():
    assert matches(lambda call, code: hints.is_module_call(call), "np.mean(x), x.mean(), mean(x)") == ["mean"]


@pytest.mark.parametrize("source, found", [
    ("z = (x - x.mean()) / x.std()", ["std", "mean"]), ("mu, sd = np.mean(x), np.std(x, axis=0)", ["mean", "std"]),
    ("model.fit(x / x.std())", ["std"]), ("y = x.clip(x.quantile(.01), np.quantile(x, .99))", ["quantile", "quantile"]),
    *((source, []) for source in (
        "z = (x - x.rolling(9).mean()) / x.expanding().std()", "assert x.max() < x[0]", "m = df.mean(axis=1)",
        "mu = x_train.mean()", "mu = x.iloc[:n].mean()", "w = x.rolling(9)\nm = w.mean()", "print(x / x.mean())",
        "z = x.rolling(9).apply(lambda w: (w[-1] - w.mean()) / w.std())", "h = h.mean(-1)", "h = h.mean(dim=1)")),
])
def test_statistics_of_all_rows_are_found(source, found):
    assert matches(hints.uses_all_rows, source) == found


# --- rules for single calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [
    "s.fit(X)\nX.iloc[:9]", "s.fit(X)\na, b = X[:n], X[n:]", "s.fit(X)\nfolds = TimeSeriesSplit(5)", "cut(s.fit(X).iloc[:n])",
    "X = s.fit(X)\na, b = train_test_split(X)", "X = s.fit(X)\nfor a, b in folds.split(X): pass",
])
def test_a_fit_before_the_split_is_found(source):
    assert "fit" in matches(hints.fits_before_split, source)


@pytest.mark.parametrize("source", [
    "a, b = train_test_split(X)\ns.fit(a)\ncross_val_score(m, a)", "s.fit(X_train)\nX.iloc[:n]", "s.fit(X)",
    "def f(X): s.fit(X)\nX.iloc[:n]", "s.fit(X)\n'a b'.split()",
])
def test_a_fit_on_training_rows_gets_no_hint(source):
    assert "fit" not in matches(hints.fits_before_split, source)


def test_negative_steps_are_found():
    source = "K = -2; a.shift(-1), b.shift(1), c.diff(periods=-n), np.roll(x, K), np.roll(x, 1)"
    assert matches(hints.steps_back, source) == ["shift", "diff", "roll"]


@pytest.mark.parametrize("arguments, unmasked", [
    ("", True), (", is_causal=False", True), (", attn_mask=None", True), (", mask", False), (", **o", False),
    (", is_causal=True", False), (", is_causal=c", False), (", attn_mask=m, is_causal=False", False),
])
def test_attention_needs_a_mask(arguments, unmasked):
    assert bool(matches(hints.is_unmasked, f"scaled_dot_product_attention(q, k, v{arguments})")) == unmasked


@pytest.mark.parametrize("what, wide", [("'mean'", True), ("f", True), ("'cumsum'", False), ("lambda s: s.shift(1)", False)])
def test_a_transform_may_only_run_forward(what, wide):
    assert ("transform" in matches(hints.is_group_wide, f"g = df.groupby('k').x.transform({what})")) == wide


def test_honest_names_and_keywords_are_in_no_list():
    honest = {*hints.FORWARD, *hints.STATISTICS.split(), "TimeSeriesSplit", "walk_forward"}
    assert not set(" ".join(hints.ALWAYS).split()) & honest
    honest = {("center", False), ("direction", "backward"), ("method", "ffill"), ("bidirectional", False)}
    assert not set(hints.KEYWORDS) & honest


def test_a_call_gets_hints_for_its_name_and_its_keywords():
    call = expression("x.diff(-1, center=True, other=True)")
    found = hints.call_hints(call, hints.survey_source(ast.Module([call], [])))
    assert [hint.split(":")[0] for hint in found] == ["diff", "center=True"]


@pytest.mark.parametrize("text, found", [
    ("x[::-1]", ["[::-1]"]), ("x[i + 1]", ["[i + 1]"]), ("x[0, i + n]", ["[i + n]"]), ("x[n + 1]", []), ("x[i - 1]", []),
    ("x[i + j]", []), ("x[i + '_']", []),
])
def test_a_row_after_that_of_the_loop_is_found(text, found):
    assert [hint.split(": ")[0] for hint in hints.index_hints(expression(text), SURVEY)] == found  # its loops run over i, j, k, m


# --- all rules ------------------------------------------------------------------------------------------------------------

PLANTED = {  # the last line must get the hint
    "shift": ["y = df.close.shift(-1)", "y = df.close.shift(periods=-24)", "H = -24\ny = x.shift(H)", "y = x.shift(-n)",
              "y = x.shift(-24 * days)", "y = (df.close\n    .pct_change()\n    .shift(-1))"],
    "diff": ["y = x.diff(-1)"], "pct_change": ["y = x.pct_change(-h)"],
    "roll": ["y = np.roll(x, -1)", "y = np.roll(x, shift=-k)"],
    "bfill": ["x = x.bfill()"], "backfill": ["x = x.backfill()"], "method='bfill'": ["x = x.fillna(method='bfill')"],
    "method='nearest'": ["x = x.reindex(grid, method='nearest')"],
    "direction='forward'": ["z = pd.merge_asof(x, y, on='t', direction='forward')"],
    "direction='nearest'": ["z = pd.merge_asof(x, y, direction='nearest')"],
    "center=True": ["m = x.rolling(24, center=True).mean()"], "interpolate": ["x = x.interpolate('time')"],
    "fit": ["a, b = train_test_split(s.fit(X), shuffle=False)"],
    "[::-1]": ["y = x[::-1].cumsum()", "y = x.iloc[::-1]"], "flip": ["y = np.flip(x)"],
    "sort_index": ["y = x.sort_index(ascending=False).cumsum()"],
    "sort_values": ["y = df.sort_values('t', ascending=False).close.rolling(9).mean()"],
    "train_test_split": ["a, b = train_test_split(X)"], "KFold": ["cv = KFold(5, shuffle=True)"],
    "StratifiedKFold": ["cv = StratifiedKFold(shuffle=True)"], "ShuffleSplit": ["cv = ShuffleSplit(5)"],
    "cross_val_score": ["s = cross_val_score(model, X, y)", "s = cross_val_score(model, X, y, cv=5)"],
    "cross_val_predict": ["s = cross_val_predict(model, X, y, cv=3)"], "GridSearchCV": ["g = GridSearchCV(model, grid)"],
    "mean": ["z = x - x.mean()", "mu = x.mean()", "def f(x):\n    return x - np.mean(x)"],
    "std": ["z = (x - x.mean()) / x.std()"],  # once per line
    "max": ["z = x / x.max()"], "median": ["x = x.fillna(x.median())"], "quantile": ["y = x > x.quantile(.9)"],
    "percentile": ["top = np.percentile(x, 99)"], "rank": ["def f(x):\n    return x.rank(pct=True)"],
    "transform": ["m = df.groupby('month').x.transform('mean')"], "qcut": ["b = pd.qcut(x, 10)"], "cut": ["b = pd.cut(x, 10)"],
    "resample": ["d = x.resample('1D').last()", "d = x.resample('1D', label='left').last()"],
    "filtfilt": ["y = filtfilt(b, a, x)"], "savgol_filter": ["y = scipy.signal.savgol_filter(x, 9, 2)"],
    "STL": ["s = STL(x, period=24).fit()"], "gradient": ["v = np.gradient(x)"], "rfft": ["f = np.fft.rfft(x)"],
    "bidirectional=True": ["net = nn.LSTM(8, 8, bidirectional=True)"], "BatchNorm1d": ["norm = nn.BatchNorm1d(8)"],
    "scaled_dot_product_attention": ["o = F.scaled_dot_product_attention(q, k, v)",
                                     "o = F.scaled_dot_product_attention(q, k, v, is_causal=False)"],
    "MultiheadAttention": ["a = nn.MultiheadAttention(8, 2)"],
    "[i + 1]": ["for i in range(n):\n    y.append(x.iloc[i + 1])", "y = [x[i + 1] / x[i] for i in range(n)]"],
    "[i + h]": ["y = [x[i + h] for i in range(n)]"],
}


@pytest.mark.parametrize("name, source", [(name, source) for name, sources in PLANTED.items() for source in sources])
def test_a_rule_finds_its_pattern_on_its_line_alone(name, source):
    found = all_hints(ast.parse(source))
    assert [(line, hint.split(": ")[0]) for line, hint in found] == [(source.count("\n") + 1, name)]


HARMLESS = """
past = x.shift(1), x.diff(), x.pct_change(24), np.roll(x, 1), x.ffill(), x.cumsum(), x.sort_index().cumsum()
z = (x - x.rolling(24).mean()) / x.expanding().std() + x.ewm(span=9).mean() + x.rolling(24, center=False).max()
joined = pd.merge_asof(grid, table, on="t"), pd.merge_asof(grid, table, direction="backward"), x.reindex(grid, method="ffill")
a, b = train_test_split(X, shuffle=False)
scaler.fit(a)
scores = cross_val_score(model, X, y, cv=TimeSeriesSplit(5)), GridSearchCV(model, grid, cv=folds)
g = df.groupby("asset").x.cumsum(), df.groupby("asset").x.shift(1), df.groupby("asset").x.transform("cumsum")
r = df.groupby("asset").x.transform(lambda s: s.rolling(24).mean()), df.groupby("time").x.rank()
last, odd, same = lst[-1], lst[::2], range(n)[::1]
mu, sd = X_train.mean(), X_train.std()
low = x.iloc[:n].quantile(.01)
day = x.resample("1D", label="right").last(), x.resample("1D").last().shift(1)
bins = pd.cut(x, [0, 1, 2])
o = F.scaled_dot_product_attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=m)
for i in range(1, n): out[i + 1] = x[i] - x[i - 1]
text = "x.shift(-1)"  # and x.bfill()
print(x.mean(), x.shift(1)); assert x.max() < 3
newest = df.sort_values("t", ascending=False)
"""


def test_honest_code_gets_no_hint():
    assert all_hints(ast.parse(HARMLESS)) == []


# --- files and notebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, read", [
    ("%%time\nx = 'a%s' % 3", "pass\nx = 'a%s' % 3"),
    ("if a:\n    %matplotlib inline\nfiles = !ls\ndf.head?", "if a:\n    pass\nfiles = None\npass"),
    ("s = ('%d'\n     % 3)", "s = '%d' % 3"),  # a line of Python may begin with %
    ("%%bash\nls | wc", ""),
])
def test_lines_of_ipython_are_skipped(source, read):
    assert ast.unparse(hints.parse_source(source)) == read


def notebook(*cells: tuple[str, str]) -> str:
    "The text of a notebook with cells (type, source)."
    return json.dumps(dict(cells=[dict(cell_type=kind, source=text.splitlines(True)) for kind, text in cells]))


def test_a_notebook_is_judged_as_a_whole(tmp_path):
    book = tmp_path / "n.ipynb"
    book.write_text(notebook(("markdown", "x.bfill()"), ("code", "%pip install x\nBACK = -1"), ("code", "x = ("),
                             ("code", "scaler.fit(X)"), ("code", "\nX.iloc[:9]\n  \ny = X.shift(BACK)\n")))
    assert [n for n, _ in hints.code_cells(book)] == [1, 2, 3, 4]
    assert [(cell, line, hint[:5], code) for _, cell, line, hint, code in hints.lint_file(book)] == [
        (2, 1, "does ", "x = ("), (3, 1, "fit: ", "scaler.fit(X)"), (4, 4, "shift", "y = X.shift(BACK)")]


def test_what_cannot_be_read_is_listed(tmp_path):
    broken, torn = tmp_path / "broken.py", tmp_path / "torn.ipynb"
    broken.write_text("x = 1\ndef f(:\n")
    torn.write_text("{")
    assert [row[2:] for row in hints.lint_file(broken)] == [
        (2, "does not parse, so this file was not searched: SyntaxError: invalid syntax", "def f(:")]
    assert [row[3][:17] for row in hints.lint_file(torn)] == ["could not be read"]


@pytest.fixture
def folder(tmp_path) -> Path:
    "A folder with a notebook, two files, and places that are not searched."
    for name in ("sub", ".hidden", "own", ".ipynb_checkpoints"): (tmp_path / name).mkdir()
    (tmp_path / "own/pyvenv.cfg").touch()
    for file in ("sub/a.py", ".hidden/b.py", "own/c.py", ".ipynb_checkpoints/d.py"):
        (tmp_path / file).write_text("# %%\nx = 1\ny = x.shift(-1)\n")
    (tmp_path / "n.ipynb").write_text(notebook(("code", "!ls"), ("code", "x = 1\nx.bfill()")))
    (tmp_path / "clean.py").write_text("y = x.shift(1)\n")
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_a_folder_is_searched_without_hidden_folders_and_environments(folder):
    found = lint(folder)
    assert [Path(f).relative_to(folder).as_posix() for f in found.file] == ["n.ipynb", "sub/a.py"]
    assert list(found) == hints.HINT_COLUMNS and found[["cell", "line"]].fillna(-1).values.tolist() == [[1, 2], [-1, 3]]


def test_a_file_is_given_by_path_or_text(folder):
    assert lint(str(folder / "sub/a.py")).code.tolist() == ["y = x.shift(-1)"]


def test_a_clean_file_gives_an_empty_table(folder):
    none = lint(folder / "clean.py")
    assert list(none) == hints.HINT_COLUMNS and len(none) == 0 and str(none.cell.dtype) == "Int64"


@pytest.mark.parametrize("name, message", [
    ("nowhere", "nowhere does not exist"), ("notes.txt", "notes.txt is neither a .py file nor a notebook: give")])
def test_a_path_that_cannot_be_read_is_named(folder, name, message):
    with pytest.raises(ValueError, match=message): lint(folder / name)
