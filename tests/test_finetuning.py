"""Training from weights of another model: what is loaded, what starts anew, and which parameters learn, how fast."""

import csv
import json
import math
import shlex

import pytest
import torch
import yaml
from torch import nn

import allconvnet_main
import train_eval
import vit_main
from allconvnet import AllConvNet
from experiments.points import check_points, name_points, read_sweep
from experiments.report import is_finished, write_summary
from models.build import build_network
from models.convit import ConViTConfig, ConViTLayer, ConViTWithLinearClassifier
from models.pretrained import load_vit_weights
from options.allconvnet import AllConvNetConfig
from options.training import TrainConfig
from options.vit import ViTConfig
from runs import RunError
from runs.checkpoints import LoadPolicy, load_state
from runs.optimization import LearningRate, make_optimizer
from runs.parameters import freeze, layer_scales, parameter_groups, start_training
from vit import Block, DropPath, ViT, drop_path_rates, resample_positions

VIT = (
    "--dataset digits --resize 8 --patch_size 2 --num_layers 2 --num_heads 2 --d_model 8 --d_mlp 8 --pos_embedding learned "
    "--batch_size 16 --train_limit 32 --test_limit 20 --device cpu --num_epochs 1"
)
CONVNET = "--dataset digits --layer Conv2d --channels 4 8 --batch_size 16 --train_limit 32 --test_limit 20 --device cpu"
pytestmark = pytest.mark.usefixtures("quick_results")


def run(line, folder, program=vit_main):
    return program.main([*shlex.split(line), "--output_dir", str(folder)])


def refused(line, folder, capsys, program=vit_main):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(line, folder, program)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    assert not folder.exists()
    return error


def make(**options):
    defaults = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 2, "num_heads": 2, "d_model": 8, "d_mlp": 8}
    return ViT(ViTConfig(**defaults | {"pos_embedding": "learned", "K": 3, "num_classes": 10} | options))


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """A trained attention model's checkpoint, to be read only."""
    folder = tmp_path_factory.mktemp("attention") / "run"
    assert run(VIT, folder) == 0
    return folder / "best.pt"


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


# --- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_tokens", [0, 1])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 3)), ((3, 5), (2, 4)), ((6, 2), (6, 2)), ((2, 2), (14, 14))])
def test_positions_are_interpolated_as_timm_does(old, new, class_tokens):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, class_tokens + math.prod(old), 6)
    theirs = resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=class_tokens)
    torch.testing.assert_close(resample_positions(table, old, new, class_tokens), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("pool", "size"), [("cls", 12), ("mean", 12), ("cls", 4), ("cls", (4, 10))])
def test_weights_of_another_image_size(pool, size):
    from timm.layers import resample_abs_pos_embed

    source, model = make(pool=pool), make(pool=pool, image_size=size)
    loaded = load_vit_weights(model, source.state_dict(), LoadPolicy(resample=True))
    grid, prefix = model.config.grid, int(pool == "cls")
    expected = resample_abs_pos_embed(source.pos_embedding, list(grid), num_prefix_tokens=prefix)
    torch.testing.assert_close(model.pos_embedding, expected, atol=1e-6, rtol=0)
    assert loaded.resampled == f"4 x 4 to {grid[0]} x {grid[1]} patches" and not loaded.new and not loaded.unused
    assert torch.equal(model.blocks[1].mixer.qkv.weight, source.blocks[1].mixer.qkv.weight)
    with pytest.raises(ValueError, match=r"pos_embedding is .* there"):
        load_vit_weights(make(pool=pool, image_size=size), source.state_dict())


def test_the_grid_is_told_by_the_options_or_square():
    source, model = make(image_size=(4, 16)), make(image_size=8)  # 2 x 8 and 4 x 4 patches: as many
    load_vit_weights(model, source.state_dict(), LoadPolicy(resample=True, grid=(2, 8)))
    expected = resample_positions(source.pos_embedding, (2, 8), (4, 4), 1)
    assert torch.equal(model.pos_embedding, expected) and not torch.equal(model.pos_embedding, source.pos_embedding)
    with pytest.raises(ValueError, match="pos_embedding is of another grid, 2 x 8 to 4 x 4 patches"):
        load_vit_weights(model, source.state_dict(), LoadPolicy(grid=(2, 8)))
    square = make(image_size=8).state_dict()  # without options, and with as many patches
    assert load_vit_weights(source, square, LoadPolicy(resample=True)).resampled == "4 x 4 to 2 x 8 patches"
    assert torch.equal(source.pos_embedding, resample_positions(square["pos_embedding"], (4, 4), (2, 8), 1))
    wide, other = make(image_size=(4, 12)), make(image_size=(4, 12))  # 12 patches are no square: those of the model
    load_vit_weights(wide, other.state_dict(), LoadPolicy(resample=True))
    assert torch.equal(wide.pos_embedding, other.pos_embedding)
    with pytest.raises(ValueError, match="of an unknown grid: its 11 positions are not of a square"):
        load_vit_weights(make(), make(image_size=(4, 10)).state_dict(), LoadPolicy(resample=True))


