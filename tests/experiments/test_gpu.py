"""On a machine with a GPU (`make gpu`): models are what they are on the CPU, and a training step never waits for the device."""

import pytest
import torch

from experiments.gpu_parts import full_precision
from kernels import backend
from options.training import TrainConfig
from runs.optimization import make_loss
from runs.training import Training
from tests.kernels.test_fake_cuda import MODELS
from train_eval import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
models = pytest.mark.parametrize(("kind", "config"), MODELS, ids=lambda value: getattr(value, "layer", None))


@pytest.fixture(autouse=True)
def strict_and_precise():
    """A kernel that cannot run fails the test, and float32 is not TF32, which would choose other neighbors."""
    with full_precision(), backend.use("triton"):
        yield


@models
def test_a_model_is_the_one_on_the_cpu(kind, config):
    model = kind(config).eval()
    images = torch.randn(4, 3, *config.image_size)
    expected = model(images)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    found = model.cuda()(images.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            scale = max(1, gradient.abs().max().item())
            torch.testing.assert_close(parameter.grad.cpu(), gradient, atol=1e-3 * scale, rtol=1e-3)


@models
@pytest.mark.parametrize("use_amp", [False, True])
def test_ten_steps_never_wait_for_the_device(kind, config, use_amp):
    device = torch.device("cuda")
    training = Training(kind(config).to(device), TrainConfig(use_amp=use_amp), device, 100)
    images, labels = torch.randn(8, 3, *config.image_size, device=device), torch.randint(0, 10, (8,), device=device)
    loss = make_loss("CrossEntropy")
    train_step(training, images, labels, loss)  # kernels are compiled, tables made
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            train_step(training, images, labels, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
