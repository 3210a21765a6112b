import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allconvnet
import train_eval
import vit
from dataset import DeviceBatches, Recipe
from options.allconvnet import AllConvNetConfig
from options.training import TrainConfig
from options.vit import ViTConfig
from runs import Stopped
from runs.metrics import Meter, stalled
from runs.optimization import Average, LearningRate, make_loss, make_mix, make_optimizer
from runs.processes import Processes
from runs.training import Training
from tests.helpers.pools import pool_of
from tests.helpers.side_by_side import SideBySide
from train_eval import evaluate, train_one_epoch, train_step

CPU = torch.device("cpu")


def make_batches(n=50, batch_size=16, part="train", classes=3):
    """Three classes that differ in brightness."""
    labels = np.arange(n) % classes
    images = np.random.default_rng(0).integers(0, 60, (n, 1, 4, 4)) + 60 * labels[:, None, None, None]
    recipe = Recipe("digits", part, batch_size, seed=0, resize=4, device=CPU)
    return DeviceBatches(images.astype(np.uint8), labels, np.arange(n), recipe)


def make_model(dropout=0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def make_training(model=None, steps=4, **options):
    config = TrainConfig(**{"num_epochs": 3, "batch_size": 16, "lr": 0.01} | options)
    return Training(model or make_model(), config, CPU, steps)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# --- sums and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 12])
def test_meter_counts_images_not_batches(classes):
    logits, labels = torch.randn(23, classes), torch.randint(0, classes, (23,))
    meter = Meter(CPU)
    for part in (slice(0, 10), slice(10, 20), slice(20, 23)):
        meter.add(F.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    order = logits.argsort(dim=1, descending=True)
    top5 = sum(int(label in row[:5]) for label, row in zip(labels, order, strict=True)) / 23
    metrics = meter.read()
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.top1 == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert metrics.top5 == pytest.approx(100 * top5)
    assert classes > 5 or metrics.top5 == 100  # top-5 of three classes is top-3


def test_meter_counts_the_dominant_label_of_mixed_targets():
    meter = Meter(CPU)
    meter.add(torch.tensor(0.0), torch.eye(3), torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]]))
    assert meter.read().top1 == pytest.approx(200 / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_by_their_formulas(smoothing, soft):
    logits = torch.randn(5, 4).double()
    labels = torch.randint(0, 4, (5,))
    shares = torch.rand(5, 4).double().softmax(1) if soft else torch.eye(4).double()[labels]
    targets = shares if soft else labels
    smoothed = shares * (1 - smoothing) + smoothing / 4
    log_probability = logits - logits.exp().sum(1, keepdim=True).log()
    cross_entropy = -(smoothed * log_probability).sum(1).mean()
    torch.testing.assert_close(make_loss("CrossEntropy", smoothing)(logits, targets), cross_entropy)
    torch.testing.assert_close(make_loss("MSE", smoothing)(logits, targets), ((logits - smoothed) ** 2).mean())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_the_shares_of_pixels(mixup, cutmix):
    """Images of one constant per class: what an image holds of each must be what its target says."""
    labels = torch.arange(8) % 4
    images = F.one_hot(labels, 4).float()[:, :, None, None].expand(-1, -1, 8, 8)
    mix = make_mix(mixup, cutmix, 4)
    seen = set()
    for _ in range(10):
        mixed, targets = mix(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-5, rtol=0)
        seen.add(targets.max(1).values.mean().item())
    assert len(seen) > 1 and make_mix(0.0, 0.0, 4) is None


# --- learning rate --------------------------------------------------------------------------------------------------


def rates(steps, losses=None, top1=None, **options):
    """Learning rate at the start of every epoch; losses and top-1 accuracies of the epochs are one unless given."""
    config = TrainConfig(lr=0.5, num_epochs=12, **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = LearningRate(optimizer, config, steps)
    result = []
    for epoch in range(12):
        result.append(schedule.lr)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        schedule.epoch_done(*(values[epoch] if values else 1.0 for values in (losses, top1)))
    return result


def reference(make, losses=None):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)
    result = []
    for epoch in range(12):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([losses[epoch]] if losses else []))
    return result


