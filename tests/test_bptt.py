"Backpropagation through many chunks: memory that does not grow, and chunks cut into micro-batches."

import gc

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cryptopredict.bptt import MicroBatcher, bptt_chunks, span_backward
from cryptopredict.multitask import MultitaskModel, Targets, preset
from cryptopredict.streams import Chunk

SMALL = dict(n_features=6, d_model=16, d_state=8, headdim=8, mlp=16, chunk=8, n_heads=2, kv_window=11, pool_window=5)


@pytest.mark.parametrize("text", ["span:0", "span:", "span:-1", "span:1.5", "full", "", 3, "span:1000001"])
def test_a_wrong_form_of_bptt_gets_the_allowed_ones(text):
    with pytest.raises(ValueError, match="bptt is .*: give 'truncated', 'exact' or 'span:K'"): bptt_chunks(text)


def test_no_chunk_is_an_error():
    with pytest.raises(ValueError, match="chunks is empty"): span_backward(None, None, [], None)


def live_bytes() -> int:
    "Bytes of all tensors that Python holds, each storage once."
    found = {}
    for v in gc.get_objects():
        if type(v) in (torch.Tensor, nn.Parameter): found[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
    return sum(found.values())


def kept_bytes(chunks: int, sizes: dict) -> tuple[int, int]:
    "Peak of the live bytes while chunks are differentiated, and the bytes of one state."
    torch.manual_seed(0)
    model, seen = MultitaskModel(preset("tiny", **SMALL | sizes)), []
    inputs = torch.randn(2, 64 * chunks, 6).split(64, 1)

    def loss(f, chunk):
        seen.append(live_bytes())
        return f.sigma.log().square().mean()
    span_backward(model, loss, inputs, None)
    gc.collect()
    return max(seen), sum(v.numel() * v.element_size() for v in tree_leaves(model.init_state(2)))


@pytest.mark.parametrize("sizes", [dict(pooling="mean", attention_every=1), dict(pooling="attention")], ids=str)
def test_each_further_chunk_costs_its_inputs_one_state_and_one_generator(sizes):
    gc.collect()
    (few, state), (many, _) = kept_bytes(4, sizes), kept_bytes(12, sizes)
    inputs, generator = 2 * 64 * 6 * 4, torch.get_rng_state().numel()
    assert many - few <= 1.1 * 8 * (state + inputs + generator), (few, many, state)


def test_a_chunk_is_whole_at_first_then_cut_by_streams_then_by_hours():
    direction = torch.where(torch.arange(9) < 5, torch.ones(2, 9), torch.nan)
    chunk, batcher = Chunk(torch.randn(2, 9, 6), Targets(direction, *[torch.ones(2, 9)] * 3), False), MicroBatcher()
    assert [p.share for pieces, _ in batcher.split([chunk], None) for p in pieces] == [None]
    for _ in range(2): batcher.halve([chunk])
    assert batcher.state_dict() == dict(rows=1, pieces=2)
    pieces = [piece for pieces, _ in batcher.split([chunk], None) for piece in pieces]
    assert [p.x.shape[:2] for p in pieces] == [(1, 5), (1, 4)] * 2
    assert [p.share for p in pieces][:2] == [(.5, 5 / 18, 5 / 18, 5 / 18), (0., 4 / 18, 4 / 18, 4 / 18)]
