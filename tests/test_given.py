"""`train` and `evaluate` from Python: models and loaders of others in the loop of the programs."""

import csv
import json
import math
import os
import random
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vit_main
from convnn import DataConfig, DataError, RunError, TrainConfig, ViT, evaluate, load_data, timm_mixer, train
from options.runs import PROGRAMS, parse_options

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_results")


class Augmented(Dataset):
    """Three classes that differ in brightness, with noise from three generators."""

    def __init__(self, length=22, channels=1):
        self.length, self.channels = length, channels

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        noise = torch.randn(self.channels, 8, 8) * (0.1 + random.random()) * (0.1 + np.random.rand())
        return noise + number % 3, number % 3


class Shuffled:
    """Batches of one's own, without a length or torch's DataLoader."""

    def __iter__(self):
        rows = list(range(20))
        random.shuffle(rows)
        for first in range(0, 20, 8):
            pairs = [Augmented()[number] for number in rows[first : first + 8]]
            yield torch.stack([image for image, _ in pairs]), [label for _, label in pairs]


def plain():
    hidden = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(nn.Flatten(), hidden, nn.Linear(8, 3)), Shuffled(), Shuffled()


def torchvision_vit():
    from torchvision.models import VisionTransformer

    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "dropout": 0.1}
    model = VisionTransformer(image_size=8, patch_size=4, num_classes=3, **sizes)
    data = Augmented(channels=3)
    return model, DataLoader(data, 8, shuffle=True), DataLoader(data, 8)


def timm_vit():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1, "proj_drop_rate": 0.1}
    attention = timm_mixer("ConvNNAttention", K=3, sampling_type="random", num_samples=3, image_size=8, patch_size=4)
    model = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=3, attn_layer=attention, **sizes)
    loader = DataLoader(Augmented(), 8, shuffle=True, generator=torch.Generator())
    return model, loader, DataLoader(Augmented(), 8)


class Stopping:
    """The loader, with a signal in its batch number `at`, counted over all epochs; 0: never."""

    def __init__(self, loader, at):
        self.loader, self.left = loader, at
        self.generator = getattr(loader, "generator", None)

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def run(make, folder, at=0, **options):
    torch.manual_seed(0)
    model, train_loader, test_loader = make()
    config = TrainConfig(num_epochs=3, lr=1e-2, ema_decay=0.5, warmup_epochs=1, scheduler="cosine", **options)
    return model, train(model, Stopping(train_loader, at), test_loader, config, output_dir=folder)


def table(folder):
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_s")} for row in rows]


@pytest.mark.parametrize("make", [plain, torchvision_vit, timm_vit])
def test_interrupted_and_resumed_bit_for_bit(make, tmp_path, capsys):
    whole, best = run(make, tmp_path / "whole")
    assert best["epoch"] in (1, 2, 3) and math.isfinite(best["train_loss"])
    out = capsys.readouterr().out
    for at in (4 + 3 + 2, 4 + 3 + 3):  # in the second epoch, and at its end; 4 batches are read before training
        folder = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM") as caught:
            run(make, folder, at)
        assert caught.type is KeyboardInterrupt  # so that an uncaught one exits with 130
        assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1
        random.seed(at), np.random.seed(at)  # another process
        resumed, _ = run(make, folder, resume=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert table(folder) == table(tmp_path / "whole") and len(table(folder)) == 3
        assert "1 epochs and" in capsys.readouterr().out
    assert out.splitlines()[-1].startswith("best test top-1 ") and out.count("epoch ") == 4


def test_a_vit_and_its_data_train_as_by_the_program(tmp_path):
    """Equal numbers, and the same files with the same contents, but for the options that only the program has."""
    words = "--dataset digits --resize 8 --patch_size 4 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8 --dropout 0"
    words += " --attention_dropout 0 --num_epochs 2 --batch_size 32 --train_limit 100 --test_limit 50 --lr 1e-2 --augment"
    argv = [*words.split(), "--output_dir", str(tmp_path / "program"), "--save_every", "1"]
    assert vit_main.main(argv) == 0
    options, _ = parse_options(PROGRAMS["vit_main.py"], "", argv)
    data = load_data(options.data, batch_size=32, seed=0, device=CPU)
    torch.manual_seed(0)
    best = train(ViT(options.model), data.train, data.test, options.train, output_dir=tmp_path / "ours")
    assert table(tmp_path / "ours") == table(tmp_path / "program") and best["epoch"] in (1, 2)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "program")]
    assert names[0] == names[1] and "epoch_2.pt" in names[0]
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ours", "program"))
    assert ours.keys() == theirs.keys() and ours["finished"] and ours["train_images"] == 100
    for name in ("parameters", "flops_per_image", "image_shape", "num_classes", "class_names", "test_images"):
        assert ours[name] == theirs[name]
    states = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("ours", "program")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items())


def test_evaluate_counts_every_image_once():
    model, loader, _ = plain()
    images, labels = torch.randn(21, 64), torch.arange(21) % 3
    logits = model.eval()(images).double()
    loss, top1 = F.cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean() * 100
    by_one = [(images[row : row + 1], labels[row : row + 1]) for row in range(21)]
    model.train()
    for batches in (DataLoader(TensorDataset(images, labels), 8), [(images, labels)], by_one):
        found = evaluate(model, batches)
        assert found.loss == pytest.approx(loss.item(), abs=1e-6) and found.top1 == pytest.approx(top1.item())
        assert found.top5 == 100 and not model.training
    assert math.isfinite(evaluate(model, loader).loss)


