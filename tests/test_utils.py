"""Random numbers as hashes of seed, epoch and index."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import gaussian, keys, uniform


def murmur(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def uniform_in_integers(seed, epoch, index, column, stream):
    keys = []
    for salt in (0, 1):
        x = index
        for word in (stream, epoch, seed):
            x = murmur((x + word * 0x9E3779B9 + salt + 1) % 2**32)
        keys.append(x)
    return (murmur((keys[0] + (keys[1] | 1) * murmur(column + 1)) % 2**32) >> 8) / 2**24


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_uniform_is_the_hash_in_plain_integers(seed, epoch, index):
    drawn = uniform(seed, epoch, torch.tensor(index), 7, stream=2)
    expected = [[uniform_in_integers(seed, epoch, i, column, 2) for column in range(7)] for i in index]
    assert torch.equal(drawn, torch.tensor(expected, dtype=torch.float32))


def test_uniform_is_uniform_and_uncorrelated():
    rows = uniform(0, 0, torch.arange(20000), 50)
    assert 0 <= rows.min() < 1e-5 and 1 - 1e-5 < rows.max() < 1
    assert abs(rows.mean() - 0.5) < 5 * (1 / 12 / 1e6) ** 0.5
    assert abs(rows.var() - 1 / 12) < 5 * (1 / 180 / 1e6) ** 0.5
    counts = torch.bincount((rows * 256).long().flatten(), minlength=256).double()
    chi_squared = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5

    def correlation(a, b):
        return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])

    neighbours = {
        "index": (rows[1:], rows[:-1]),
        "index, shifted": (rows[1:, 1:], rows[:-1, :-1]),
        "column": (rows[:, 1:], rows[:, :-1]),
        "epoch": (rows, uniform(0, 1, torch.arange(20000), 50)),
        "seed": (rows, uniform(1, 0, torch.arange(20000), 50)),
        "stream": (rows, uniform(0, 0, torch.arange(20000), 50, stream=1)),
    }
    for what, (a, b) in neighbours.items():
        assert abs(correlation(a, b)) < 5e-3, what  # five standard deviations of 1e6 pairs
    between_columns = torch.corrcoef(rows.T) - torch.eye(50)
    between_rows = torch.corrcoef(uniform(3, 0, torch.arange(200), 20000)) - torch.eye(200)
    assert between_columns.abs().max() < 6 / 20000**0.5 and between_rows.abs().max() < 6 / 20000**0.5


def test_seed_epoch_and_stream_all_matter_and_no_two_keys_collide():
    index = torch.arange(100)
    rows = [keys(s, e, index, r).tolist() for s in range(10) for e in range(10) for r in range(3)]
    repeats = 30000 - len({key for row in rows for key in row})
    assert repeats < 3  # 0.1 expected of 32-bit numbers drawn at random
    assert len(keys(7, 3, torch.arange(10**6), 1).unique()) == 10**6


def test_gaussian_moments():
    z = gaussian(5, 2, torch.arange(1001), 999, stream=3).double()
    assert z.shape == (1001, 999)
    assert abs(z.mean()) < 5e-3 and abs(z.var() - 1) < 7e-3
    assert abs((z**3).mean()) < 0.02 and abs((z**4).mean() - 3) < 0.05
    assert abs((z.abs() > 3).double().mean() - 0.0027) < 3e-4 and z.abs().max() > 4.2
    halves = torch.corrcoef(torch.stack((z[:, :499].flatten(), z[:, 500:].flatten())))[0, 1]  # cosine and sine
    assert abs(halves) < 8e-3