def test_a_class_token_that_joins_late_has_no_position():
    early, late = make(), make(num_local_layers=1)
    for source, model in ((early, make(num_local_layers=1)), (late, make())):
        load_vit_weights(model, source.state_dict(), LoadPolicy(resample=True, partial=True))
        assert torch.equal(model.pos_embedding[:, -16:], source.pos_embedding[:, -16:])
    assert not model.pos_embedding[:, 0].any()


MIXERS = ["ConvNNAttention", "KvtAttention", "LocalAttention", "NeighborhoodAttention", "GPSA", "Conv1dAttention", "ConvNN"]


@pytest.mark.parametrize("layer", MIXERS)
def test_another_mixer_takes_what_has_the_same_name_and_shape(layer):
    source, model = make(), make(layer=layer, kernel_size=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = load_vit_weights(model, source.state_dict(), LoadPolicy(partial=True))
    theirs, ours = source.state_dict(), model.state_dict()
    same = {name for name in ours if name in theirs and ours[name].shape == theirs[name].shape}
    assert set(loaded.loaded) == same and set(loaded.new) == ours.keys() - same
    assert set(loaded.unused) == theirs.keys() - ours.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name] if name in same else before[name]), name
    assert "blocks.1.mlp.0.weight" in same and ("blocks.1.mixer.qkv.weight" in same) == (
        layer not in ("Conv1dAttention", "ConvNN")
    )
    if loaded.new or loaded.unused:
        with pytest.raises(ValueError, match="of another architecture"):
            load_vit_weights(make(layer=layer, kernel_size=3), theirs)


@pytest.mark.parametrize(
    "change", [{"d_mlp": 12}, {"patch_norm": False}, {"final_norm": True}, {"num_layers": 1}, {"in_channels": 3}]
)
def test_what_is_no_mixer_and_no_head_must_fit(change):
    with pytest.raises(ValueError, match="of another architecture"):
        load_vit_weights(make(**change), make().state_dict(), LoadPolicy(partial=True, resample=True))


def test_a_convolutional_network_keeps_norms_and_head():
    def network(layer):
        return AllConvNet(AllConvNetConfig(layer=layer, channels=(4, 8), in_channels=1, image_size=8, shuffle_pattern="NA"))

    source, model = network("Conv2d"), network("ConvNN")
    nn.init.normal_(source.layers[1][1].running_mean)
    loaded = load_state(model, source.state_dict(), LoadPolicy(partial=True))
    assert list(loaded.new) == [f"layers.{n}.0.conv.{part}" for n in (0, 1) for part in ("weight", "bias")]
    assert loaded.unused == [f"layers.{n}.0.{part}" for n in (0, 1) for part in ("weight", "bias")]
    assert torch.equal(model.layers[1][1].running_mean, source.layers[1][1].running_mean)
    with pytest.raises(ValueError, match=r"it has no layers\.1\.1\.weight"):
        weights = {name: value for name, value in source.state_dict().items() if name != "layers.1.1.weight"}
        load_state(network("Conv2d"), weights, LoadPolicy(partial=True))


