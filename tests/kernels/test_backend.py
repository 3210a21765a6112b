"""Fallbacks from Triton: by operator and configuration, and never under `triton` or after an error of the device."""

import pytest
import torch

from kernels import attention, backend
from kernels.operators import BACKENDS

X = torch.zeros(1, 5, 8)


@pytest.fixture(autouse=True)
def no_failures(monkeypatch):
    monkeypatch.setattr(backend, "_failed", set())


class Kernel:
    """A kernel that Triton cannot compile for 8 channels."""

    def __init__(self, message: str = "out of resource: shared memory", name: str = "search"):
        self.message, self.__name__, self.calls = message, name, 0

    def __call__(self, x, K):
        self.calls += 1
        if x.shape[-1] == 8:
            raise RuntimeError(self.message)
        return x


def test_a_failure_is_remembered_for_its_configuration_alone():
    kernel, other = Kernel(), Kernel(name="aggregate")
    with backend.use("auto"):
        with pytest.warns(
            UserWarning, match=r"search\(float32 8, 9\) runs without Triton: RuntimeError: out of resource"
        ) as caught:
            assert backend.attempt(kernel, X, 9) is None
            assert backend.attempt(kernel, X[:, :3], 9) is None
        assert kernel.calls == len(caught) == 1
        assert backend.attempt(kernel, X[..., :4], 9) is not None
        for given in ((X.bfloat16(), 9), (X, 4)):
            with pytest.warns(UserWarning):
                assert backend.attempt(kernel, *given) is None
        with pytest.warns(UserWarning, match="aggregate"):
            assert backend.attempt(other, X, 9) is None
    assert kernel.calls == 4 and other.calls == 1


def test_under_triton_every_error_is_raised():
    with backend.use("triton"), pytest.raises(RuntimeError, match="out of resource"):
        backend.attempt(Kernel(), X, 9)
    assert not backend._failed


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [CUDA]: unspecified launch failure",
        "CUDA out of memory. Tried to allocate 2 GiB",
    ],
)
def test_errors_of_the_device_are_raised(message):
    with backend.use("auto"), pytest.raises(RuntimeError, match="CUDA"):
        backend.attempt(Kernel(message), X, 9)
    assert not backend._failed


def test_under_triton_what_no_kernel_covers_is_refused():
    with backend.use("triton"):
        with pytest.raises(RuntimeError, match=r"no Triton kernel computes search of float64 \(1, 5, 8\); use kernels=auto"):
            backend.check_fallback("search", (X.double(), 9))
        backend.check_fallback("search", (X[:0].double(), 9))
    with backend.use("auto"):
        backend.check_fallback("search", (X.double(), 9))


def test_under_triton_attention_that_no_kernel_covers_is_refused():
    pytest.importorskip("triton")
    heads = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    with backend.use("triton"), pytest.raises(RuntimeError, match="no Triton kernel computes neighbor_attention of float64"):
        attention._on_cuda(heads, heads, heads, None, 3, 1.0)


def test_a_kernel_that_does_not_cover_the_arguments_is_false():
    """Not None, which says that an operator has none."""
    cuda = pytest.importorskip("kernels.cuda")
    x, index = X.double(), torch.zeros(1, 5, 3, dtype=torch.long)
    pairs, weight = torch.zeros(1, 5, 3), torch.zeros(3, 8).double()
    given = {
        "find_neighbors": (x, x, 3, "matmul", None, None),
        "find_scored_neighbors": (x, x, 3, None, None),
        "pair_scores": (x, x, index, False),
        "pair_scores_backward": (pairs, x, x, index, False),
        "aggregate": (x, index, weight, None, True),
        "aggregate_backward": (x, x, index, weight, None, True, True),
        "weighted_sum": (x, index, pairs),
        "weighted_sum_backward": (x, x, index, pairs),
        "max_neighbors": (x, index),
    }
    for operator, _, _, kernel in BACKENDS:
        if operator._name in given:
            assert kernel(cuda, *given[operator._name]) is False, operator._name


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "triton_kernels", lambda: None)
    with backend.use("auto"):
        assert not backend.may_use_triton()
    with backend.use("triton"), pytest.raises(RuntimeError, match="kernels=triton: Triton is not installed; use kernels=auto"):
        backend.may_use_triton()