def test_schedules_are_those_of_torch_at_every_epoch():
    schedulers = torch.optim.lr_scheduler
    step = rates(5, scheduler="step", lr_step=4, lr_gamma=0.2)
    assert step == pytest.approx(reference(lambda o: schedulers.StepLR(o, 4, 0.2)))
    assert rates(5, scheduler="cosine") == pytest.approx(reference(lambda o: schedulers.CosineAnnealingLR(o, 12)))
    with_least = reference(lambda o: schedulers.CosineAnnealingLR(o, 12, eta_min=0.1))
    assert rates(5, scheduler="cosine", min_lr=0.1) == pytest.approx(with_least)
    assert rates(5, scheduler="none") == [0.5] * 12
    losses = [1, 0.9, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    plateau = rates(5, losses, scheduler="plateau", lr_step=2, lr_gamma=0.2)
    expected = reference(lambda o: schedulers.ReduceLROnPlateau(o, factor=0.2, patience=1, threshold=0), losses)
    assert plateau == pytest.approx(expected)
    assert plateau == pytest.approx([0.5] * 4 + [0.1] * 4 + [0.02] * 2 + [0.004] * 2)
    top1 = [50, 60, 60, 58, 60, 59, 57, 60, 60, 61, 60, 60]  # the losses above would lower the rate four times
    by_top1 = rates(5, losses, top1, scheduler="plateau", plateau_metric="top1", lr_step=6, lr_gamma=0.2)
    expected = reference(lambda o: schedulers.ReduceLROnPlateau(o, "max", factor=0.2, patience=5, threshold=0), top1)
    assert by_top1 == pytest.approx(expected)
    assert by_top1 == pytest.approx([0.5] * 8 + [0.1] * 4)


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2}, {"warmup_steps": 10}])
@pytest.mark.parametrize("scheduler", ["none", "cosine", "plateau"])
def test_warmup_rises_linearly_step_by_step(scheduler, warmup):
    config = TrainConfig(lr=0.5, num_epochs=4, scheduler=scheduler, **warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = LearningRate(optimizer, config, 5)
    seen = []
    for _ in range(11):
        seen.append(schedule.lr)
        optimizer.step()
        schedule.step()
    assert seen[:10] == pytest.approx([0.5 * (i + 1) / 10 for i in range(10)])
    assert seen[10] == pytest.approx(0.5)


# --- a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_is_the_plain_optimizer_step(name):
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    betas = {} if name == "sgd" else {"beta1": 0.8, "beta2": 0.9}
    training = make_training(model, optimizer=name, clip_grad_norm=0.5, weight_decay=0.1, **betas)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    more = {"momentum": 0.9} if name == "sgd" else {"betas": (0.8, 0.9)}
    optimizer = kinds[name](twin.parameters(), lr=0.01, weight_decay=0.1, fused=False, **more)
    for images, labels in make_batches().epoch(0):
        train_step(training, images, labels, make_loss("CrossEntropy"))
        optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(twin))


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_accumulated_micro_batches_are_the_whole_batch(accumulate):
    # By SGD: Adam divides the difference of two sums by its own size.
    whole, parts = make_training(optimizer="sgd"), make_training(optimizer="sgd", accumulate_steps=accumulate)
    parts.model.load_state_dict(whole.model.state_dict())
    for images, labels in make_batches().epoch(0):  # 16, 16, 16 and 2 images
        train_step(whole, images, labels, make_loss("CrossEntropy"))
        train_step(parts, images, labels, make_loss("CrossEntropy"))
    torch.testing.assert_close(weights(whole.model), weights(parts.model))
    torch.testing.assert_close(whole.meter.sums, parts.meter.sums, atol=0, rtol=1e-5)  # of losses in float32


