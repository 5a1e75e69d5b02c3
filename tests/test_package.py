"The package as its users import it: silent, light, without cycles or pickle, and exactly what the notebooks export."
import ast
import configparser
import importlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from helpers import ENV, ROOT, read_result

PACKAGE = ROOT / "cryptopredict"
# The notebooks follow the flow of the data; a module imports only earlier ones. The museum exports nothing.
NOTEBOOKS = [p.stem.partition("_")[2] for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
MODULES = [name for name in NOTEBOOKS if name != "museum"]
# These may import torch: the network, and the modules that train, evaluate and report it.
NETWORK = {*MODULES[MODULES.index("states"):]} - {"scores", "baselines", "calibration", "console", "cli"}
LIGHT, NETWORK_MODULES = [m for m in MODULES if m not in NETWORK], [m for m in reversed(MODULES) if m in NETWORK]
# Distributions whose module has another name.
NAMES = {"TA-Lib": "talib", "scikit-learn": "sklearn", "mlflow-skinny": "mlflow", "tomli-w": "tomli_w"}

WATCH = """import socket, sys
def refuse(*args, **kwargs): raise RuntimeError("a connection at import")
socket.socket.connect = socket.create_connection = refuse
import importlib
for module in {modules!r}: importlib.import_module(f"cryptopredict.{{module}}".strip("."))
cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
open(sys.argv[1], "w").write(" ".join({{m.partition(".")[0] for m in sys.modules}} | ({{"CUDA"}} if cuda else set())))"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Name -> (output, loaded modules) of a fresh interpreter that imports the package (''), a light module, or the network."
    cwd, notes = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("loaded")

    def start(module):
        code, note = WATCH.format(modules=NETWORK_MODULES if module == "network" else [module]), notes / f"{module}.txt"
        done = subprocess.run([sys.executable, "-c", code, note], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"import of {module or 'cryptopredict'}:\n{done.stderr}"
        return done.stdout + done.stderr, set(note.read_text().split())
    names = ["", *LIGHT, "network"]
    with ThreadPoolExecutor(2) as pool: yield dict(zip(names, pool.map(start, names)))
    assert list(cwd.iterdir()) == [], "an import wrote a file"


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> set[str]:
    "Dotted names of everything imported anywhere in a module of this package, inside functions too."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = "cryptopredict" + (f".{node.module}" if node.module else "") if node.level else node.module
            found |= {f"{base}.{a.name}" for a in node.names}
    return found


def test_import_is_silent_and_light(imported):
    heavy = {"nbdev", "execnb", "IPython", "pytest", "lightgbm", "sklearn", "arch", "mamba_ssm", "matplotlib", "CUDA"}
    plots = {"plotly", "tyro", "rich"}
    found = []
    for module, (printed, loaded) in imported.items():
        too_much = heavy if module == "network" else heavy | {"torch"}
        if module not in ("network", "figures", "console", "cli"): too_much = too_much | plots
        found += [f"{module} prints {printed!r}"] * bool(printed) + [f"{module} loads {name}" for name in loaded & too_much]
    assert not found


def test_the_package_alone_loads_neither_torch_nor_pandas(imported):
    assert imported[""][1].isdisjoint({"torch", "pandas", "numpy", "pydantic", "rich", "tyro", "plotly"})


def test_public_names_are_those_of_their_modules():
    import cryptopredict as cp
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))  # read by type checkers
    assert {a.name: n.module for n in block.body for a in n.names} == cp.MODULE_OF
    assert set(cp.__all__) == {*cp.MODULE_OF, "__version__"} == set(dir(cp))
    for name, module in cp.MODULE_OF.items():
        assert getattr(cp, name) is getattr(importlib.import_module(f"cryptopredict.{module}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'forecast'"): cp.forecast  # noqa: B018


def test_no_module_imports_a_later_one():
    found = []
    for k, module in enumerate(MODULES):
        mine = {name.split(".")[1] for name in _imports(_tree(module)) if name.startswith("cryptopredict.")} - {"__version__"}
        found += [f"{module} imports {other}" for other in sorted(mine - set(MODULES[:k]))]
    assert not found


def test_each_notebook_exports_one_module():
    assert set(MODULES) == {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")}


def _declared(*keys: str) -> set[str]:
    "Modules of the distributions that settings.ini requires under these keys."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    entries = (entry for key in keys for entry in config["DEFAULT"][f"{key}requirements"].split())
    names = (re.split(r"[<>=]", entry)[0] for entry in entries)
    return {NAMES.get(name, name.replace("-", "_")) for name in names}


def test_only_declared_dependencies_are_imported():
    optional = _declared("cuda_", "baselines_", "track_")
    known = _declared("") | optional | set(sys.stdlib_module_names) | {"cryptopredict"}
    used = {m: {name.partition(".")[0] for name in _imports(_tree(m))} for m in MODULES}
    used["site"] -= {"nbdev"}  # nbdev itself calls this module
    assert not (strange := {m: sorted(n - known) for m, n in used.items() if n - known}), strange
    tops = {m: ast.Module([n for n in _tree(m).body if isinstance(n, ast.Import | ast.ImportFrom)], []) for m in MODULES}
    early = {m: {name.partition(".")[0] for name in _imports(t)} & optional for m, t in tops.items()}
    assert not any(early.values()), f"an extra is imported where it is used, not with the module: {early}"


def test_no_pickle_and_no_print():
    found, pickles = [], {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve"}
    for module in MODULES:
        tree, text = _tree(module), (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        used = {name.partition(".")[0] for name in _imports(tree)} & pickles
        used |= {*re.findall(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False|read_pickle|to_pickle", text)}
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        used |= calls & ({"eval", "exec", "breakpoint"} | (set() if module in ("console", "cli") else {"print"}))
        found += [f"{module} uses {name}" for name in used]
    assert not found


def test_exported_names_exist_and_have_docstrings():
    found = []
    for module in MODULES:
        loaded = importlib.import_module(f"cryptopredict.{module}")
        assert len(set(loaded.__all__)) == len(loaded.__all__) > 0, module
        own = {name: getattr(loaded, name) for name in loaded.__all__}
        found += [f"{module}.{n} has no docstring" for n, v in own.items()
                  if getattr(v, "__module__", "") == loaded.__name__ and not (v.__doc__ or "").strip()]
    assert not found


def test_modules_are_what_the_notebooks_export(tmp_path):
    pytest.importorskip("nbdev")
    for folder in ("nbs", "cryptopredict"): (tmp_path / folder).mkdir()
    for file in (ROOT / "settings.ini", PACKAGE / "__init__.py", *(ROOT / "nbs").glob("*.ipynb")):
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    argv = [sys.executable, "-c", "import nbdev; nbdev.nbdev_export()"]
    done = subprocess.run(argv, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    both = (tmp_path / "cryptopredict", PACKAGE)
    made, there = ({p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.py")} for folder in both)
    assert set(made) == set(there), f"run nbdev_export: {set(made) ^ set(there)}"
    assert [n for n in made if made[n] != there[n]] == [], "edited by hand, or a notebook was not exported: run nbdev_export"


def test_package_data_is_declared():
    # Files that are no modules reach a wheel only if setup.py names them.
    others = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert all(re.fullmatch(r"presets/\w+\.toml|py\.typed", name) for name in others), others
    assert '["py.typed", "presets/*.toml"]' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_results_are_small_and_hold_no_data_rows():
    # The project may not redistribute the source files; forecasts and scores computed from them it may.
    prices = {"open", "high", "low", "close", "volume", "r90"}
    for path in (ROOT / "results").iterdir():
        assert path.stat().st_size < 1_500_000, path.name
        if path.suffix == ".parquet": assert set(pd.read_parquet(path).columns).isdisjoint(prices), path.name
    kept = read_result("real")
    assert {"provenance", "config", "summary"} <= set(kept) and prices.isdisjoint(kept)
