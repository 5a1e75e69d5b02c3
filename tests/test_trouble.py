"""Trainings with losses or gradients that are not finite, spikes of the loss, or too little memory."""

import math
import signal

import pytest
import torch
from helpers import in_child
from trainings import config, data, die, die_at, differences, history, outcome

from cryptopredict import tbptt_trainer
from cryptopredict.checkpoint import checkpoints, load_latest
from cryptopredict.tbptt_trainer import Histories, Run, chunks_of, train, train_preset, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


def all_finite(run: Run) -> bool:
    """Whether all weights and the optimiser's moments are finite."""
    kept = [*run.model.state_dict().values(), *(v for s in run.optimiser.adamw.state.values() for v in s.values())]
    return all(torch.isfinite(v).all() for v in kept)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(spoil, tmp_path, factor, amp):
    spoil({2}, factor)
    run, seen = Run(config(amp=amp, lr=1e-3), tmp_path), []
    fold = data()
    state, chunks = None, list(chunks_of(run.config, fold, 0))
    for chunk in chunks[1:5]:
        before = [v.clone() for v in run.model.state_dict().values()], repr(run.optimiser.adamw.state_dict()["state"]), state
        state, record = train_step(run, [chunk], state, 10)
        same = all(torch.equal(a, b) for a, b in zip(before[0], run.model.state_dict().values()))
        kept = before[2] is not None and torch.equal(state.blocks[0].ssm, before[2].blocks[0].ssm)
        seen.append((bool(record["skipped"]), same, before[1] == repr(run.optimiser.adamw.state_dict()["state"]), kept))
    assert seen == [(False,) * 4] * 2 + [(True,) * 4] + [(False,) * 4]


def test_skipped_steps_are_logged_and_resume_is_bit_identical(spoil, tmp_path):
    spoil({2, 3, 7, 12}, math.nan)
    run = train(config(), data(), tmp_path / "whole")
    assert all_finite(run) and [e["step"] for e in history(tmp_path / "whole", "events")] == [3, 4, 8, 13]
    assert sum(m["skipped"] for m in history(tmp_path / "whole", "metrics")) == 4
    assert in_child(lambda: train(config(), data(), tmp_path / "out", on_update=die_at(8))) == -signal.SIGKILL
    train(config(), data(), tmp_path / "out")
    assert not differences(tmp_path / "out", outcome(tmp_path / "whole"))


def test_five_skipped_steps_in_a_row_end_the_training_with_a_remedy(spoil, tmp_path):
    spoil(range(7, 100), math.nan)
    with pytest.raises(ValueError, match="5 updates in a row .* lower lr, reduce clip, or disable attention"):
        train(config(), data(), tmp_path)
    found = load_latest(tmp_path / "checkpoints")[0]
    assert found["step"] <= 11 and all(torch.isfinite(v).all() for v in found["model"].values())


@pytest.mark.parametrize("times, rewinds", [(1, 1), (2, 2), (9, 3)])
def test_a_spike_is_rewound_at_most_three_times(spoil, tmp_path, times, rewinds):
    spoil({28}, 1e5, times)
    c = config(epochs=6)
    run = train(c, data(), tmp_path)
    events, metrics = history(tmp_path, "events"), history(tmp_path, "metrics")
    assert [e["event"] for e in events] == ["rewind"] * rewinds + ["spike"] * (times > 3)
    assert [e["lr_scale"] for e in events if e["event"] == "rewind"] == [2.**-k for k in range(1, rewinds + 1)]
    assert [m["step"] for m in metrics] == list(range(1, run.step + 1)), "no step is missing or repeated"
    assert run.guard.lr_scale == 2.**-rewinds and metrics[-1]["lr"] < c.lr * 2.**-rewinds
    assert max(m["loss"] for m in metrics) < 1e3 or times > 3