def test_average_of_weights_and_statistics():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        for value in model.state_dict().values():
            value.add_(1)
        average.update(model)
        for name, value in model.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * value if floating else value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_never_reaches_the_weights(fault, name):
    training = make_training(optimizer=name, clip_grad_norm=0.0)
    batches = list(make_batches().epoch(0))
    loss_function = make_loss("CrossEntropy")

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    def faulty(logits, targets):
        return loss_function(logits, targets) * math.nan if fault == "loss" else Overflow.apply(loss_function(logits, targets))

    train_step(training, *batches[0], loss_function)
    training.check_finite()
    before = weights(training.model)
    train_step(training, *batches[1], faulty)
    train_step(training, *batches[2], loss_function)  # and none after it, until the host has looked
    assert torch.equal(weights(training.model), before)
    with pytest.raises(Stopped, match=r"epoch 1, step 2, learning rate 0.01; .*--lr"):
        training.check_finite()


def in_float16(monkeypatch, scale, **options):
    """A training in float16 on the CPU, which users may not have, with a scaler of this scale."""
    monkeypatch.setattr("runs.training.autocast_for", lambda *_: lambda: torch.autocast("cpu", dtype=torch.float16))
    options = {"use_amp": True, "amp_dtype": "float16", "ema_decay": 0.5, "steps": 8} | options
    training = make_training(**options)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return training


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_that_overflows_float16_is_skipped_and_the_scale_halved(name, monkeypatch):
    training = in_float16(monkeypatch, 2.0**24, optimizer=name)
    dtypes, loss_function = [], make_loss("CrossEntropy")
    training.model[1].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    batches = list(make_batches(n=128).epoch(0))
    skipped = 0
    for images, labels in batches:
        before, scale = weights(training.model), training.scaler.get_scale()
        train_step(training, images, labels, loss_function)
        if training.scaler.get_scale() == scale:
            break
        assert training.scaler.get_scale() == scale / 2 and torch.equal(weights(training.model), before)
        averages = [value for state in training.optimizer.state.values() for value in state.values()]
        assert averages and not any(value.any() for value in averages)  # of gradients, and how many went into them
        skipped += 1
    assert 1 < skipped < 8 and not torch.equal(weights(training.model), before)
    assert training.step == skipped + 1 and set(dtypes) == {torch.float16}
    for images, labels in batches * 20:  # and the run goes on as one that never overflowed
        train_step(training, images, labels, loss_function)
    training.check_finite()
    assert evaluate(training.model, make_batches(part="test"), loss_function, device=CPU).top1 > 80


def test_a_float16_run_goes_on_with_its_scale(monkeypatch):
    """Saved between two steps that overflow, it skips the same ones."""
    batches, loss_function = list(make_batches(n=128).epoch(0)), make_loss("CrossEntropy")
    whole, resumed = in_float16(monkeypatch, 2.0**24), in_float16(monkeypatch, 2.0**16)
    train_step(whole, *batches[0], loss_function)
    resumed.load_state_dict(torch_copy(whole.state_dict({})))
    for training in (whole, resumed):
        for batch in batches[1:]:
            train_step(training, *batch, loss_function)
    assert whole.scaler.state_dict() == resumed.scaler.state_dict() and whole.scaler.get_scale() < 2.0**22
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_a_loss_that_is_not_finite_stops_a_float16_run_too(monkeypatch):
    training = in_float16(monkeypatch, 2.0**10)
    batches, loss_function = list(make_batches().epoch(0)), make_loss("CrossEntropy")
    train_step(training, *batches[0], loss_function)
    before = weights(training.model)
    train_step(training, *batches[1], lambda *parts: loss_function(*parts) * math.nan)
    for batch in batches[2:]:  # more than one: the second must remember the first
        train_step(training, *batch, loss_function)
    assert torch.equal(weights(training.model), before)
    with pytest.raises(Stopped, match=r"epoch 1, step 2, .*--amp_dtype bfloat16"):
        training.check_finite()


def test_mixed_precision_runs_the_model_in_bfloat16():
    training = make_training(use_amp=True)
    seen = []
    training.model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_one_epoch(training, make_batches(), make_loss("CrossEntropy"))
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in training.model.parameters()} == {torch.float32}


# --- epochs ---------------------------------------------------------------------------------------------------------


