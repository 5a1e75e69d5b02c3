"What a run prints: lines that cannot fail, tables, the time left, progress with and without a terminal."
import io
import json

import pandas as pd
import pytest
from rich.console import Console

from cryptopredict import console
from cryptopredict.console import (
    Progress,
    TimeLeft,
    duration_text,
    plural,
    print_inventory,
    print_line,
    print_scores,
    print_wrapped,
    training_line,
    warn,
)
from cryptopredict.walkforward import Step

RECORD = dict(loss=.5, cls=1.02, p10=.0712, p90=.08, vol=.1, lr=1e-3, tokens_per_s=31_400, peak_rss=400 * 2**20, steps=9)


class Training:
    step = 7


@pytest.mark.parametrize("seconds, text", [(-1, "0 s"), (1, "1 s"), (119, "119 s"), (121, "2 min"), (7300, "2 h"), (2e5, "2 d")])
def test_a_duration_is_given_in_its_largest_unit(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize("number, text", [(0, "0 years"), (1, "1 year"), (2, "2 years")])
def test_a_noun_follows_its_number(number, text):
    assert plural(number, "year") == text


def _full(*args, **more): raise OSError(28, "No space left on device")


def test_output_that_cannot_be_written_does_not_stop_the_run(monkeypatch):
    monkeypatch.setattr("builtins.print", _full)
    monkeypatch.setattr(console.os, "dup2", lambda *_: None)
    print_line("lost")
    warn("lost")
    assert [error.strerror for error in console.write_errors] == ["No space left on device"], "of standard output only"
    console.write_errors.clear()


def test_a_paragraph_is_wrapped_at_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    print_wrapped("word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 70 and lines[0].startswith("  word") and all(line.startswith("    word") for line in lines[1:])


def test_scores_are_printed_with_their_origins(tmp_path, capsys):
    names = ["log_loss", "pinball10", "pinball90", "coverage", "rmse_log_sigma", "qlike"]
    summary = [dict(model="ewma", score=name, mean=k / 7) for k, name in enumerate(names)]
    span = dict(begin="2018-01-01 00:00", end="2018-12-31 00:00")
    fewer = dict(origins=305, begin=span["begin"], end="2018-11-01 00:00")
    record = dict(origins=365, **span, summary=summary, config=dict(models=["ewma"]), origins_by_label=dict(r90=fewer))
    (tmp_path / "scores.json").write_text(json.dumps(record))
    print_scores(tmp_path / "scores.json")
    text = capsys.readouterr().out
    assert all(f"{k / 7:.{4 if k in (1, 2) else 3}f}" in text for k in range(6))
    assert "365 daily origins, 2018-01-01 to 2018-12-31" in text
    assert "are based on 305 origins, to 2018-11-01" in text


def test_an_inventory_is_printed_with_files_notes_and_panel(capsys, monkeypatch):
    monkeypatch.setattr("cryptopredict.checks.utc_now", lambda: pd.Timestamp("2018-01-04", tz="UTC"))
    span = dict(rows=24, first=pd.Timestamp("2018-01-01", tz="UTC"), last=pd.Timestamp("2018-01-02", tz="UTC"))
    none = dict(rows=None, first=pd.NaT, last=pd.NaT)
    usual = dict(status="read", asset="", holds="", repairs="", note="", filled=None, longest_hole=None)
    rows = {"market.csv": usual | span | dict(asset="BTC/USD", holds="bars", repairs="sort"),
            "notes.txt": usual | none | dict(status="left out", note="no table"),
            "panel": usual | span | dict(holds="panel", filled=3, longest_hole=2)}
    print_inventory(pd.DataFrame(rows).T, "data")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "files of data:" and lines[1].split()[:4] == ["market.csv", "BTC/USD", "24", "rows"]
    assert lines[2:4] == ["  market.csv: repairs: sort", "  notes.txt: left out; no table"]
    assert lines[4].endswith("its newest bar is 2 d old (now 2018-01-04 00:00)")
    assert lines[5] == "  3 hours without a bar or a trade, 2 in a row at most"


def test_no_time_is_shown_before_every_kind_has_been_timed():
    plan = [(model, work) for work in (10, 12, 14) for model in ("log_har", "mamba2")]
    steps = [Step("fold", model, 0, model, work) for model, work in plan]
    left, now, shown = TimeLeft(), 0., []
    for n, step in enumerate(steps):
        left.begin(step._replace(rest=tuple(steps[n + 1:])), now)
        shown.append(left.seconds(now))
        now += step.work * (.1 if step.model == "log_har" else 10)
    assert shown[:2] == [None, None] and shown[2:] == pytest.approx([262.6, 261.4, 141.4, 140.])
    assert left.seconds(now - 100) == pytest.approx(100), "a part that runs counts down"
    left.begin("done", now)
    assert left.text(now) == "", "no part, no time"


def test_parts_that_exist_already_cost_no_time():
    left = TimeLeft()
    left.begin(Step("fold 1", "ewma", 0, "ewma", 0), 0.)
    assert left.seconds(0.) == 0 and left.text(0.) == "0 s left"


def test_an_update_is_described_in_one_line():
    expected = "loss 0.500  cls 1.020  p10 0.071  p90 0.080  vol 0.100  lr 1.0e-03  31k tokens/s  400 MiB"
    assert training_line(RECORD) == expected
    assert training_line(RECORD | dict(peak_allocated=2**20)).endswith("tokens/s  1 MiB"), "a GPU's memory, where there is one"


def test_without_a_terminal_a_line_is_printed_once_a_minute(capsys):
    with Progress() as progress:
        progress.on_part(1, 2, "half")
        progress.on_update(Training, RECORD)
        assert capsys.readouterr().err == "" and len(progress.bars.tasks) == 1
        progress.shown -= 61
        for _ in range(2): progress.on_update(Training, RECORD)
    assert capsys.readouterr().err == f"1 of 2, half: update 7 of 9  {training_line(RECORD)}\n"


@pytest.fixture(params=[60, 72, 80, 100, 120])
def terminal(request, monkeypatch):
    "A console that takes itself for a terminal of some width; what is drawn on it is not shown."
    made = Console(file=io.StringIO(), width=request.param, force_terminal=True, color_system=None, force_jupyter=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: made)
    return made


def test_bars_fit_into_the_terminal(terminal):
    step = Step("fold 1 of 7", "climatology_4y", 0, "climatology", 10)
    with Progress() as progress:
        progress.left.spent, progress.left.done = {"climatology": 5.}, {"climatology": 1}
        progress.on_part(3, 24, step)
        for _ in range(2): progress.on_update(Training, RECORD)
        with terminal.capture() as capture: terminal.print(progress.bars.get_renderable())
        assert [(task.completed, task.total) for task in progress.bars.tasks] == [(3, 24), (7, 9)]
        progress.on_part(4, 24, step)
        assert len(progress.bars.tasks) == 1, "the bar of a training ends with its part"
    lines = capture.get().rstrip().splitlines()[-2:]
    assert all(len(line) <= terminal.width for line in lines)
    assert "3/24" in lines[0] and " s left" in lines[0] and "7/9" in lines[1]
