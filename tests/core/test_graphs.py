"""Buckets, padding, and replays that read nothing but tensors at fixed addresses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepengine import LLM, SamplingParams
from stepengine.core.batch import Batch, Staging
from stepengine.core.graphs import MOST_TOKENS, Bucket, Graphs, bucket_of, decode_bucket, decode_buckets
from stepengine.core.kv_pool import KVPool
from stepengine.core.plan import Chunk
from stepengine.core.request import Request
from stepengine.errors import InvalidSetting
from stepengine.model.config import ModelConfig

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 19, [9, 10] * 6, [11], [3, 1, 4, 1, 5]]


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_decode_bucket_is_the_smallest_that_holds_the_rows(rows: int, most: int):
    rows = min(rows, most)
    fitting = [size for size in decode_buckets(most) if size >= rows]
    assert decode_bucket(rows, most) == min(fitting)
    assert max(decode_buckets(most)) == most
    assert decode_bucket(rows, most) - rows < 8


@given(st.integers(1, 1000), st.integers(1, 64), st.integers(64, 128))
def test_a_mixed_bucket_has_a_row_to_spare_for_its_padding(tokens: int, rows: int, most: int):
    tokens = max(tokens, rows + 1)
    bucket = bucket_of(tokens, rows, most)
    if tokens > MOST_TOKENS:
        assert bucket is None
    else:
        assert bucket is not None and bucket.tokens >= tokens and rows < bucket.rows <= most + 1
        assert bucket.tokens < 2 * tokens or tokens < 8


@given(st.data())
def test_padding_lies_in_block_0_and_covers_the_bucket(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    most, block_size = 6, 4
    requests = {n: Request(n, [7] * length, GREEDY, 100) for n, length in enumerate(lengths)}
    for number, request in requests.items():
        request.blocks = [3 * number + 1, 3 * number + 2, 3 * number + 3]
    chunks = [Chunk(n, 0, length) for n, length in enumerate(lengths)]
    bucket = bucket_of(sum(lengths), len(lengths), most)
    assert bucket is not None
    staging = Staging(CPU, most + 1, MOST_TOKENS, 3, block_size)
    plain = Staging(CPU, most, MOST_TOKENS, 3, block_size).fill(chunks, requests)
    staging.fill(chunks[:1], requests)  # something old is left in the buffer
    batch = staging.lay_out(chunks, requests, bucket)
    tokens, rows = plain.num_tokens, plain.num_rows
    assert (batch.num_tokens, batch.num_rows) == bucket and len(batch.ids) == bucket.tokens
    for name in Staging.TOKEN_FIELDS:
        assert getattr(batch, name)[:tokens].tolist() == getattr(plain, name).tolist()
    for name in Staging.ROW_FIELDS:
        assert getattr(batch, name)[:rows].tolist() == getattr(plain, name).tolist()
    assert batch.slots[tokens:].sum() == 0 and batch.block_table[rows:].sum() == 0
    assert batch.cu_q[-1] == bucket.tokens and sum(batch.lengths) == bucket.tokens
    assert batch.cu_q.diff().tolist() == batch.lengths
    assert all(1 <= length <= kv for length, kv in zip(batch.lengths, batch.kv_lens.tolist(), strict=True) if length)
    assert (batch.kv_lens >= 1).all() and (batch.temperature[rows:] == 0).all()


def test_a_row_that_changes_hands_is_written_anew():
    staging = Staging(CPU, 4, 16, 2, 4)
    first = Request(0, [1, 2, 3], SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.25), 9, noise_key=4)
    other = Request(1, [1, 2, 3], GREEDY, 9)
    first.blocks, other.blocks = [2, 3], [1]
    requests = {0: first, 1: other}
    assert staging.fill([Chunk(0, 2, 1)], requests).block_table.tolist() == [[2, 3]]
    batch = staging.fill([Chunk(1, 2, 1)], requests)
    assert batch.block_table.tolist() == [[1, 0]]
    assert [float(batch.temperature), int(batch.top_k), float(batch.top_p), float(batch.min_p)] == [0, 0, 1, 0]
    other.blocks[0] = 3  # what a copy-on-write does
    assert staging.fill([Chunk(1, 2, 1)], requests).block_table.tolist() == [[3, 0]]
    batch = staging.fill([Chunk(0, 2, 1)], requests)
    assert int(batch.noise_key) == 4 and int(batch.top_k) == 3 and batch.block_table.tolist() == [[2, 3]]


class FromTensors:
    """Attention that asks nothing of the host, as a captured step must: every chunk against every slot, masked."""

    capturable = True

    def __init__(self, config: ModelConfig, pool: KVPool) -> None:
        self.pool, self.scale = pool, 1 / math.sqrt(config.head_dim)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        storage, size = self.pool.layers[layer], self.pool.block_size  # [N + 1, 2, Hk, size, D]
        block, offset = batch.slots.long() // size, batch.slots.long() % size
        storage[block, 0, :, offset] = k
        storage[block, 1, :, offset] = v
        row = torch.searchsorted(batch.cu_q[1:].contiguous(), torch.arange(len(q), dtype=torch.int32), right=True)
        seen = storage[batch.block_table.long()[row]]  # [T, M, 2, Hk, size, D]
        keys, values = seen.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [T, Hk, M * size, D]
        grouped = q.unflatten(1, (k.shape[1], -1))  # [T, Hk, G, D]
        scores = torch.einsum("thgd,thld->thgl", grouped, keys) * self.scale
        last = batch.kv_lens[row] - batch.cu_q[1:][row] + torch.arange(len(q))  # position of each query
        future = torch.arange(keys.shape[2])[None, :] > last[:, None]
        weights = scores.masked_fill(future[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("thgl,thld->thgd", weights, values).flatten(1, 2)


def build(graphs: Graphs | None, **settings: Any) -> LLM:
    padded = "padded" if graphs is not None else None
    llm = LLM("tiny-random", stage=3, attention=FromTensors, cuda_graphs=padded, trace=True, **settings)
    if graphs is not None:
        llm.engine.runner.graphs = graphs
        llm.engine.runner.warm_up()
    return llm


SETTINGS = [
    GREEDY,
    SamplingParams(temperature=0.9, seed=1, max_tokens=9),
    SamplingParams(temperature=0.9, seed=1, max_tokens=9, top_k=5, top_p=0.9),
    SamplingParams(temperature=0, max_tokens=9, repetition_penalty=1.4, logprobs=2),
]


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_replay_with_new_data_gives_the_tokens_of_an_eager_step(pipelined: bool):
    """A capture that keeps the step as Python called it, with the batch of that time, replays as a CUDA graph does."""
    captured: list[Callable[[], None]] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return work

    sizes: dict[str, Any] = dict(max_num_seqs=4, max_model_len=64, block_size=4, num_blocks=40)
    plain, replayed = build(None, **sizes), build(Graphs(capture), **sizes, pipelined=pipelined)
    assert len(captured) == len(decode_buckets(4)) == 3
    for params in SETTINGS * 2:
        want = [(out.outputs[0].token_ids, out.outputs[0].logprobs is None) for out in plain.generate(PROMPTS, params)]
        got = [
            (out.outputs[0].token_ids, out.outputs[0].logprobs is None) for out in replayed.generate(PROMPTS, params)
        ]
        assert got == want
    assert replayed.trace is not None
    steps = [record for record in replayed.trace.steps if record.plan.chunks]
    assert all(record.replayed >= record.plan.num_tokens for record in steps if record.replayed)
    assert {record.replayed for record in steps if len(record.plan.chunks) == record.plan.num_tokens} <= {1, 2, 4}
    assert sum(record.replayed == 0 for record in steps) == len(captured) - 3, "only a bucket's first step is eager"


def test_buffers_stay_where_they_are():
    llm = LLM(
        "tiny-random", stage=3, cuda_graphs="padded", max_num_seqs=4, max_model_len=64, num_blocks=40, block_size=4
    )
    staging, places = llm.engine.runner.staging, set()
    send = staging.send

    def noted(batch: Batch) -> None:
        places.add(
            (batch.num_rows, *(getattr(batch, name).data_ptr() for name in (*Staging.ROW_FIELDS, "ids", "slots")))
        )
        send(batch)

    staging.send = noted  # type: ignore[method-assign]
    llm.generate(PROMPTS, GREEDY)
    assert len(places) == len({rows for rows, *_ in places})


def test_graphs_capture_each_bucket_once():
    done: list[str] = []
    graphs = Graphs(lambda work: (done.append("captured"), lambda: done.append("replayed"))[1])
    told = [graphs.run(Bucket(8, 2), lambda: done.append("ran")) for _ in range(3)]
    assert done == ["ran", "captured", "replayed", "replayed"] and told == [0, 8, 8]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cuda_graphs": True}, "device is 'cpu'"),
        ({"cuda_graphs": "yes"}, "'padded'"),
        ({"pipelined": 1.5}, "True or False"),
        ({"stage": 2, "pipelined": True}, "use stage 3"),
        ({"stage": 2, "cuda_graphs": "padded"}, "use stage 3"),
    ],
)
def test_switches_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(InvalidSetting, match=words):
        LLM("tiny-random", **{"stage": 3, **settings})


def test_an_attention_that_cannot_be_captured_is_refused():
    from stepengine.stage2_paged.attention import PagedAttention

    with pytest.raises(InvalidSetting, match="PagedAttention cannot be captured"):
        LLM("tiny-random", stage=3, cuda_graphs="padded", attention=PagedAttention)