def test_resume_after_a_rewind_and_a_kill_is_bit_identical(spoil, tmp_path):
    spoil({28}, 1e5, 1)
    train(config(epochs=6), data(), tmp_path / "whole")

    def work():
        spoil({28}, 1e5, 1)
        train(config(epochs=6), data(), tmp_path / "out", on_update=die_at(30))
    assert in_child(work) == -signal.SIGKILL
    train(config(epochs=6), data(), tmp_path / "out")
    assert not differences(tmp_path / "out", outcome(tmp_path / "whole"))


@pytest.fixture
def little_memory(monkeypatch):
    """A function that makes forward passes over more than `most` hours (of all streams) raise the error of a full GPU."""
    def do(most):
        plain = Run.forward

        def forward(run, x, state):
            if torch.is_grad_enabled() and x.shape[0] * x.shape[1] > most: raise torch.OutOfMemoryError("CUDA out of memory.")
            return plain(run, x, state)
        monkeypatch.setattr(Run, "forward", forward)
    return do


# 3 streams of 40 hours: two at a time, one at a time, and one in 2, 4 and 8 pieces
@pytest.mark.parametrize("most, rows, pieces", [(119, 2, 1), (79, 1, 1), (39, 1, 2), (10, 1, 4), (5, 1, 8)])
@pytest.mark.parametrize("bptt", ["truncated", "span:3", "exact"])
def test_micro_batches_give_the_same_updates(little_memory, tmp_path, most, rows, pieces, bptt):
    c = config(dropout=0., bptt=bptt, epochs=1)
    whole = train(c, data(), tmp_path / "whole")
    little_memory(most)
    run = train(c, data(), tmp_path / "out")
    assert (run.micro_batcher.rows, run.micro_batcher.pieces, run.step) == (rows, pieces, whole.step)
    assert {e["event"] for e in history(tmp_path / "out", "events")} == {"out of memory"}
    for one, other in zip(history(tmp_path / "whole", "metrics"), history(tmp_path / "out", "metrics")):
        assert all(math.isclose(one[k], other[k], rel_tol=1e-3, abs_tol=1e-5) for k in ("loss", "cls", "p10", "p90", "vol", "lr"))


@pytest.mark.parametrize("rows, pieces", [(2, 1), (1, 1), (0, 2), (1, 3), (1, 7)])
def test_gradients_of_micro_batches_equal_those_of_the_whole(tmp_path, rows, pieces):
    chunk, grads = None, []
    for sizes in (dict(rows=0, pieces=1), dict(rows=rows, pieces=pieces)):
        run = Run(config(dropout=0., lr=0., clip=1e6), tmp_path)
        run.model.double()
        run.micro_batcher.load_state_dict(sizes)
        chunk = chunk or list(chunks_of(run.config, data(), 0))[2]
        wide = chunk._replace(x=chunk.x.double(), targets=type(chunk.targets)(*(v.double() for v in chunk.targets)))
        state, record = train_step(run, [wide], None, 10)
        grads.append(([p.grad for p in run.model.parameters() if p.grad is not None], state.blocks[0].ssm, record["loss"]))
    (one, s, a), (other, t, b) = grads
    gap = lambda u, v: ((u - v).norm() / u.norm().clamp_min(1e-300)).item()
    assert len(one) == len(other) and max(map(gap, one, other)) < 1e-10 and gap(s, t) < 1e-10 and gap(a, b) < 1e-12


