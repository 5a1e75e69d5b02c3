"The trainer: settings, optimiser, guard, spans, checkpoints that are kept, what is left of a finished training."
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryptopredict.bptt import bptt_chunks
from cryptopredict.checkpoint import checkpoints, step_of
from cryptopredict.config import ConfigError
from cryptopredict.features import build_features
from cryptopredict.labels import make_labels
from cryptopredict.multitask import MultitaskModel, Targets, preset
from cryptopredict.simulate import simulate_market
from cryptopredict.storage import append_jsonl
from cryptopredict.streams import Chunk, FoldData, fold_data
from cryptopredict.tbptt_trainer import (
    Optimiser,
    Run,
    TrainConfig,
    TrainSettings,
    best_epoch,
    check_device,
    chunks_of,
    decay_groups,
    deterministic,
    group_spans,
    keep_weights_only,
    lr_factor,
    peak_bytes,
    reduced_plan,
    resolved,
    steps_per_epoch,
    train,
    train_epoch,
    train_preset,
    train_step,
    validation_loss,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy() -> FoldData:
    "Two thousand hours of invented numbers, the last hundred for validation."
    hours, draw = torch.arange(2000.), torch.Generator().manual_seed(0)
    valid = Targets(torch.where(hours > 1900, 1., torch.nan), *[torch.where(hours > 1900, .5, torch.nan)] * 3)
    return FoldData(torch.randn(2000, 6, generator=draw), Targets(*[hours % 3] * 4), valid, None, 0, 1800)


def small(**changes) -> TrainConfig:
    "Preset tiny on six channels in short chunks."
    return train_preset("tiny", 6, **{**dict(batch=4, tbptt_len=64), **changes})


def a_chunk() -> Chunk:
    "Nine labelled hours of two streams."
    return Chunk(torch.randn(2, 9, 6), Targets(torch.ones(2, 9), *[torch.full((2, 9), v) for v in (-.5, .9, .4)]), False)


def lines(out: Path, name: str) -> list[dict]:
    "A history of a training, empty if there is none."
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Killed(Exception):
    "Ends a training in the middle."


def kill_at(step: int):
    "A callback that ends the training after an update."
    def on_update(run, record):
        if run.step == step: raise Killed
    return on_update


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, message", [
    (dict(warmup=2.), "'warmup' is 2.0: must be a number from 0.0 to 0.5"),
    (dict(amp="int8"), "'amp' is 'int8': must be one of auto"),
    (dict(batch=16.), "'batch' is 16.0: must be a whole number from 1 to 4096"),
    (dict(bptt="all"), "'bptt' is 'all'"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_a_setting_out_of_bounds_is_named_with_its_bounds(wrong, message):
    with pytest.raises(ConfigError, match=message): TrainConfig(**wrong)


@pytest.mark.parametrize("gpu, given, due", [
    (True, {}, ("cuda", "bf16")), (True, dict(device="cpu"), ("cpu", "off")), (True, dict(amp="off"), ("cuda", "off")),
    (False, {}, ("cpu", "off"))])
def test_auto_is_resolved_for_the_machine(monkeypatch, gpu, given, due):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    settings = resolved(TrainSettings(**given))
    assert (settings.device, settings.amp) == due


def test_a_missing_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', but no GPU is available: use 'cpu'"): check_device("cuda")


def test_deterministic_algorithms_are_used_within_the_context_only():
    with deterministic(True): assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_comes_too_late_after_the_gpu_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before this process"), deterministic(True): pass


def test_peak_memory_is_in_bytes():
    assert all(2**26 < v < 2**40 for v in peak_bytes("cpu").values())


# --- optimiser -----------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_over_the_warm_up_and_falls_to_a_ten_thousandth():
    curve = [lr_factor(s, 1000, .03) for s in range(1000)]
    assert (int(np.argmax(curve)), max(curve)) == (29, 1.)
    assert np.allclose([curve[0], curve[-1]], [1 / 30, 1e-4], atol=1e-9)


def test_weight_decay_applies_to_matrices_only():
    decayed, exempt = decay_groups(MultitaskModel(preset("tiny")), .1)
    assert all(p.ndim >= 2 for p in decayed["params"]) and any(p.ndim == 0 for p in exempt["params"])
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (.1, 0.)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_finite_step_follows_skipped_ones(amp):
    "The weights stay as they are while the gradient is infinite or NaN, and move with the next finite one."
    config, x = resolved(small(amp=amp)), torch.randn(2, 9, 6)
    model = MultitaskModel(config.model)
    optimiser, before = Optimiser(model, config), [p.detach().clone() for p in model.parameters()]

    def skipped(factor):
        optimiser.zero_grad()
        loss = sum(v.sum() for v in model(x)[0]) * factor
        optimiser.scaler.scale(loss).backward()
        return optimiser.step(loss.detach(), optimiser.clip()).item()
    assert skipped(math.inf) and skipped(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not skipped(1.) and any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- updates, spans and epochs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [None, False], ids=["no chunk", "no label"])
def test_a_span_without_labels_is_refused(tmp_path, labelled):
    chunk = a_chunk()
    span = [] if labelled is None else [chunk._replace(targets=Targets(*(v * np.nan for v in chunk.targets)))]
    with pytest.raises(ValueError, match="span has no loss"): train_step(Run(small(), tmp_path), span, None, 10)


@pytest.mark.parametrize("dataset", ["streams", "windows"])
def test_updates_per_epoch_are_those_of_the_chunks(dataset):
    config, data = small(dataset=dataset), toy()
    chunks = list(chunks_of(config, data, 0))
    assert (steps_per_epoch(config, data), chunks[0].x.shape[1]) == (len(chunks) - (dataset == "streams"), 64)
    for bptt in ("span:2", "span:3", "exact"):
        assert steps_per_epoch(replace(config, bptt=bptt), data) == sum(1 for _ in group_spans(chunks, bptt_chunks(bptt)))


def test_a_batch_too_large_for_the_history_is_reduced_and_reported():
    assert reduced_plan(small(), toy()) == ""
    assert "batch 16 -> 4" in reduced_plan(small(batch=16), toy())


def test_burn_in_moves_the_state_without_a_graph(tmp_path):
    state = Run(small(), tmp_path).read([a_chunk()])
    assert not state.blocks[0].ssm.requires_grad and state.blocks[0].ssm.abs().sum() > 0


def test_allocator_warm_up_changes_neither_random_numbers_nor_gradients(tmp_path):
    run = Run(small(allocator_warmup_len=16), tmp_path)
    before = torch.get_rng_state()
    run.warm_up_allocator(toy())
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in run.model.parameters())


def test_an_epoch_without_labels_makes_no_update(tmp_path):
    "Neither weight decay nor the weights of the tasks move anything."
    run, unlabelled = Run(small(), tmp_path), toy()._replace(fit=Targets(*[torch.full((2000,), torch.nan)] * 4))
    before = [p.detach().clone() for p in run.model.parameters()]
    train_epoch(run, unlabelled, 10, lambda run, record: None)
    assert (run.step, run.epoch) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


def test_validation_reads_nothing_after_its_last_row(tmp_path):
    model, data, nan = Run(small(), tmp_path).model, toy(), torch.full((500,), torch.nan)
    longer = data._replace(x=torch.cat([data.x, torch.full((500, 6), torch.nan)]),
                           valid=Targets(*(torch.cat([v, nan]) for v in data.valid)))
    assert validation_loss(model, longer) == validation_loss(model, data)


@pytest.mark.parametrize("amp, error", [("off", 0.), ("bf16", .05), ("fp16", .01)])
def test_mixed_precision_keeps_state_and_heads_in_float32(tmp_path, amp, error):
    x, run = torch.randn(2, 9, 6), Run(small(dropout=0., amp=amp), tmp_path)
    torch.nn.init.normal_(run.model.heads.regressor.weight, std=.1)
    got, state = run.forward(x, None)
    want, _ = run.model(x)
    assert (got.p90 - want.p90).abs().max() <= error and (amp == "off" or not torch.equal(got.p90, want.p90))
    assert all(v.dtype == torch.float32 for v in (*got, *state.blocks[0]))


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_two_newest_the_best_and_the_last_epochs(tmp_path):
    run = Run(small(keep=1), tmp_path)
    for run.step, total in enumerate((3., 1., math.nan, 2., 4.)):
        run.histories.epochs.append(dict(step=run.step, epoch=run.step, total=total))
        run.save()
    for run.step in (5, 6, 7): run.save()
    assert [step_of(p) for p in checkpoints(run.folder.checkpoints)] == [7, 6, 4, 1]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    run = Run(small(), tmp_path)
    run.step, run.carried = 8, (torch.tensor(math.inf),)
    with pytest.raises(ValueError, match="1 tensors at step 8 are not finite and were not saved"): run.save()


def test_a_folder_without_checkpoints_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="no valid checkpoint"): Run.load(tmp_path / "nothing")


