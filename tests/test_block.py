"The layer in somebody else's program: what it needs, what it says, and an installation of mamba_ssm that is broken."
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENV

ABSENT = ("pandas", "pyarrow", "safetensors", "pydantic", "tyro", "pandera", "rich", "plotly", "talib", "scoringrules",
          "fastcore", "httpx", "nbdev", "IPython", "scipy", "sklearn")
USE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of these is an ImportError
import torch
from cryptopredict.mamba2_block import Mamba2, Mamba2Config, detach
torch.manual_seed(0)
layer = Mamba2(Mamba2Config(d_model=16, d_state=4, headdim=8, backend={backend!r}))
state, total = None, 0.
for _ in range(3):
    y, state = layer(torch.randn(2, 5, 16), state)
    y.square().sum().backward()
    state, total = detach(state), total + y.sum().item()
print(f"{{total:.5f}}")
"""
BROKEN = {
    "an extension is missing": {"__init__.py": "import selective_scan_cuda"},
    "a symbol is missing": {"__init__.py": "raise OSError('undefined symbol: _ZN3c105Error')"},
    "an empty folder": {},
    "kernels without the function": {"__init__.py": "", "ops/__init__.py": "", "ops/triton/__init__.py": "",
                                     "ops/triton/ssd_combined.py": ""},
    "it leaves the interpreter": {"__init__.py": "raise SystemExit(3)"},
}


def _use(folder: Path, backend: str = "auto", **files: str) -> subprocess.CompletedProcess:
    "Three training steps of the layer in a fresh interpreter that finds a `mamba_ssm` of these files."
    for name, text in files.items():
        path = folder / "mamba_ssm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + USE.format(absent=ABSENT, backend=backend)
    return subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    "What the layer prints where there is no mamba_ssm."
    done = _use(tmp_path_factory.mktemp("none"))
    assert done.returncode == 0, done.stderr
    assert "mamba_ssm" not in done.stderr, "nothing is missing, nothing is said"
    return done.stdout


def test_torch_and_einops_are_enough(plain):
    assert plain.strip(), "the layer ran without the project's other dependencies"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mamba_ssm_is_survived_with_one_warning(name, tmp_path, plain):
    (tmp_path / "mamba_ssm").mkdir()
    done = _use(tmp_path, **BROKEN[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain, "the PyTorch backend has taken over"
    assert done.stderr.count("RuntimeWarning: mamba_ssm does not import") == done.stderr.count("Warning:") == 1, done.stderr


def test_a_backend_that_was_asked_for_and_cannot_serve_is_an_error(tmp_path):
    done = _use(tmp_path, "mamba_ssm", **BROKEN["an extension is missing"])
    assert done.returncode == 1 and "ValueError: backend 'mamba_ssm' cannot be used" in done.stderr
