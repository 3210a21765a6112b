"""A run of a model and loaders that the caller has made: what stands in for the options of a program (`train_eval.train`)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dataset import Batches, Data
from options.fields import option
from options.runs import Options
from options.training import TrainConfig
from readers.loaders import LoaderBatches, count_classes
from runs import RunError
from runs.devices import pick_device
from runs.fingerprint import make_fingerprint
from runs.processes import Processes


@dataclass(frozen=True)
class GivenModel:
    """Stands in for a `ModelConfig`."""

    layer: str = option("", "class of the model")
    shape: tuple[int, ...] = ()  # of an image
    num_classes: int = 0

    @property
    def title(self) -> str:
        return self.layer

    @property
    def in_channels(self) -> int:
        return self.shape[0]

    @property
    def image_size(self) -> tuple[int, ...]:
        return self.shape[1:]

    def without_effect(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class GivenData:
    """Stands in for a `DataConfig`."""

    dataset: str = option("", "class of the training set")
    auto_augment: str = "none"
    random_erasing: float = 0.0


class Given:
    """A model and its loaders, with the options of their run.

    Raises TypeError, ValueError, RunError and DataError for what cannot be trained.
    """

    def __init__(self, model: nn.Module, train: Iterable, test: Iterable, config: TrainConfig, output_dir: str | None):
        if Processes.from_environment().world > 1:
            raise RunError("train() runs in one process; start the script without torchrun")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config is a {type(config).__name__}, not a TrainConfig; write TrainConfig(lr=1e-3)")
        if config.test_only:
            raise ValueError("test_only=True trains nothing; use evaluate(model, loader)")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameter to train")
        device = pick_device(config.device, Processes())
        self.model = model
        self.train, self.test = (
            as_batches(loader, device, name=name, seed=config.seed)
            for name, loader in (("train_loader", train), ("test_loader", test))
        )
        images, _ = next(iter(self.train.epoch(0)))
        source = getattr(train, "dataset", train)
        described = GivenModel(type(model).__name__, tuple(images.shape[1:]), count_outputs(model, images[:2]))
        folder = output_dir or config.output_dir or f"./Output/{described.layer}"
        config = replace(config, batch_size=len(images), output_dir=os.fspath(folder))
        self.options = Options(described, GivenData(type(source).__name__), config)

    def read(self, _config: GivenData, **_settings) -> Data:
        """Read both loaders once, and describe them as `dataset.load_data` does. Raises DataError."""
        classes = self.options.model.num_classes
        names = [str(number) for number in range(classes)]
        counts = {name: count_classes(getattr(self, name), classes) for name in ("train", "test")}
        return Data(self.train, None, self.test, names, make_fingerprint(names, counts, {}))


def as_batches(loader: Iterable, device: torch.device, *, name: str = "loader", seed: int = 0) -> Batches | LoaderBatches:
    """Return the batches of `load_data` as they are, and any other iterable as `LoaderBatches`."""
    return loader if isinstance(loader, (Batches, LoaderBatches)) else LoaderBatches(loader, device, name=name, seed=seed)


@torch.no_grad()
def count_outputs(model: nn.Module, images: Tensor) -> int:
    """Try the model on images; return the number of its classes. Raises ValueError for an output that is no logits."""
    logits = model.eval()(images.to(next(model.parameters()).device))
    wanted = f"logits ({len(images)}, classes)"
    if not isinstance(logits, Tensor):
        hint = "; wrap it in a module that returns its .logits" * hasattr(logits, "logits")
        raise ValueError(f"{type(model).__name__} returns a {type(logits).__name__}, not {wanted}{hint}")
    if logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point():
        raise ValueError(f"{type(model).__name__} returns {tuple(logits.shape)} of {logits.dtype}, not {wanted}")
    return logits.shape[1]