def test_training_learns_and_evaluation_counts_every_image_once():
    training = make_training(lr=0.05)
    for _ in range(20):
        metrics = train_one_epoch(training, make_batches(), make_loss("CrossEntropy"))
        training.epoch, training.step, training.meter = training.epoch + 1, 0, Meter(CPU)
    assert metrics.top1 > 95
    results = [
        evaluate(training.model, make_batches(batch_size=b, part="test"), make_loss("CrossEntropy"), device=CPU)
        for b in (50, 16, 7)
    ]
    ((images, labels),) = make_batches(batch_size=50, part="test").epoch(0)
    logits = training.model.eval()(images)
    for result in results:
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_no_step_waits_for_the_device(monkeypatch):
    """Looking at a number on the device makes the host wait; over 60 steps that may happen a few times only."""
    looks = []

    def counted(original):
        return lambda *args, **kwargs: (looks.append(original.__name__), original(*args, **kwargs))[1]

    training = make_training(clip_grad_norm=1.0, ema_decay=0.9, accumulate_steps=2, steps=60)
    batches = make_batches(n=240, batch_size=4)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    train_one_epoch(training, batches, make_loss("CrossEntropy"))
    assert training.step == 60
    steps = looks.count("item") + looks.count("__bool__") + looks.count("__float__") + looks.count("tolist")
    assert steps <= 2 * 60 / train_eval.READ_EVERY + 4, looks


def test_saving_within_an_epoch():
    for minutes, expected in ((1e-9, list(range(1, 26))), (60.0, []), (0.0, [])):
        training = make_training(save_minutes=minutes, steps=25)
        saved = []

        def save(training=training, saved=saved):
            saved.append(training.step)

        train_one_epoch(training, make_batches(n=100, batch_size=4), make_loss("CrossEntropy"), save=save)
        assert saved == expected


def test_the_clock_of_the_first_process_decides_when_all_save():
    training, saved = make_training(save_minutes=1e-9, steps=25), []
    training.processes = Processes(rank=1)
    train_one_epoch(training, make_batches(n=100, batch_size=4), make_loss("CrossEntropy"), save=lambda: saved.append(1))
    assert not saved


@pytest.mark.parametrize("stop", [0, 5, 13])
def test_a_state_that_is_loaded_goes_on_bit_for_bit(stop, monkeypatch):
    options = {"ema_decay": 0.9, "scheduler": "cosine", "warmup_epochs": 1, "accumulate_steps": 2, "batch_size": 4, "steps": 13}
    loss_function = make_loss("CrossEntropy")
    mix = make_mix(0.5, 0.0, 3)

    def run(training):
        while training.epoch < 2:
            metrics = train_one_epoch(training, make_batches(batch_size=4), loss_function, mix)
            training.history.append({"epoch": training.epoch + 1, "metrics": list(metrics)})
            training.best = training.history[0]
            training.predictions = dict.fromkeys(("labels", "last", "best"), torch.zeros(1))
            training.epoch, training.step, training.meter = training.epoch + 1, 0, Meter(CPU)

    torch.manual_seed(0)
    whole = make_training(make_model(dropout=0.3), **options)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    torch.manual_seed(1)
    run(whole)

    interrupted = make_training(make_model(dropout=0.3), **options)
    interrupted.model.load_state_dict(start)
    interrupted.average.model.load_state_dict(start)
    torch.manual_seed(1)
    if stop < 13:
        states = {0: torch_copy(interrupted.state_dict({}))}

        def recording(training, *args):
            train_step(training, *args)
            states[training.step] = torch_copy(training.state_dict({}))

        monkeypatch.setattr(train_eval, "train_step", recording)
        train_one_epoch(interrupted, make_batches(batch_size=4), loss_function, mix)
        monkeypatch.undo()
        state = states[stop]
    else:
        metrics = train_one_epoch(interrupted, make_batches(batch_size=4), loss_function, mix)
        interrupted.history.append({"epoch": 1, "metrics": list(metrics)})
        interrupted.best = interrupted.history[0]
        interrupted.predictions = dict.fromkeys(("labels", "last", "best"), torch.zeros(1))
        interrupted.epoch, interrupted.step, interrupted.meter = 1, 0, Meter(CPU)
        state = torch_copy(interrupted.state_dict({}))

    torch.manual_seed(99)
    resumed = make_training(make_model(dropout=0.3), **options)
    resumed.load_state_dict(state)
    run(resumed)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(weights(resumed.average.model), weights(whole.average.model))
    assert resumed.history == whole.history and resumed.schedule.lr == whole.schedule.lr