def test_a_new_head_is_said_and_listed(attention, tmp_path, capsys):
    images = tmp_path / "images"
    from PIL import Image

    for part in ("train", "val"):
        for label in range(3):
            (images / part / f"c{label}").mkdir(parents=True)
            for number in range(6):
                Image.new("L", (8, 8), 80 * label + number).save(images / part / f"c{label}" / f"{number}.png")
    state = torch.load(attention, weights_only=True)
    color = state["model"]["patch_embedding.weight"].repeat(1, 3, 1, 1)  # a folder is read in color
    state["model"]["patch_embedding.weight"] = color
    torch.save(state, tmp_path / "color.pt")
    line = f"{VIT} --train_limit 12 --test_limit 12 --dataset folder --data_path {images} --num_workers 0 --lr 0"
    line += f" --checkpoint {tmp_path / 'color.pt'}"
    assert run(line, tmp_path / "run") == 0
    out, error = capsys.readouterr()
    assert f"warning: {tmp_path / 'color.pt'}: a new head, classifier.weight is (10, 8) there, (3, 8) here\n" in error
    assert f"weights of {tmp_path / 'color.pt'}: 30 tensors loaded, 2 new\n" in out
    text = (tmp_path / "run" / "model.txt").read_text()
    assert "new       classifier.bias  ((10,) there, (3,) here)\n" in text and "loaded    blocks.0.mixer.qkv.weight\n" in text
    trained = weights_of(tmp_path / "run" / "best.pt")
    assert torch.equal(trained["blocks.1.mlp.0.weight"], state["model"]["blocks.1.mlp.0.weight"])
    error = refused(f"{line} --strict", tmp_path / "strict", capsys)
    assert "of another architecture or number of classes: classifier.weight is (10, 8) there, (3, 8) here" in error


def test_another_mixer_and_size_in_a_run_which_goes_on(attention, tmp_path, capsys):
    line = f"{VIT} --layer ConvNNAttention --K 3 --resize 12 --checkpoint {attention}"
    assert run(line, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "32 tensors loaded (positions from 4 x 4 to 6 x 6 patches), 2 new\n" in out
    text = (tmp_path / "run" / "model.txt").read_text()
    assert text.endswith("loaded    classifier.bias\n") and "new       blocks.1.mixer.conv.weight  (not there, (" in text
    assert run(f"{line} --num_epochs 2 --resume", tmp_path / "run") == 0
    assert (tmp_path / "run" / "model.txt").read_text() == text
    assert "of another architecture" in refused(f"{line} --strict", tmp_path / "strict", capsys)


def test_strict_takes_weights_that_are_the_same(attention, tmp_path, capsys):
    assert run(f"{VIT} --strict --checkpoint {attention} --lr 0 --weight_decay 0", tmp_path / "run") == 0
    out, error = capsys.readouterr()
    assert "tensors" not in out and error == ""
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights_of(attention).values(), weights_of(tmp_path / "run/best.pt").values(), strict=True)
    )


# --- evaluation without training ------------------------------------------------------------------------------------


def test_an_attention_checkpoint_is_evaluated_as_another_mixer(attention, tmp_path, capsys):
    evaluate = f"--test_only --checkpoint {attention} --test_limit 20 --device cpu"
    assert run(evaluate, tmp_path / "as it is") == 0
    assert run(f"{evaluate} --layer KvtAttention --K 17 --override", tmp_path / "all") == 0
    assert run(f"{evaluate} --layer KvtAttention --K 2 --override", tmp_path / "two") == 0
    results = {path.name: json.loads((path / "test_results.json").read_text()) for path in tmp_path.iterdir()}
    assert results["all"]["loss"] == pytest.approx(results["as it is"]["loss"], rel=1e-5)
    assert results["two"]["loss"] != pytest.approx(results["as it is"]["loss"], rel=1e-4)
    assert results["two"]["override"]["layer"] == {"trained": "Attention", "here": "KvtAttention"}
    for layer, missing in (("ConvNNAttention", "it has no blocks.0.mixer.conv.weight"), ("GPSA", "mixer.gate")):
        error = refused(f"{evaluate} --layer {layer} --override", tmp_path / "not", capsys)
        assert "of another architecture" in error and missing in error


def test_another_size_is_evaluated_by_interpolated_positions(attention, tmp_path, capsys):
    evaluate = f"--test_only --checkpoint {attention} --test_limit 20 --device cpu --resize 12 --patch_size 2"
    assert run(evaluate, tmp_path / "run") == 0
    out, error = capsys.readouterr()
    assert "was trained with --resize 8, here 12" in error and "positions from 4 x 4 to 6 x 6 patches" in out
    for more in ("", "--override"):
        error = refused(f"{evaluate} {more} --strict", tmp_path / "not", capsys)
        assert "of another architecture or number of classes: pos_embedding" in error