def test_a_history_shorter_than_its_checkpoint_is_refused(tmp_path):
    run = Run(small(), tmp_path)
    append_jsonl(run.folder.metrics, dict(step=1))
    with pytest.raises(ValueError, match="metrics.jsonl is shorter than"):
        run.histories.truncate({**run.histories.lengths(), "metrics.jsonl": 13}, epoch=0)


# --- trainings -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[TrainConfig, Path]:
    "A finished training of two epochs that warms up the allocator and saves often."
    torch.set_num_threads(1)
    config, out = small(epochs=2, allocator_warmup_len=8, save_every=2), tmp_path_factory.mktemp("whole")
    train(config, toy(), out)
    return config, out


@pytest.mark.parametrize("step", [1, 5, 9], ids=["before the first save", "after two saves", "in the second epoch"])
def test_resume_with_allocator_warm_up_gives_the_same_histories(whole, tmp_path, step):
    config, out = whole
    with pytest.raises(Killed): train(config, toy(), tmp_path, on_update=kill_at(step))
    train(config, toy(), tmp_path)
    for name in ("metrics", "validation"): assert lines(tmp_path, name) == lines(out, name)


def test_a_training_of_no_epoch_can_be_loaded(tmp_path):
    run = train(small(epochs=0), toy(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), Run.load(tmp_path).model.parameters()))