def torch_copy(state):
    """Through a file's bytes and back, as a checkpoint goes: nothing but tensors and plain values gets through."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_optimizers_have_their_options():
    model = make_model()
    group = make_optimizer(model, TrainConfig(optimizer="sgd", lr=0.3, momentum=0.7, weight_decay=0.2)).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.7, 0.2)
    assert type(make_optimizer(model, TrainConfig(optimizer="adam"))) is torch.optim.Adam
    assert type(make_optimizer(model, TrainConfig(optimizer="adamw"))) is torch.optim.AdamW


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_early_stopping_counts_epochs_without_a_better_loss(patience):
    losses = [1.0, 0.8, 0.9, 0.8, 0.7]
    histories = [[{"test_loss": loss} for loss in losses[:n]] for n in range(len(losses) + 1)]
    found = [stalled(history, "test", patience) for history in histories]
    expected = {0: [False] * 6, 1: [False, False, False, True, True, False], 2: [False] * 4 + [True, False]}
    assert found == expected[patience]


# --- compiled -------------------------------------------------------------------------------------------------------


SMALL = {"image_size": 8, "in_channels": 1, "K": 4, "sampling_type": "random", "num_samples": 6}


def make_vit(*layers):
    """One block, whose mixers are these layers side by side."""
    options = SMALL | {"patch_size": 2, "num_layers": 1, "num_heads": 2, "d_model": 8, "d_mlp": 8, "kernel_size": 3}
    options |= {"hybrid_dilations": (1,), "nystrom_landmarks": 4}
    models = [vit.ViT(ViTConfig(**options, layer=layer, pool=pool_of(layer))) for layer in layers]
    models[0].blocks[0].mixer = SideBySide([model.blocks[0].mixer for model in models])
    return models[0]


def make_allconvnet(*layers):
    models = [allconvnet.AllConvNet(AllConvNetConfig(**SMALL, channels=(4,), layer=layer)) for layer in layers]
    models[0].layers[0][0] = SideBySide([model.layers[0][0] for model in models])
    return models[0]


@pytest.mark.parametrize(
    ("make", "layers", "sizes"),
    [
        (make_vit, ("ConvNNAttention", "LocalAttention", "PaCa"), 1),  # the others: test_vit.py
        (make_allconvnet, ("ConvNN", "Conv2d/ConvNN"), 1),
        (make_vit, ("BranchConv",), 2),
    ],
)
def test_nothing_is_compiled_after_the_first_epoch(make, layers, sizes, monkeypatch):
    """A graph without a break for each size of batch, in training and in evaluation, and then no more."""
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        if any(isinstance(x, torch.SymInt) for x in inputs):
            graphs.append("for any number of images")
        else:
            graphs.append([len(x) for x in inputs if x.ndim == 4 and not isinstance(x, nn.Parameter)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **more: real(model, backend=backend, fullgraph=True, **more))
    torch._dynamo.reset()
    recipe = Recipe("digits", "train", 16, 0, 8, CPU)
    # micro-batches of 8, or 8 and 2 images in training, batches of 16, or 16 and 4 in evaluation
    n, tested = (32, 16) if sizes == 1 else (36, 20)
    images, labels = np.random.default_rng(0).integers(0, 255, (n, 1, 8, 8)).astype(np.uint8), np.arange(n) % 10
    training = make_training(make(*layers), steps=1 + sizes, use_compiled=True, accumulate_steps=2)
    for epoch in range(2):
        train_one_epoch(training, DeviceBatches(images, labels, np.arange(n), recipe), make_loss("CrossEntropy"))
        test = DeviceBatches(images[:tested], labels[:tested], np.arange(tested), dataclasses.replace(recipe, part="test"))
        evaluate(training.model, test, make_loss("CrossEntropy"), device=CPU, compiled=training.compiled_eval_model)
        training.epoch, training.step = epoch + 1, 0
        # Each for its own number of images.
        assert graphs == ([[8], [16]] if sizes == 1 else [[8], [2], [16], [4]])