def test_a_sweep_evaluates_one_checkpoint_as_many_models(attention, tmp_path, capsys):
    options = {"test_only": True, "override": True, "checkpoint": str(attention), "layer": "KvtAttention"}
    options |= {"device": "cpu", "test_limit": 20}
    sweep, folder = tmp_path / "sweep.yaml", tmp_path / "sweep"

    def points(*changes):
        sweep.write_text(yaml.safe_dump({"program": "vit_main.py", "options": options, "grid": {"K": [1, 4, 17]}}))
        found = name_points(*read_sweep(str(sweep), list(changes)))
        check_points(found, folder)
        return found

    for point in points():
        assert not is_finished(point, folder) and "--resume" not in point.argv(folder)
        assert vit_main.main(point.argv(folder)) == 0
        assert is_finished(point, folder)
    write_summary(points(), folder)
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    results = [json.loads((folder / f"K-{K}" / "test_results.json").read_text()) for K in (1, 4, 17)]
    for row, result in zip(rows, results, strict=True):
        assert [row[name] for name in ("K", "runs", "epoch_seconds")] == [str(result["options"]["K"]), "1", ""]
        assert float(row["top1"]) == result["top1"] and float(row["parameters"]) == result["parameters"] == 1218
        assert float(row["mflops_per_image"]) == result["flops_per_image"] / 1e6 > 0
    assert results[0]["flops_per_image"] < results[2]["flops_per_image"]
    assert (folder / "top1_by_K.png").exists() and not (folder / "curves.png").exists()
    options["test_limit"] = 30  # another evaluation, which the one that is there does not answer
    assert not any(is_finished(point, folder) for point in points())
    capsys.readouterr()


def test_a_run_is_tested_by_its_own_weights_and_resumed_without_those_it_started_from(attention, tmp_path, capsys):
    """Its config.yaml names them, and where its own were exported to."""
    start, folder, exported = tmp_path / "start.pt", tmp_path / "run", tmp_path / "out.safetensors"
    start.write_bytes(attention.read_bytes())
    assert run(f"{VIT} --lr 0.01 --checkpoint {start} --export {exported}", folder) == 0
    config = f"--config {folder / 'config.yaml'}"
    assert run(f"{config} --test_only", folder) == 0
    assert json.loads((folder / "test_results.json").read_text())["checkpoint"] == str(folder / "best.pt")
    assert run(f"{config} --test_only --checkpoint {start}", tmp_path / "of the start") == 0
    assert json.loads((tmp_path / "of the start" / "test_results.json").read_text())["checkpoint"] == str(start)
    (tmp_path / "by hand.yaml").write_text(f"checkpoint: {start}\n")  # says what to test, as far as anybody knows
    assert run(f"--config {shlex.quote(str(tmp_path / 'by hand.yaml'))} --device cpu --test_only", tmp_path / "by hand") == 0
    assert json.loads((tmp_path / "by hand" / "test_results.json").read_text())["checkpoint"] == str(start)
    start.unlink()
    exported.unlink()
    assert run(f"{config} --num_epochs 2 --resume", folder) == 0
    exported.unlink()
    assert f"--checkpoint {start} is no file" in refused(f"{config} --resume", tmp_path / "anew", capsys)
    assert f"checkpoint='{start}' does not exist" in refused(f"{config} --no-resume", tmp_path / "anew", capsys)


def test_a_sweep_must_know_that_its_points_are_evaluated(attention, tmp_path):
    (tmp_path / "o.yaml").write_text(f"test_only: true\ncheckpoint: {attention}\n")
    (tmp_path / "s.yaml").write_text(
        f"program: vit_main.py\noptions: {{config: {tmp_path / 'o.yaml'}}}\ngrid: {{seed: [0, 1]}}\n"
    )
    with pytest.raises(ValueError, match="test_only is set by a file of options; set it in the sweep"):
        check_points(name_points(*read_sweep(str(tmp_path / "s.yaml"), [])), tmp_path)


# --- what learns ----------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_stays_as_it_was(attention, tmp_path, capsys):
    line = f"{VIT} --checkpoint {attention} --freeze backbone --dropout 0.5 --drop_path 0.5 --lr 0.1"
    assert run(line, tmp_path / "run") == 0
    assert ": 1,218 parameters (90 of them trained)" in capsys.readouterr().out
    before, after = weights_of(attention), weights_of(tmp_path / "run" / "last.pt")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["classifier.weight", "classifier.bias"]
    lines = (tmp_path / "run" / "model.txt").read_text().splitlines()
    assert sum(each.endswith("frozen") for each in lines) == len(before) - 2
    assert "trained 90" in {" ".join(each.split()) for each in lines}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trained_parameters"] == 90


