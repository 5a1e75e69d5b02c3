"""Shared fixtures: source files, runs of the shell command, a finished training, executed notebooks.

Slow set-up runs once: `.ci/run` makes the folders of `default_run` and `executed` and names them in CRYPTOPREDICT_DEFAULT_RUN and
CRYPTOPREDICT_EXECUTED; without these variables, the first worker of pytest-xdist makes them for all.
"""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# numpy reads these when it is imported, here and in every process a test starts: import it only below.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU, wherever they run

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=60, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile("repeatable")

from helpers import DATA, ROOT  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer sweeps of the same checks, run only by `pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"): return
    chosen = [item for item in items if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def once(tmp_path_factory, request):
    "A function that calls `work(folder)` in the first worker that needs it, and returns the folder in every worker."
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"): base = base.parent  # the folder that all workers share

    def make(name: str, work) -> Path:
        folder = base / name
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.done").exists():
                work(folder)
                (base / f"{name}.done").touch()
        return folder
    return make


@pytest.fixture(scope="session", autouse=True)
def ledger(tmp_path_factory) -> Path:
    "The ledger of the tests, so that none is written next to the checkout."
    import helpers
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    os.environ["CRYPTOPREDICT_LEDGER"] = helpers.ENV["CRYPTOPREDICT_LEDGER"] = str(path)
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "Folder of the real source files."
    if not DATA.is_dir(): pytest.skip("no real data: put the source files into ../shared/data, next to the checkout")
    return DATA


@pytest.fixture(scope="session")
def default_run(once):
    "`cryptopredict run` without flags in an empty folder: its files, output and peak memory."
    from helpers import command, load_measured, measure
    kept = os.environ.get("CRYPTOPREDICT_DEFAULT_RUN")
    return load_measured(Path(kept) if kept else once("default", lambda folder: measure(folder, command(), "run")))


@pytest.fixture(scope="session")
def real_run(once, data_dir):
    "The same for `cryptopredict run --data` on the real files, with the baselines."
    from helpers import BASELINES, command, load_measured, measure
    words = ("run", "--data", data_dir, "--models", *BASELINES)
    return load_measured(once("real", lambda folder: measure(folder, command(), *words, timeout=600)))


@pytest.fixture(scope="session")
def executed(once) -> Path:
    "Folder with one JSON file per notebook: its outputs when `nbdev_test` executes it."
    kept = os.environ.get("CRYPTOPREDICT_EXECUTED")
    def work(folder):
        argv = [sys.executable, ROOT / "tests" / "execute.py", folder]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
    return Path(kept) if kept else once("executed", work)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    "Folders of small source files and configurations, valid and faulty; read-only for the tests."
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


@pytest.fixture(scope="session")
def finished_training(tmp_path_factory) -> Path:
    "The folder of an uninterrupted training of `trainings.config` on `trainings.data`; copy it before changing it."
    from trainings import config, data

    from cryptopredict.tbptt_trainer import train
    out = tmp_path_factory.mktemp("finished")
    assert train(config(), data(), out).step > 12
    return out


@pytest.fixture
def spoil(monkeypatch):
    "A function that multiplies the loss of the given steps by a factor, each at most `times` times."
    from cryptopredict.tbptt_trainer import Run

    def do(steps, factor, times=10**9):
        plain, left = Run.losses, {step: times for step in steps}

        def losses(run, forecast, piece):
            made = plain(run, forecast, piece)
            if left.get(run.step, 0) <= 0: return made
            left[run.step] -= 1
            return dict(made, loss=made["loss"] * factor)
        monkeypatch.setattr(Run, "losses", losses)
    return do


@pytest.fixture(scope="session")
def notebooks() -> dict[str, dict]:
    "The committed notebooks by name."
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}


@pytest.fixture
def no_pickle(monkeypatch) -> None:
    "Make every use of pickle an error."
    import torch
    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)


@pytest.fixture
def sample(tmp_path):
    "A function that writes a file and returns its path."
    def write(content: str | bytes, name: str = "sample.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


@pytest.fixture(scope="module")
def one_thread():
    "One thread for PyTorch: the tensors of these tests are tiny."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
