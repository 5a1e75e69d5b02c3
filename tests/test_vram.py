"What a training will cost: measured peaks, the line through measurements, and what adds to the time."

import itertools
import json
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ROOT

from cryptopredict import vram
from cryptopredict.multitask import Targets
from cryptopredict.streams import FoldData
from cryptopredict.tbptt_trainer import Run, train, train_preset
from cryptopredict.vram import Cost, estimate, extrapolate, figure_vram, peak_while


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> FoldData:
    "8000 hours: training labels in the first 6000, labels for early stopping in the last 1000."
    torch.manual_seed(0)
    hours = torch.arange(8000.)
    fit, valid = (Targets(torch.where(where, hours % 3, torch.nan), *[torch.where(where, .3, torch.nan)] * 3)
                  for where in (hours < 6000, hours > 7000))
    return FoldData(torch.randn(8000, 20), fit, valid, None, 0, 6000)


@pytest.fixture(scope="module")
def config():
    return train_preset("tiny", 20, epochs=2, batch=8, tbptt_len=128)


def test_the_peak_of_a_large_tensor_is_seen():
    made, before = [], psutil.Process().memory_info().rss
    peak = peak_while(lambda: made.append(torch.ones(2**25).sum()), "cpu")
    assert 2**27 <= peak - before < 2**28, "128 MiB"


@pytest.mark.parametrize("name, tokens, due", [("forward", 40, 2.), ("update", 30, 3.)])
def test_a_cost_is_continued_along_the_line(name, tokens, due):
    assert extrapolate([Cost(10, .5, 1., 0, 0), Cost(20, 1., 2., 0, 0)], name, tokens) == pytest.approx(due)


def test_a_falling_line_is_noise_and_is_replaced_by_one_through_the_origin():
    assert extrapolate([Cost(10, .5, 9., 0, 0), Cost(20, 1., 8., 0, 0)], "update", 40) == 16


def test_an_estimate_counts_parameters_and_updates_as_the_training_does(data, config, tmp_path):
    expected, run = estimate(config, data, seconds=600.), train(config, data, tmp_path / "run")
    assert (expected.parameters, expected.updates) == (sum(p.numel() for p in run.model.parameters()), run.step)
    assert expected.share == 1


def test_memory_expected_from_a_small_part_is_near_that_from_the_whole(data, config):
    whole, part = estimate(config, data, seconds=600.), estimate(config, data, seconds=0.)  # one stream and 64 hours of it
    assert part.share < .1 and abs(part.memory - whole.memory) < .3 * whole.memory, (part, whole)


def test_exact_gradients_and_frequent_checkpoints_add_to_the_time(data, config, monkeypatch):
    known = lambda run, chunk, seconds: [Cost(chunk.x[..., 0].numel(), .1, .3, 0, 0)]
    monkeypatch.setattr(vram, "measure_parts", known)
    monkeypatch.setattr(vram, "perf_counter", itertools.count(0., .2).__next__)
    monkeypatch.setattr(Run, "save", lambda run: None)  # by this clock it takes .2 s
    steady = estimate(config, data)
    assert estimate(replace(config, bptt="exact"), data).seconds > steady.seconds
    assert estimate(replace(config, save_every=1), data).seconds > steady.seconds + .19 * steady.updates


def test_a_model_too_large_for_any_part_is_an_error(data, config, monkeypatch):
    def full(*_): raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(Run, "forward", full)
    with pytest.raises(ValueError, match="out of memory with one stream and 64 hours"): estimate(config, data)


def test_memory_figure_draws_what_was_measured():
    record = json.loads((ROOT / "results" / "vram.json").read_text(encoding="utf-8"))
    assert all(r["losses_finite"] and r["status"] == "ok" for r in record["sweep"])
    assert all(r["losses_finite"] for r in record["training"])
    lines = figure_vram(record).data
    assert lines[0].y[0] == round(record["sweep"][0]["peak_allocated"] / 1e9, 2)
    allocated = [line.y for line in lines if line.line.dash == "solid"]
    assert len(allocated) == 2 and all(list(y) == sorted(y) for y in allocated), "memory grows with tbptt_len"
