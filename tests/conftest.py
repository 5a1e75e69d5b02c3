"Settings and fixtures of all tests: one thread per process, repeatable hypothesis, shared runs of the shell, the real data."
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when numpy loads, here and in every process a test starts: keep numpy out of the imports above.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU, wherever they run

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=60, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # the real source files, beside the checkout; they are not part of it
_long = {}  # the runs that take longest, started beside the tests that do not need them


def _start(name: str):
    "One of the long runs, in an empty folder."
    from helpers import BASELINES, measured
    if name == "default_run": return measured("run", cwd=_long["folder"] / "default")
    return measured("run", "--data", DATA, "--models", *BASELINES, cwd=_long["folder"] / "real", timeout=600)


def pytest_collection_finish(session):
    "With two cores this saves more than a minute."
    wanted = {name for item in session.items for name in ("default_run", "real_run") if name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or not wanted: return
    _long["folder"], _long["pool"] = Path(tempfile.mkdtemp(prefix="cryptopredict-")), ThreadPoolExecutor(1)
    for name in sorted(wanted, reverse=True):  # the run on the real files is asked for first
        if name == "default_run" or DATA.is_dir(): _long[name] = _long["pool"].submit(_start, name)


def pytest_sessionfinish(session):
    "Nothing is left running, and no folder behind."
    if "pool" in _long:
        _long["pool"].shutdown(cancel_futures=True)
        shutil.rmtree(_long["folder"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "Folder of the real source files."
    if not DATA.is_dir(): pytest.skip("the real data are not here: ../shared/data beside the checkout")
    return DATA


@pytest.fixture(scope="session")
def default_run():
    "`cryptopredict run` without any flag in an empty folder: files, output, seconds, peak memory."
    return _long["default_run"].result()


@pytest.fixture(scope="session")
def real_run(data_dir):
    "`cryptopredict run --data` with the baselines, as `default_run`."
    return _long["real_run"].result()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    "Folders of small source files and configurations, good and faulty; commands may read but not change them."
    from helpers import write_inputs
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def small(inputs) -> list[str]:
    "Flags of a run that takes seconds: 300 days of bars, short labels, six folds, two models."
    return ["--data", f"{inputs}/good", "--config", f"{inputs}/short.toml"]


@pytest.fixture(scope="session")
def small_run(small, tmp_path_factory) -> Path:
    "A finished run with the flags of `small`; copy it before changing it."
    from helpers import shell
    folder = tmp_path_factory.mktemp("small")
    done = shell("run", "--out", "out", "--n-cuts", "4", *small, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer checks of the same kind, run by `pytest -m slow` only")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"): return
    chosen = [item for item in items if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