def test_frozen_parts_compute_what_they_do_in_evaluation():
    model = make(dropout=0.5, drop_path=0.5)
    freeze(model, "backbone")
    start_training(model)
    x = torch.randn(4, 1, 8, 8)
    assert model.training and torch.equal(model(x), model(x))
    network = AllConvNet(AllConvNetConfig(layer="Conv2d", channels=(4,), in_channels=1, image_size=8))
    freeze(network, "backbone")
    start_training(network)
    assert network.dropout.training and not network.layers[0][1].training
    network(x)
    assert not network.layers[0][1].running_mean.any()
    start_training(free := make(dropout=0.5))
    assert all(module.training for module in free.modules())


def test_the_frozen_layers_of_a_classifier_drop_nothing():
    vgg = AllConvNetConfig(model="vgg11", layer="Conv2d", image_size=32, batch_norm=True, classifier_width=4)
    with torch.device("meta"):
        network = build_network(vgg)
    freeze(network, "backbone")
    start_training(network)
    assert not network.features.training
    dropouts = [part.training for part in network.classifier if isinstance(part, nn.Dropout)]
    assert dropouts == [False, True]  # the second is of the linear that learns


def test_a_classifier_that_is_called_head_is_what_learns():
    """As timm's, whose `head` is a module."""
    model = nn.Module()
    model.body, model.head = nn.Linear(3, 3), nn.Linear(3, 2)
    freeze(model, "backbone")
    start_training(model)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["head.weight", "head.bias"]
    assert not model.body.training and model.head.training


def test_freezing_and_layer_decay_need_a_model_that_can():
    for call in (lambda: freeze(nn.Linear(2, 2), "backbone"), lambda: layer_scales(nn.Linear(2, 2), 0.5)):
        with pytest.raises(RunError, match=r"^--(freeze|layer_decay) .*this model has no"):
            call()


def test_without_a_checkpoint_freezing_is_said(tmp_path, capsys):
    assert run(f"{CONVNET} --num_epochs 1 --freeze backbone", tmp_path / "run", allconvnet_main) == 0
    assert "warning: --freeze backbone goes with the weights of a --checkpoint" in capsys.readouterr().err


def by_name(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_decay_and_undecayed_parameters_are_those_of_timm(decay):
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 10}
    theirs = VisionTransformer(**sizes, mlp_ratio=1)
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=decay)
    expected = by_name(theirs, groups)
    ours = make(num_layers=3, patch_norm=False, final_norm=True)
    config = TrainConfig(lr=0.1, weight_decay=0.05, layer_decay=decay, decay_norms=False)
    found = by_name(ours, parameter_groups(ours, config))
    renamed = {"patch_embed.proj": "patch_embedding", "cls_token": "class_token", "pos_embed": "pos_embedding", "attn": "mixer"}
    renamed |= {"fc1": "0", "fc2": "2", "head": "classifier"}
    assert len(expected) == len(found)
    for name, group in expected.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        assert found[name]["lr"] == pytest.approx(0.1 * group["lr_scale"], rel=1e-12), name
        assert found[name]["weight_decay"] == group["weight_decay"], name


def test_by_default_all_parameters_are_one_group_in_their_order():
    model = make()
    (group,) = parameter_groups(model, TrainConfig(lr=0.1, weight_decay=0.05))
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.05)


def test_layers_of_a_convolutional_network_by_depth():
    model = AllConvNet(AllConvNetConfig(layer="Conv2d", channels=(4, 8), in_channels=1, image_size=8))
    scales = layer_scales(model, 0.5)
    assert {name[:8]: scale for name, scale in scales.items()} == {"layers.0": 0.25, "layers.1": 0.5, "classifi": 1}


