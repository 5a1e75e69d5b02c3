"""Draw README's picture from the committed forecasts and the real files: python benchmarks/picture.py [DATA] [OUT.png].

It shows the default forecaster's 80 % band of the 90-day return at each origin of the real run, and the realised return. Needs
the source files (default `../shared/data`) for the realised returns, and Chromium for the PNG.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from cryptopredict.figures import BLACK, BLUE, RED, SKY, faint, house_style
from cryptopredict.labels import make_labels
from cryptopredict.sources import load_panel

ROOT = Path(__file__).resolve().parents[1]
MODEL = "har_ensemble"
CHANGES = (-.6, -.4, -.2, 0, .5, 1, 2, 4)  # ticks: relative change of the price in 90 days
WIDTH, HEIGHT, SCALE = 720, 440, 2


def draw(data: Path) -> go.Figure:
    "The figure: band and outcome by origin."
    band = pd.read_parquet(ROOT / "results" / "real.parquet").query("model == @MODEL").groupby("time")[["p10", "p90"]].mean()
    scores = json.loads((ROOT / "results" / "real.json").read_text(encoding="utf-8"))
    inside = next(r for r in scores["summary"] if (r["model"], r["score"]) == (MODEL, "coverage"))
    outcome = make_labels(load_panel(data)["close"])["r90"].reindex(band.index)
    band, outcome = band[outcome.notna()], outcome.dropna()
    is_out = (outcome < band["p10"]) | (outcome > band["p90"])
    assert abs((~is_out).mean() - inside["mean"]) < .005, "the files are not those of the committed run"
    fig = go.Figure()
    edge = dict(color=BLUE, width=.8, shape="hv")
    fig.add_scatter(x=band.index, y=band["p90"], line=edge, showlegend=False)
    fig.add_scatter(x=band.index, y=band["p10"], line=edge, fill="tonexty", fillcolor=faint(SKY, .3), name="80 % band")
    fig.add_scatter(x=outcome.index, y=outcome, line=dict(color=BLACK, width=1.3), name="outcome inside")
    fig.add_scatter(x=outcome.index, y=outcome.where(is_out), line=dict(color=RED, width=2), name="outcome outside")
    labels = [f"{100 * c:+.0f} %" if c else "0 %" for c in CHANGES]
    fig.update_yaxes(title="change in 90 days", tickvals=np.log1p(CHANGES), ticktext=labels)
    fig.update_xaxes(title="day of the forecast (UTC)")
    percent = [f"{100 * inside[k]:.0f}" for k in ("mean", "lo", "hi")]
    share = "{} % of outcomes inside; 90 % interval {} to {} %; {} separate windows".format(*percent, inside["n_windows"])
    house_style(fig, "", HEIGHT, width=WIDTH, font_size=16).update_layout(legend_traceorder="normal")
    title = dict(text=f"Bitcoin: forecast and outcome<br><span style='font-size:15px'>{share}</span>", font_size=20)
    return fig.update_layout(title=title, margin=dict(t=75, r=10, l=80, b=90))


if __name__ == "__main__":
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "results" / "forecasts.png"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "picture.html"
        html = draw(data).to_html(include_plotlyjs=True, full_html=False, config=dict(displayModeBar=False))
        page.write_text(f'<body style="margin:0;background:#fff">{html}</body>', encoding="utf-8")
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))))
        flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        flags += [f"--force-device-scale-factor={SCALE}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={out.resolve()}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} KB")
