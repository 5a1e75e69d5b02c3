"The layer in another program: what it imports, its warnings, and an installation of mamba_ssm that is broken."
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENV

from cryptopredict.mamba2_block import Mamba2, Mamba2Block, Mamba2Config

ABSENT = ("pandas", "pyarrow", "safetensors", "pydantic", "tyro", "pandera", "rich", "plotly", "talib", "scoringrules",
          "fastcore", "filelock", "tomli_w", "jinja2", "psutil", "httpx", "nbdev", "IPython", "scipy", "sklearn")
USE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of these is an ImportError
import torch
from cryptopredict.mamba2_block import Mamba2, Mamba2Config
from cryptopredict.states import detach
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
    "Output of the layer where there is no mamba_ssm."
    done = _use(tmp_path_factory.mktemp("none"))
    assert done.returncode == 0, done.stderr
    assert "mamba_ssm" not in done.stderr, "no warning where nothing is broken"
    return done.stdout


def test_torch_and_einops_are_enough(plain):
    assert plain.strip(), "the layer ran without the project's other dependencies"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mamba_ssm_costs_one_warning(name, tmp_path, plain):
    (tmp_path / "mamba_ssm").mkdir()
    done = _use(tmp_path, **BROKEN[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain, "the PyTorch backend was used instead"
    assert done.stderr.count("RuntimeWarning: mamba_ssm does not import") == done.stderr.count("Warning:") == 1, done.stderr


def test_a_requested_backend_that_cannot_be_used_is_an_error(tmp_path):
    done = _use(tmp_path, "mamba_ssm", **BROKEN["an extension is missing"])
    assert done.returncode == 1 and "ValueError: backend 'mamba_ssm' cannot be used" in done.stderr


# --- sizes from weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    Mamba2Config(), Mamba2Config(d_model=12, d_state=5, expand=3, headdim=6, ngroups=2, d_conv=7),
    Mamba2Config(d_model=4, d_state=1, expand=1, headdim=1, ngroups=4, d_conv=1)], ids=["default", "odd", "smallest"])
def test_from_weights_gives_back_the_config(config):
    block = Mamba2Block(config, mlp=8)
    assert Mamba2Config.from_weights(block.mixer.state_dict(), config.ngroups) == config
    weights = {name.removeprefix("mixer."): v for name, v in block.state_dict().items() if name.startswith("mixer.")}
    assert Mamba2Config.from_weights(weights, config.ngroups) == config
    other = Mamba2(Mamba2Config.from_weights(weights, config.ngroups))
    other.load_state_dict(weights)
    u = torch.randn(2, 5, config.d_model)
    assert torch.equal(other(u)[0], block.mixer(u)[0])


SMALL = Mamba2Config(d_model=8, d_state=4, headdim=4, ngroups=2)


@pytest.mark.parametrize("change, ngroups, words", [
    (lambda w: w.pop("dt_bias"), 2, "'dt_bias'"), (lambda w: w.update(norm1=w["D"]), 2, "'norm1'"),
    (lambda w: w.update(D=w["D"][:-1]), 2, "D has shape"),
    (lambda w: w.update({"out_proj.weight": torch.zeros(8, 9)}), 2, "out_proj.weight has shape"),
    (lambda w: w.update({"conv1d.weight": w["conv1d.weight"][:, 0]}), 2, "conv1d.weight has shape"),
    (lambda w: None, 3, "3 groups"), (lambda w: None, 0, "ngroups")])
def test_from_weights_names_what_does_not_fit(change, ngroups, words):
    weights = Mamba2(SMALL).state_dict()
    change(weights)
    with pytest.raises(ValueError) as refused: Mamba2Config.from_weights(weights, ngroups)
    assert words in str(refused.value) and "\n" not in str(refused.value), refused.value