@pytest.mark.parametrize("scheduler", ["cosine", "step", "plateau", "none"])
def test_schedules_keep_the_ratios_of_layer_decay(scheduler):
    config = TrainConfig(lr=0.1, layer_decay=0.5, scheduler=scheduler, warmup_epochs=1, num_epochs=5, lr_step=1, lr_gamma=0.5)
    schedule = LearningRate(make_optimizer(make(), config), config, steps_per_epoch=2)
    plain = LearningRate(make_optimizer(make(), TrainConfig(**vars(config) | {"layer_decay": 1.0})), config, steps_per_epoch=2)
    for step in range(10):
        rates = [group["lr"] for group in schedule.optimizer.param_groups]
        assert schedule.lr == plain.lr == rates[0]
        assert rates == pytest.approx([schedule.lr * 0.5**depth for depth in range(len(rates))], rel=1e-12, abs=0)
        for one in (schedule, plain):
            one.optimizer.step()
            one.step()
            if step % 2:
                one.epoch_done(1.0, 50.0)
    assert len(rates) == 4 and (schedule.lr < 0.1) == (scheduler != "none")


# --- stochastic depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "layers"), [(0.1, 1), (0.3, 2), (0.5, 12)])
def test_rates_rise_linearly_as_in_timm(rate, layers):
    from timm.layers import calculate_drop_path_rates

    assert drop_path_rates(rate, layers) == calculate_drop_path_rates(rate, layers)
    model = make(drop_path=rate, num_layers=layers)
    assert [block.drop_path.rate for block in model.blocks] == calculate_drop_path_rates(rate, layers)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 2, 4, 4)])
def test_drop_path_is_that_of_timm(shape):
    from timm.layers import DropPath as Theirs

    x = torch.randn(shape, requires_grad=True)
    results = []
    for layer in (DropPath(0.4), Theirs(0.4)):
        torch.manual_seed(3)
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        assert layer.eval()(x) is x
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    kept = [bool(sample.any()) for sample in results[0][0]]
    assert any(kept) and not all(kept)


@pytest.mark.parametrize(("kind", "post_norm"), [("vit", False), ("convit", False), ("convit", True)])
def test_a_block_skips_its_parts_for_whole_images(kind, post_norm):
    """Attention and MLP are dropped apart, so an image may have both, one or none of them."""
    mixer = nn.Linear(8, 8)
    block = Block(8, 8, mixer, 0.0, 0.5) if kind == "vit" else ConViTLayer(8, mixer, pre_norm=not post_norm, drop_path=0.5)
    x, norm1, norm2 = torch.randn(64, 5, 8), block.norm1, block.norm2
    out = block.train()(x)
    seen = set()
    for image, result in zip(x, out, strict=True):
        for first in (0, 2):
            for second in (0, 2):
                if post_norm:
                    y = norm1(image + first * mixer(image))
                    y = norm2(y + second * block.mlp(y))
                else:
                    y = image + first * mixer(norm1(image))
                    y = y + second * block.mlp(norm2(y))
                if torch.allclose(y, result, atol=1e-5):
                    seen.add((first, second))
                    break
            else:
                continue
            break
        else:
            raise AssertionError("an image was dropped in part")
    assert len(seen) == 4


def test_convits_own_config_has_it_too():
    model = ConViTWithLinearClassifier(ConViTConfig(8, 1, 2, 2, 1, 18, 5, heads=9, drop_path=0.4))
    assert [block.drop_path.rate for block in model.backbone.blocks] == pytest.approx([0, 0.2, 0.4])
    with pytest.raises(ValueError, match="drop_path=1"):
        ConViTConfig(8, 1, 2, 2, 1, 18, 5, heads=9, drop_path=1.0)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        "--layer_decay 0.6 --no-decay_norms --weight_decay 0.05 --drop_path 0.4 --scheduler cosine --dropout 0.1",
        "--freeze backbone --scheduler plateau --lr_step 1 --optimizer sgd",
    ],
)
def test_fine_tuning_goes_on_bit_for_bit(more, attention, tmp_path, monkeypatch):
    line = f"{VIT} --num_epochs 2 --layer ConvNNAttention --K 3 --checkpoint {attention} {more}"
    assert run(line, tmp_path / "whole") == 0
    original, calls = train_eval.train_step, []

    def train_step(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_eval, "train_step", train_step)
    run(f"{line} --save_minutes 0", tmp_path / "run")
    monkeypatch.undo()
    torch.manual_seed(77)
    assert run(f"{line} --resume", tmp_path / "run") == 0
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "run"))
    assert all(torch.equal(a, b) for a, b in zip(one["model"].values(), other["model"].values(), strict=True))
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
