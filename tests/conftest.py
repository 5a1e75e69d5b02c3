"Settings and fixtures of all tests: one thread per process, repeatable hypothesis, shared runs of the shell, the real data."
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when numpy loads, here and in every process a test starts: keep numpy out of the imports above.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = "1"

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=60, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "Folder of the real source files, beside the checkout; they are not part of it."
    found = ROOT.parent / "shared" / "data"
    if not found.is_dir(): pytest.skip("the real data are not here: ../shared/data beside the checkout")
    return found


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    "`cryptopredict run` without any flag in an empty folder, made once: files, output, seconds, peak memory."
    from helpers import measured
    return measured("run", cwd=tmp_path_factory.mktemp("default"))


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
