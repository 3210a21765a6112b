"""Values of options: from text, from YAML and from Python."""

import math

import numpy as np
import pytest
import yaml

from options.allconvnet import AllConvNetConfig
from options.benchmark import BenchmarkConfig
from options.data import DataConfig
from options.fields import specs
from options.neighbors import NeighborConfig
from options.training import TrainConfig
from options.vit import ViTConfig
from tests.options.reference import BOOLEANS, parse_yaml, values

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_in_all_forms(name):
    beside = "--test_only " if name == "override" else ""  # without which it has no meaning
    for on in (f"--{name}", f"--{name} True", f"--{name} true", f"--{name}=True", f"--no-{name} --{name}"):
        assert values(beside + on)[name] is True
    for off in (f"--no-{name}", f"--{name} False", f"--{name} false", f"--{name}=False", f"--{name} --no-{name}"):
        assert values(off)[name] is False
    assert parse_yaml(f"{name}: true" + "\ntest_only: true" * bool(beside)).as_dict()[name] is True
    assert parse_yaml(f"{name}: 'False'").as_dict()[name] is False


def test_numbers_as_yaml_and_people_write_them():
    found = parse_yaml("lr: 1e-3\nweight_decay: 1e-6\nnoise: 1\nmomentum: '.5'\nseed: '7'").as_dict()
    expected = {"lr": 1e-3, "weight_decay": 1e-6, "noise": 1.0, "momentum": 0.5, "seed": 7}
    assert {name: found[name] for name in expected} == expected
    assert all(type(found[name]) is type(value) for name, value in expected.items())
    assert values("--lr 1e-3 --noise 1 --momentum .5 --num_samples -1")["noise"] == 1.0


def test_none_where_it_is_allowed():
    optional = ("num_layers", "resize", "num_workers", "train_limit", "test_limit", "output_dir", "checkpoint", "export")
    for name in optional:
        for text in ("none", "None"):
            assert values(f"--{name} {text}") == values("")
            assert parse_yaml(f"{name}: {text}").as_dict() == values("")
        assert parse_yaml(f"{name}: null").as_dict() == values("")
    assert values("--scheduler none")["scheduler"] == "none"


def test_lists():
    assert values("--channels 8 16 --K 3")["channels"] == [8, 16]
    assert parse_yaml("channels: [8, '16']").as_dict()["channels"] == [8, 16]
    assert parse_yaml("channels:\n- 8\n- 16\n").model.num_layers == 2
    assert values("--channels 8 16 --num_layers 2")["num_layers"] == 2


def test_texts_are_not_taken_for_numbers_and_truth_values():
    for text in ("no", "off", "Yes", "1_0", "0x10", "1:30", "010", "2_0.5"):
        assert parse_yaml(f"output_dir: {text}").as_dict()["output_dir"] == text
        assert parse_yaml(yaml.safe_dump({"output_dir": text})).as_dict()["output_dir"] == text
    found = parse_yaml(
        "seed: 0\nlr: 0.5\nmomentum: .5\nnoise: 1.\nweight_decay: 2.5e-3\naugment: TRUE\nbatch_size: +7"
    ).as_dict()
    expected = {"seed": 0, "lr": 0.5, "momentum": 0.5, "noise": 1.0, "weight_decay": 0.0025, "augment": True, "batch_size": 7}
    assert {name: found[name] for name in expected} == expected


def test_configs_raise_value_error_and_name_the_option():
    for config, bad in [
        (NeighborConfig, {"K": 0}),
        (NeighborConfig, {"sampling_type": "random", "num_samples": 3}),
        (AllConvNetConfig, {"K": 257}),
        (AllConvNetConfig, {"channels": (8, "8")}),
        (DataConfig, {"dataset": "cifar"}),
        (TrainConfig, {"lr": math.nan}),
        (TrainConfig, {"use_amp": 1}),
    ]:
        with pytest.raises(ValueError, match=next(iter(bad))):
            config(**bad)


@pytest.mark.parametrize("config", [AllConvNetConfig, ViTConfig, DataConfig, TrainConfig, BenchmarkConfig])
def test_every_number_has_an_upper_bound(config):
    for name, spec in specs(config).items():
        bounds = (spec.high, spec.below)
        assert spec.kind in (str, bool) or any(bound is not None and math.isfinite(bound) for bound in bounds), name
        if spec.kind is float and spec.high is not None:
            assert spec.high <= 1e38, name  # float32 holds it


def test_numbers_of_numpy_are_numbers():
    model = AllConvNetConfig(K=np.int64(4), lambda_param=np.float32(0.25), num_classes=np.int8(3), image_size=np.int32(16))
    assert (model.K, model.lambda_param, model.num_classes, model.image_size) == (4, 0.25, 3, (16, 16))
    assert {type(value) for value in (model.K, model.num_classes, *model.image_size)} == {int}
    assert type(model.lambda_param) is float and type(TrainConfig(lr=np.int64(1)).lr) is float
    for bad in (np.float64(4), np.bool_(True), np.array([4]), "4", None):
        with pytest.raises(ValueError, match="K="):
            AllConvNetConfig(K=bad)
