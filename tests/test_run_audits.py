"The audits before a run: labels at their ends, reports joined, and panels that are too short or have gaps."
import numpy as np
import pandas as pd
import pytest

from cryptopredict import run_audits
from cryptopredict.labels import make_labels
from cryptopredict.leakage import audit, make_report
from cryptopredict.protocol import EvaluateConfig, UserCode
from cryptopredict.run_audits import AUDITED_HOURS, audit_inputs, join_reports, labels_when_known, short_fold
from cryptopredict.simulate import simulate_market

CONFIG = EvaluateConfig(models=("climatology",), horizon="20D", vol_window="7D", first_test="2016-08-01", step="60D",
                        validation="30D")


@pytest.fixture(scope="module")
def panel():
    return simulate_market(24 * 365, seed=1)[0]


def test_a_label_is_known_at_its_end_and_no_earlier(panel):
    config = EvaluateConfig(models=("climatology",))
    labels, known = make_labels(panel["close"]), labels_when_known(panel.iloc[:4000], config)
    assert known.r90.first_valid_index() == labels.label_end.iloc[0]
    assert known.r90[labels.label_end.iloc[7]] == labels.r90.iloc[7]


def test_joined_reports_keep_every_leak_and_add_up_counts(panel):
    some = panel[["close"]].iloc[:500]
    fine, leaky = (audit(lambda f, k=k: f.shift(k), some, n_cuts=2) for k in (1, -1))
    assert join_reports([fine, fine]).ok
    assert not join_reports([fine, leaky]).ok and not join_reports([leaky, fine]).ok
    assert join_reports([fine, fine]).tested["cuts"] == 2 * fine.tested["cuts"]


def test_each_audit_is_announced_before_it_starts(panel, monkeypatch):
    events = []
    for name in ("audit", "audit_labels", "audit_folds"):
        monkeypatch.setattr(run_audits, name, lambda *a, name=name, **k: events.append(name) or make_report([], {}))
    reports = audit_inputs(panel.iloc[:24 * 280], CONFIG, on_audit=events.append)
    assert list(reports) == ["features", "labels", "disguise", "folds"]
    assert events == ["features", "audit", "labels", "audit", "audit", "disguise", "audit_labels", "folds", "audit_folds"]


def test_tables_without_provenance_are_refused(panel):
    with pytest.raises(ValueError, match="tables are given without provenance"):
        audit_inputs(panel, CONFIG, tables=[pd.DataFrame()])


def test_the_short_fold_uses_the_last_stretch_without_a_gap(panel):
    gapped = panel.copy()
    gapped.iloc[-100, gapped.columns.get_loc("close")] = np.nan
    frame, _, fold = short_fold(gapped, CONFIG, UserCode({}, {}))
    assert len(frame) == AUDITED_HOURS and frame.index[-1] == panel.index[-101] and len(fold.test)


@pytest.mark.parametrize("cut, message", [
    (lambda p: p.iloc[:1000], "panel has 1000 hours: this audit needs"),
    (lambda p: p.assign(close=p["close"].where(np.arange(len(p)) % 1000 > 0)), "no 5280 hours without a gap"),
])
def test_a_panel_that_cannot_hold_the_short_fold_is_named(panel, cut, message):
    with pytest.raises(ValueError, match=message): short_fold(cut(panel), CONFIG, UserCode({}, {}))
