"""Options of a run: YAML and back, and the presets."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from options.runs import PROGRAMS, parse_options
from tests.options.reference import BOOLEANS, CHOICES, DEFAULTS, LAYERS, ROOT, as_argv, parse, values

pytestmark = pytest.mark.usefixtures("folder")


KEEPING = {"Conv2d", "Identity", "Pooling"}  # the size of the map, which pattern A of another branch changes


@st.composite
def settings_of_a_run(draw):
    """Any values that go together, on maps of 8 x 8 tokens or more."""
    pattern = draw(st.sampled_from(["BA", "NA", "A"]))
    pairs = st.permutations(LAYERS).map(lambda names: "/".join(names[:2]))
    layer = draw(st.sampled_from(LAYERS) | pairs.filter(lambda pair: pattern != "A" or not KEEPING & {*pair.split("/")}))
    sampling = draw(st.sampled_from(CHOICES["sampling_type"]))
    samples = {"all": st.just(-1), "random": st.integers(9, 64), "spatial": st.integers(3, 4)}[sampling]
    fractions = st.floats(0, 1, exclude_max=True)
    positive = st.floats(0, 1e6)
    text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)
    given = {
        "layer": st.just(layer),
        "channels": st.lists(st.integers(1, 9).map(lambda n: 32 * n), min_size=1, max_size=2),
        "shuffle_pattern": st.just(pattern),
        "shuffle_scale": st.sampled_from([1, 2, 4]),
        "num_heads": st.sampled_from([1, 2, 4, 8]),
        "branch_ratio": st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        "padding": st.integers(0, 3),
        "K": st.integers(1, 9),
        "sampling_type": st.just(sampling),
        "num_samples": samples,
        "sample_padding": st.integers(0, 2),
        "resize": st.sampled_from([32, 48]),
        "batch_size": st.integers(8, 10**7),
        "accumulate_steps": st.integers(1, 8),
        "num_epochs": st.integers(5, 10**6),
        "warmup_epochs": st.integers(0, 5),
        "seed": st.integers(0, 2**31 - 1),
        "num_workers": st.none() | st.integers(0, 9),
        "train_limit": st.none() | st.integers(1, 10**9),
        "data_path": text,
        "output_dir": text.filter(lambda text: text not in ("none", "None")),
        "export": st.none() | text.map(lambda text: text + ".safetensors"),
        **{name: st.booleans() for name in BOOLEANS if name not in ("test_only", "override")},
        **dict.fromkeys(("val_fraction", "label_smoothing", "momentum", "lr_gamma", "ema_decay"), fractions),
        **dict.fromkeys(("lr", "weight_decay", "clip_grad_norm", "save_minutes"), positive),
        **dict.fromkeys(("mixup", "cutmix"), st.just(0.0) | st.floats(1e-3, 1e3)),
        **{
            name: st.sampled_from(choices)
            for name, choices in CHOICES.items()
            if name not in ("shuffle_pattern", "sampling_type", "dataset", "convolution_type", "topk")
        },
        "convolution_type": st.sampled_from(["standard", "depthwise-separable"]),
        "topk": st.just("hard"),  # the others contradict similarity_type=Loc
        "model": st.sampled_from(CHOICES["model"] if pattern == "NA" else ["allconvnet"]),
        "replace": st.sampled_from([["all"], ["last", "3"], ["stages", "1", "3"]]),
        "classifier_width": st.none() | st.integers(1, 9),
    }
    return draw(st.fixed_dictionaries(given))


@given(settings=settings_of_a_run())
def test_options_survive_yaml(settings, tmp_path_factory):
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    first = parse("--K=1", *as_argv(settings))
    found = first.as_dict()
    assert {name: found[name] for name in settings if settings[name] is not None} == {
        name: value for name, value in settings.items() if value is not None
    }
    for plain in (found, settings):  # what a run writes, and what a person would
        file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        assert parse("--config", str(file)) == first
    assert list(yaml.safe_load(yaml.safe_dump(found, sort_keys=False))) == list(found)


def test_preset_allconvnet_states_the_defaults():
    file = ROOT / "configs/allconvnet.yaml"
    stated = yaml.safe_load(file.read_text())
    assert stated == {name: DEFAULTS[name] for name in stated} and len(stated) > 40
    assert parse("--config", str(file)) == parse("")


def test_preset_demo():
    file = ROOT / "configs/demo.yaml"
    stated, found = yaml.safe_load(file.read_text()), values("--config", str(file))
    assert found["dataset"] == "digits" and stated == {name: found[name] for name in stated}


PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_resolves_to_and_its_header_is_a_command(name):
    file = ROOT / "configs" / name
    text = file.read_text()
    header = re.match(rf"# python (\w+\.py) (--config configs/{name}.*?)(  .*)?\n#\n# \S", text)
    program, line = header[1], header[2]
    for checkpoint in re.findall(r"--checkpoint (\S+)", line):
        Path(checkpoint).touch()
    options, parser = parse_options(PROGRAMS[program], "", shlex.split(line.replace("configs/", f"{ROOT}/configs/")))
    found, stated = options.as_dict(), yaml.safe_load(text)
    names = stated.keys() - parser.given
    assert {key: found[key] for key in names} == {key: stated[key] for key in names}


RECIPES = {
    "vgg11_cifar10": ("allconvnet_main.py", {"model": "vgg11", "dataset": "cifar10", "batch_norm": True, "optimizer": "sgd"}),
    "vit_cifar10": ("vit_main.py", {"dataset": "cifar10", "patch_size": 4, "auto_augment": "trivial", "random_erasing": 0.25}),
    "finetune_224": ("vit_main.py", {"resize": 224, "layer_decay": 0.65, "decay_norms": False, "auto_augment": "rand"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_state_nothing_that_their_model_does_not_read(name):
    program, expected = RECIPES[name]
    options = parse_options(PROGRAMS[program], "", ["--config", f"{ROOT}/configs/{name}.yaml"])[0]
    found, stated = options.as_dict(), yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    assert {key: found[key] for key in expected} == expected
    assert not stated.keys() & options.model.without_effect().keys()
