"""The sampler draws from exactly the distribution that its settings say, from noise that is a pure function."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from stepengine.core.batch import Staging
from stepengine.core.plan import Chunk
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.sampler import gumbel, noise_key, penalise, sample
from tests.noise import noise

VOCAB = 12
LOGITS = np.array([2.0, 1.4, 1.1, 0.9, 0.2, 0.0, -0.3, -0.8, -1.0, -1.9, -2.5, -6.0])[
    [7, 3, 0, 10, 5, 2, 11, 1, 8, 6, 4, 9]
]
ROWS, REPEATS = 10_000, 12


def exact(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Probabilities in float64, step by step: temperature, min-p, top-k, top-p of what is left."""
    weight = [math.exp(value / temperature) for value in logits]
    peak = max(weight)
    weight = [w if w >= min_p * peak else 0.0 for w in weight]
    order = sorted(range(len(weight)), key=lambda token: -weight[token])
    if top_k > 0:
        for token in order[top_k:]:
            weight[token] = 0.0
    total, reached = sum(weight), 0.0
    for token in order:
        if top_p < 1 and reached >= top_p:
            weight[token] = 0.0
        reached += weight[token] / total
    return np.array(weight) / sum(weight)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's chi-square test; 0 where something impossible was drawn. Rare cells are pooled."""
    if counts[probabilities == 0].sum():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def run(logits: torch.Tensor, requests: Sequence[Request], chunks: Sequence[Chunk] | None = None) -> list[int]:
    """One call of `sample` on rows that a real staging buffer laid out."""
    chunks = chunks or [Chunk(request.id, request.num_tokens - 1, 1) for request in requests]
    staging = Staging(torch.device("cpu"), len(requests), len(requests), 0, 0)
    by_id = {request.id: request for request in requests}
    return sample(logits, staging.fill(chunks, by_id), requests)[0].tolist()


def row(number: int, params: SamplingParams, prompt: Sequence[int] = (1, 2, 3), outputs: Sequence[int] = ()) -> Request:
    request = Request(number, list(prompt), params, 10_000, state=State.RUNNING)
    request.noise_key = noise_key(number, 0)
    request.token_ids.extend(outputs)
    return request


def draw(**settings: Any) -> np.ndarray:
    """How often each token comes, over seeds 0, 1, 2, ... and several positions of each."""
    params = SamplingParams(**settings)
    requests = {seed: row(seed, params) for seed in range(ROWS)}
    chunks = [Chunk(seed, 2, 1) for seed in requests]
    batch = Staging(torch.device("cpu"), ROWS, ROWS, 0, 0).fill(chunks, requests)
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(ROWS, VOCAB)
    counts = np.zeros(VOCAB, dtype=np.int64)
    for _ in range(REPEATS):
        counts += np.bincount(sample(logits, batch, list(requests.values()))[0].numpy(), minlength=VOCAB)
        batch.kv_lens += 1
    return counts


SETTINGS: list[dict[str, Any]] = [
    dict(temperature=1.0),
    dict(temperature=0.6),
    dict(temperature=2.5),
    dict(temperature=1.0, top_k=4),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=1.0, min_p=0.15),
    dict(temperature=1.3, top_k=7, top_p=0.7),
    dict(temperature=0.8, top_k=9, top_p=0.95, min_p=0.05),
    dict(temperature=1.0, top_k=10**12, top_p=1e-9),
    dict(temperature=1.0, top_k=-1, min_p=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_exact_distribution(settings: dict[str, Any]):
    assert p_value(draw(**settings), exact(LOGITS, **settings)) > 1e-3


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_test_is_sharp_enough_for_an_error_of_five_per_cent(temperature: float):
    counts = draw(temperature=temperature)
    assert p_value(counts, exact(LOGITS, 1.05 * temperature)) < 1e-3
    assert p_value(counts, exact(LOGITS, temperature / 1.05)) < 1e-3
    heavier = exact(LOGITS, temperature)
    heavier[7] *= 1.05
    assert p_value(counts, heavier / heavier.sum()) < 1e-3


def test_settings_of_one_row_do_not_touch_another():
    mixed = [SamplingParams(**settings) for settings in SETTINGS] + [SamplingParams(temperature=0.0)]
    rows = [row(seed, mixed[seed % len(mixed)]) for seed in range(11 * 40)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(5))
    together = run(logits, rows)
    assert together == [run(logits[i : i + 1], [request])[0] for i, request in enumerate(rows)]
    assert together[10::11] == logits[10::11].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-38, 1e-50, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = torch.randn(200, 999, generator=torch.Generator().manual_seed(5)) * 5
    rows = [row(seed, SamplingParams(temperature=temperature)) for seed in range(200)]
    assert run(logits, rows) == logits.argmax(-1).tolist()


# -- noise --------------------------------------------------------------------------------------------


def test_noise_is_the_documented_hash():
    keys = [0, 1, -1, 7, 2**31 - 1, -(2**31), noise_key(3, 4)]
    positions = [0, 1, 2, 4095, 131072, 2**31 - 1]
    pairs = [(key, position) for key in keys for position in positions]
    got = gumbel(*torch.tensor(pairs, dtype=torch.int32).T.contiguous(), 50)
    want = torch.tensor([[noise(key, position, token) for token in range(50)] for key, position in pairs])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_noise_is_finite_where_the_hash_is_all_ones():
    key, position, token = 7, 33, 439_384
    line = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor([position], dtype=torch.int32), token + 1)
    assert torch.isfinite(line).all()
    assert noise(key, position, token) > 16  # it is the largest there is
    assert float(line[0, token]) == pytest.approx(noise(key, position, token), rel=1e-4)