def test_batches_of_load_data_can_be_iterated():
    config = DataConfig(dataset="digits", resize=8, num_workers=0, augment=True, train_limit=50, test_limit=20)
    data = load_data(config, batch_size=16, seed=0, device=CPU)
    for epoch in range(2):
        passed, expected = list(data.train), list(data.train.epoch(epoch))
        assert len(passed) == len(data.train) == len(expected)
        assert all(torch.equal(one[0], two[0]) for one, two in zip(passed, expected, strict=True))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(data.test, data.test, strict=True))


# --- wrong uses ------------------------------------------------------------------------------------------------------

PAIR = (torch.rand(4, 1, 8, 8), torch.arange(4) % 3)


class Wrong(nn.Module):
    """A module with one parameter, and an output of some other form."""

    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.output = output

    def forward(self, images):
        return self.output(images)


class Output:
    logits = None


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("kind", "message", "changes"),
    [
        (ValueError, r"Sequential has no parameter to train$", {"model": nn.Sequential(nn.Flatten())}),
        (ValueError, r"Wrong returns a Output, not logits \(2, classes\); wrap it", {"model": Wrong(lambda x: Output())}),
        (ValueError, r"Wrong returns a tuple, not logits \(2, classes\)$", {"model": Wrong(lambda x: (x, x))}),
        (ValueError, r"Wrong returns \(2, 1, 8, 8\) of torch.float32, not logits", {"model": Wrong(lambda x: x)}),
        (TypeError, r"train_loader is a list_iterator, which cannot be read in every", {"train_loader": iter([PAIR])}),
        (TypeError, r"test_loader is a NoneType, which cannot be read in every epoch; give", {"test_loader": None}),
        (DataError, r"train_loader gives no batch$", {"train_loader": []}),
        (DataError, r"test_loader gives no batch$", {"test_loader": []}),
        (DataError, r"train_loader gives a dict, not pairs", {"train_loader": [{"images": PAIR[0], "labels": PAIR[1]}]}),
        (DataError, r"test_loader has the label 7, and the model has 3 outputs$", {"test_loader": [(PAIR[0], PAIR[1] + 5)]}),
        (ValueError, r"accumulate_steps=8 is more than batch_size=4 images$", {"accumulate_steps": 8}),
        (ValueError, r"test_only=True trains nothing; use evaluate\(model, loader\)$", {"test_only": True}),
        (RunError, r"--output_dir file: file cannot be written to \(Not a directory\)$", {"output_dir": "file"}),
        (RunError, r"--layer_decay 0.5: this model has no blocks", {"layer_decay": 0.5}),
        (RunError, r"--freeze backbone: this model has no parameter classifier", {"freeze": "backbone"}),
        (TypeError, r"config is a dict, not a TrainConfig; write TrainConfig\(lr=1e-3\)$", {"config": {"lr": 1e-3}}),
        (TypeError, r"model is a type, not a torch.nn.Module$", {"model": nn.Linear}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_uses_end_in_one_line(kind, message, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = {"model": linear(), "train_loader": [PAIR], "test_loader": [PAIR], "output_dir": "out"}
    given |= {name: value for name, value in changes.items() if name in (*given, "config")}
    options = {name: value for name, value in changes.items() if name not in given}
    with pytest.raises(kind, match=f"^{message}") as error:
        train(**{"config": TrainConfig(num_epochs=1, **options)} | given)
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_another_run_in_the_folder(tmp_path):
    config = TrainConfig(num_epochs=1)
    train(linear(), [PAIR], [PAIR], config, output_dir=tmp_path)
    with pytest.raises(RunError, match="holds a finished run"):
        train(linear(), [PAIR], [PAIR], config, output_dir=tmp_path)
    with pytest.raises(RunError, match=r"was trained with --lr 0.001, not 0.1"):
        train(linear(), [PAIR], [PAIR], TrainConfig(num_epochs=1, lr=0.1, resume=True), output_dir=tmp_path)
    with pytest.raises(RunError, match="was trained on 4 train images, here 8"):
        train(linear(), [PAIR, PAIR], [PAIR], TrainConfig(num_epochs=2, resume=True), output_dir=tmp_path)
    with pytest.raises(RunError, match=r"was trained with --layer Sequential, not Wrong"):
        wrong = Wrong(lambda x: x.mean((1, 2, 3))[:, None].expand(-1, 3))
        train(wrong, [PAIR], [PAIR], TrainConfig(num_epochs=2, resume=True), output_dir=tmp_path)


def test_several_processes_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError, match=r"^train\(\) runs in one process; start the script without torchrun$"):
        train(linear(), [PAIR], [PAIR])


# --- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torchvision", "huggingface"])
def test_example(library, tmp_path, monkeypatch):
    if library == "huggingface":
        pytest.importorskip("transformers", reason="needs transformers: pip install convnn[huggingface]")
    monkeypatch.setattr(sys, "path", [*sys.path])
    example = runpy.run_path(str(ROOT / "examples" / "train_your_own.py"))
    assert example["main"](library, str(tmp_path), 3)["test_top1"] > 75
    assert (tmp_path / library / "summary.json").exists()