def test_too_little_memory_for_one_hour_is_an_error(little_memory, tmp_path):
    little_memory(0)
    with pytest.raises(ValueError, match="out of memory with one stream and one hour at a time"):
        train(config(), data(), tmp_path)
    assert load_latest(tmp_path / "checkpoints")[0]["step"] == 0 and len(checkpoints(tmp_path / "checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 3e-3, 1e-2])
def test_twenty_seeds_of_tiny_stay_finite(tmp_path, lr):
    for seed in range(20):
        run = train(train_preset("tiny", 6, lr=lr, seed=seed, batch=4, tbptt_len=40, epochs=4), data(), tmp_path / str(seed))
        assert all_finite(run) and not history(tmp_path / str(seed), "events")
        for m in history(tmp_path / str(seed), "metrics"):
            bound = lambda s: math.log(100) * math.tanh(s / math.log(100))
            assert all(1e-2 <= math.exp(-bound(m[k])) <= 1e2 for k in ("log_var_cls", "log_var_reg"))


@pytest.mark.parametrize("save_every", [0, 1, 3])
def test_an_update_that_wrecks_the_weights_is_rewound(tmp_path, save_every):
    """The next loss shows it, when the weights may already be in a checkpoint."""
    once = [True]

    def wreck(run, record):
        if run.step != 27 or not once: return
        once.pop()
        with torch.no_grad():
            for p in run.model.parameters(): p.add_(30 * torch.randn_like(p))
    run = train(config(epochs=6, save_every=save_every), data(), tmp_path, on_update=wreck)
    events = history(tmp_path, "events")
    assert [e["event"] for e in events] == ["rewind"] and events[0]["at"] == 28 and events[0]["step"] < 27
    metrics = history(tmp_path, "metrics")
    assert max(m["loss"] for m in metrics) < 100 and [m["step"] for m in metrics] == list(range(1, run.step + 1))


def test_a_training_killed_inside_a_rewind_resumes_bit_identical(spoil, tmp_path, monkeypatch):
    spoil({28}, 1e5)
    train(config(epochs=6), data(), tmp_path / "whole")
    for owner, name in ((tbptt_trainer, "remove"), (Histories, "truncate"), (Run, "record_event"), (Run, "save")):
        def work(owner=owner, name=name):
            plain, rewind = getattr(owner, name), Run.rewind

            def deadly_rewind(run, loss):
                def deadly(*args, **kwargs):
                    plain(*args, **kwargs)
                    die()
                setattr(owner, name, deadly)
                rewind(run, loss)
            Run.rewind = deadly_rewind
            train(config(epochs=6), data(), tmp_path / "out")
        assert in_child(work) in (-signal.SIGKILL, 0)
    train(config(epochs=6), data(), tmp_path / "out")
    assert not differences(tmp_path / "out", outcome(tmp_path / "whole"))


def test_an_out_of_memory_event_is_logged_once(little_memory, tmp_path):
    def work(out, at=0):
        little_memory(79)
        train(config(epochs=1), data(), out, on_update=die_at(at))
    assert in_child(lambda: work(tmp_path / "whole")) == 0
    assert in_child(lambda: work(tmp_path / "out", 2)) == -signal.SIGKILL and in_child(lambda: work(tmp_path / "out")) == 0
    assert not differences(tmp_path / "out", outcome(tmp_path / "whole"))
    assert len(history(tmp_path / "out", "events")) == 2


def test_burn_in_and_allocator_warm_up_also_use_micro_batches(monkeypatch, tmp_path):
    plain = Run.forward

    def forward(run, x, state):
        if x.shape[0] * x.shape[1] > 60 and run.model.training: raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(run, x, state)
    monkeypatch.setattr(Run, "forward", forward)
    run = train(config(epochs=1, allocator_warmup_len=40), data(), tmp_path)
    assert (run.micro_batcher.rows, run.micro_batcher.pieces) == (1, 1) and len(history(tmp_path, "events")) == 2


def test_validation_reads_shorter_pieces_if_memory_is_short(monkeypatch, tmp_path):
    """Validation reads longer pieces than the training does."""
    from cryptopredict.multitask import MultitaskModel
    whole, plain, longest = train(config(dropout=0., epochs=1), data(), tmp_path / "whole"), MultitaskModel.forward, []

    def forward(self, x, *state):
        if x.shape[0] * x.shape[1] > 150: raise torch.OutOfMemoryError("CUDA out of memory.")
        longest.append(x.shape[1])
        return plain(self, x, *state)
    monkeypatch.setattr(MultitaskModel, "forward", forward)
    run = train(config(dropout=0., epochs=1), data(), tmp_path / "out")
    assert run.step == whole.step and max(longest) > 100 and not history(tmp_path / "out", "events")
    for one, other in zip(history(tmp_path / "whole", "validation"), history(tmp_path / "out", "validation"), strict=True):
        assert math.isclose(one["total"], other["total"], rel_tol=1e-5)