def uniform(keys: Sequence[int], positions: Sequence[int], vocab: int) -> np.ndarray:
    values = gumbel(torch.tensor(keys, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32), vocab)
    return np.exp(-np.exp(-values.double().numpy()))


BLOCKS = {
    "tokens of one row": lambda: uniform([noise_key(1, 0)], [10], 200_000)[0],
    "positions of one key": lambda: uniform([noise_key(2, 0)] * 20_000, range(20_000), 10)[:, 3],
    "neighbouring keys": lambda: uniform(range(20_000), [5] * 20_000, 3)[:, 1],
    "neighbouring seeds": lambda: uniform([noise_key(seed, 0) for seed in range(20_000)], [5] * 20_000, 3)[:, 0],
    "neighbouring samples": lambda: uniform([noise_key(9, i) for i in range(20_000)], [5] * 20_000, 3)[:, 2],
    "key up, position down": lambda: uniform(range(20_000), range(20_000, 0, -1), 3)[:, 0],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_noise_is_uniform_and_neighbours_know_nothing_of_each_other(name: str):
    values = BLOCKS[name]()
    count = len(values)
    steps = np.arange(1, count + 1) / count
    assert np.abs(np.sort(values) - steps).max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, p = 0.001
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / math.sqrt(count)
        cells = np.histogram2d(values[:-lag], values[lag:], bins=16, range=[[0, 1], [0, 1]])[0].ravel()
        assert p_value(cells, np.full(256, 1 / 256)) > 1e-4


def test_rows_of_noise_know_nothing_of_each_other():
    keys = [noise_key(seed, index) for seed in range(8) for index in range(4)]
    rows = uniform(keys * 2, [11] * 32 + [12] * 32, 20_000)
    apart = np.corrcoef(rows) - np.eye(64)
    assert np.abs(apart).max() < 5 / math.sqrt(20_000)


def test_keys_tell_seeds_and_samples_apart():
    seeds = range(2000)
    keys = {noise_key(seed, index) for seed in seeds for index in range(4)}
    assert len(keys) > 4 * len(seeds) - 3  # 8,000 keys of 32 bits: one meeting is already unlikely
    wide = [noise_key(seed, 0) for seed in (2**31, 2**63 - 1, -(2**70), 2**200)]
    assert all(-(2**31) <= key < 2**31 for key in [*keys, *wide])


# -- penalties ----------------------------------------------------------------------------------------


def penalised(line: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]) -> list[float]:
    result = []
    for token, value in enumerate(line):
        if token in prompt or token in outputs:
            value = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        times = sum(1 for other in outputs if other == token)
        result.append(value - times * params.frequency_penalty - (params.presence_penalty if times else 0.0))
    return result


def test_penalties_are_their_formulas_row_by_row():
    rows = [
        row(0, SamplingParams(repetition_penalty=1.7), [1, 1, 5], [7, 7, 2]),
        row(1, SamplingParams(), [1], [2]),
        row(2, SamplingParams(presence_penalty=1.5), [3, 4], [4, 4, 9]),
        row(3, SamplingParams(frequency_penalty=-0.7), [3], [0, 0, 0, 11]),
        row(4, SamplingParams(repetition_penalty=0.5, presence_penalty=-2, frequency_penalty=2), [0, 6], [6, 8, 6]),
        row(5, SamplingParams(frequency_penalty=2.0, presence_penalty=1.0), [3, 3, 3], []),
    ]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    before = logits.clone()
    got = penalise(logits, rows)
    want = [penalised(before[i].tolist(), r.params, r.prompt_ids, r.output_ids) for i, r in enumerate(rows)]
    torch.testing.assert_close(got, torch.tensor(want))
    assert torch.equal(logits, before), "the raw logits belong to the log probabilities"


def test_no_stop_token_before_min_tokens():
    logits = torch.zeros(4, VOCAB)
    logits[:, 5] = 10
    logits[:, 6] = 8
    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=9)
    rows = [row(number, params, outputs=[1] * number) for number in range(4)]
    for request in rows:
        request.stop_ids = frozenset({5})
    assert run(logits, rows) == [6, 6, 5, 5]
