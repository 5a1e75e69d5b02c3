"Settings and fixtures of all tests: one thread per process, repeatable hypothesis, the shell's default run, the real data."
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
def small_run(tmp_path_factory) -> Path:
    "A short finished run in the folder `out`; copy it before changing it."
    from helpers import SMALL, shell
    folder = tmp_path_factory.mktemp("small")
    done = shell("run", "--out", "out", "--n-cuts", "4", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"
