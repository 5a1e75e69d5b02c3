"The public API as a type checker sees it; `mypy` reads this file, nothing runs it."
from pathlib import Path
from typing import assert_type

import pandas as pd
import plotly.graph_objects as go

import cryptopredict as cp


def research(panel: pd.DataFrame, mine: cp.ForecastModel, folder: Path) -> None:
    run = cp.evaluate(panel, models=["climatology_4y", mine], out=folder, seeds=3)
    assert_type(run, cp.Evaluation)
    assert_type(run.report(), Path)
    assert_type(run.plot_reliability(), go.Figure)
    assert_type(cp.audit(cp.build_features, panel).raise_if_leaky(), cp.LeakReport)
    hours, ends = pd.DatetimeIndex([]), pd.Series()
    assert_type(cp.walk_forward(hours, ends, first_test="2020", step="YS", validation="365D"), list[cp.Fold])


def layers(folder: Path) -> None:
    layer = cp.Mamba2(cp.Mamba2Config(d_model=64))
    assert_type(cp.load_state(folder / "state", like=layer.init_state(1)), cp.Mamba2State)
    assert_type(cp.MultitaskModel.from_pretrained(folder), cp.MultitaskModel)
