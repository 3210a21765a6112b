"""Seeds, and hashes that serve as random numbers: functions of (seed, epoch, index) instead of a generator's state.

An image is augmented alike for every batch size and number of workers, and after an interruption.
"""

import math
import os

import torch
from torch import Tensor


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch on all devices; `deterministic` also forbids operations whose result may vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
        torch.use_deterministic_algorithms(True)
    # cuDNN's benchmark picks the fastest algorithm by timing, so another one from run to run.
    torch.backends.cudnn.benchmark = not deterministic


def hash_int32(x: Tensor) -> Tensor:
    """Apply the finalizer of MurmurHash3 in place to int32: a bijection after which every bit depends on every bit."""
    # Shifts of int32 are arithmetic: the masks clear the copies of the sign. Products wrap around, as the hash needs. Its
    # factors are unsigned, hence less 2^32 here.
    x ^= (x >> 16) & 0xFFFF
    x *= 0x85EBCA6B - 2**32
    x ^= (x >> 13) & 0x7FFFF
    x *= 0xC2B2AE35 - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def keys(seed: int, epoch: int, index: Tensor, stream: int, salt: int = 0) -> Tensor:
    """Return an int32 per index; no two indices share one within the same (seed, epoch, stream)."""
    x = index.to(torch.int32, copy=True)
    for word in (stream, epoch, seed):
        word = (word * 0x9E3779B9 + salt + 1) % 2**32
        x = hash_int32(x.add_(word - 2**32 if word >= 2**31 else word))
    return x


def uniform(seed: int, epoch: int, index: Tensor, n: int, stream: int = 0) -> Tensor:
    """Return `n` numbers in [0, 1) for each image: index (B,) -> float32 (B, n), in steps of 2^-24.

    Row b depends on (seed, epoch, index[b], stream) only.
    """
    # Counter-based: number n of an image is a hash of start + n * stride, so each row is independent of the others.
    start = keys(seed, epoch, index, stream)[:, None]
    # Images have different strides: otherwise two of them could share a stretch of their sequences.
    stride = keys(seed, epoch, index, stream, salt=1)[:, None] | 1
    # Counters are hashed first: multiples of one stride differ by a constant, which shows through a single hash.
    columns = hash_int32(torch.arange(1, n + 1, dtype=torch.int32, device=index.device))
    x = hash_int32(stride * columns + start)
    # The upper 24 bits, as many as float32 holds exactly: every value is below 1.
    return ((x >> 8) & 0xFFFFFF).float().mul_(2**-24)


def gaussian(seed: int, epoch: int, index: Tensor, n: int, stream: int = 0) -> Tensor:
    """Return `n` standard normal numbers for each image: index (B,) -> float32 (B, n), by the Box-Muller method."""
    half = (n + 1) // 2
    first, second = uniform(seed, epoch, index, 2 * half, stream).split(half, dim=1)
    # log(1 - u) instead of log(u): u can be 0, and is never 1.
    radius = torch.log1p(-first).mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :n]