def test_changed_code_is_a_warning_where_a_training_continues(whole, tmp_path, monkeypatch):
    config, out = whole
    train(config, toy(), tmp_path, until=1)
    monkeypatch.setattr("cryptopredict.storage.code_hash", lambda: "another")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for folder in (out, tmp_path): train(config, toy(), folder)  # the first is finished: nothing is done to it
    assert (len(caught), [e["event"] for e in lines(tmp_path, "events")]) == (1, ["other code"])


def test_weights_alone_can_forecast_and_count_as_finished(whole, tmp_path):
    config, out = whole
    train(config, toy(), tmp_path)
    keep_weights_only(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(Run.load(out).model.parameters(), Run.load(tmp_path).model.parameters()))
    assert train(config, toy(), tmp_path).epoch == 2


def test_weights_alone_cannot_be_trained_further(whole, tmp_path):
    config, _ = whole
    train(config, toy(), tmp_path)
    keep_weights_only(tmp_path, 1)
    with pytest.raises(ValueError, match="holds only the weights of a finished training run"): train(config, toy(), tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(whole):
    config, out = whole
    with pytest.raises(ValueError, match="config.toml is a file: choose"): train(config, toy(), out / "config.toml")


def test_other_data_are_refused(whole):
    config, out = whole
    data = toy()
    other = data._replace(x=torch.cat([data.x[:-1], data.x[-1:] + 1]))
    with pytest.raises(ValueError, match="holds another run .data: .{12} in the folder"): train(config, other, out)


def test_best_epoch_is_that_of_the_lowest_finite_mean(tmp_path):
    for out, totals in (("one", (3., 1., math.nan, 2.)), ("two", (1., 4., 1., 1.))):
        (tmp_path / out).mkdir()
        for epoch, total in enumerate(totals): append_jsonl(tmp_path / out / "validation.jsonl", dict(epoch=epoch, total=total))
    assert (best_epoch(tmp_path / "one"), best_epoch(tmp_path / "one", tmp_path / "two")) == (1, 3)


@pytest.fixture(scope="module")
def market():
    "Features and labels of a built-in market."
    panel, _ = simulate_market(24 * 365 * 2, seed=5)
    return build_features(panel), make_labels(panel.close)


@pytest.mark.parametrize("changes", [
    dict(bptt="span:3"), dict(bptt="exact", epochs=3), dict(dataset="windows", tbptt_len=64, batch=32), dict(target="path"),
    dict(amp="bf16"), dict(amp="fp16", bptt="span:2")], ids=lambda c: " ".join(map(str, c.values())))
def test_every_kind_of_training_moves_all_blocks(market, tmp_path, changes):
    rows = np.arange(24 * 410, 24 * 560)
    data = fold_data(*market, rows, target=changes.get("target", "terminal"))._replace(start=int(rows[0]))
    config = train_preset("tiny", data.x.shape[1], **dict(batch=8, tbptt_len=128, epochs=1) | changes)
    run = train(config, data, tmp_path / "out")
    start = Run(run.config, tmp_path).model
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(start.blocks.parameters(), run.model.blocks.parameters()))


def test_a_short_history_is_learned_by_heart(market, tmp_path):
    data = fold_data(*market, np.arange(8000, 8600))._replace(start=8000)
    train(train_preset("tiny", data.x.shape[1], epochs=60, batch=1, tbptt_len=64, lr=5e-3, dropout=0.), data, tmp_path)
    losses = [m["cls"] for m in lines(tmp_path, "metrics")]
    assert np.mean(losses[-8:]) < .1 < np.mean(losses[:8])
