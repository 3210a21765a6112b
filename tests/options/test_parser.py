"""Flags over YAML over defaults, and every mistake in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from options.runs import PROGRAMS, parse_options
from tests.options.reference import ROOT, assert_says, error_of, parse, parse_yaml, values

pytestmark = pytest.mark.usefixtures("folder")


def test_flags_win_over_yaml_over_defaults():
    assert parse_yaml("K: 5\nlr: 0.5\n", "--K", "7").as_dict() == values("--K 7 --lr 0.5")
    assert parse_yaml("augment: true\nuse_amp: true", "--no-augment").as_dict() == values("--use_amp")
    assert parse_yaml("channels: [8, 8]", "--channels", "4").model.channels == (4,)
    assert parse_yaml("") == parse_yaml("# nothing\n") == parse("")
    assert parse("--config", "c.yaml", "--K", "3") == parse("--K", "3", "--config", "c.yaml")


def test_a_programs_own_defaults_lose_to_yaml_and_flags():
    def lr(*argv):
        return parse_options(PROGRAMS["allconvnet_main.py"]._replace(defaults={"lr": 1e-4}), "Train.", list(argv))[0].train.lr

    Path("lr.yaml").write_text("lr: 0.3")
    assert (lr(), lr("--config", "lr.yaml"), lr("--config", "lr.yaml", "--lr", "0.2")) == (1e-4, 0.3, 0.2)


def test_a_boolean_flag_leaves_the_next_flag_alone():
    found = values("--augment --K 4 --use_amp")
    assert found["augment"] is found["use_amp"] is True and found["K"] == 4


def test_a_run_takes_one_file_of_options(capsys):
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text("K: 3")
    assert parse("--config a.yaml --config a.yaml").model.K == 3
    line = error_of(parse, "--config a.yaml --lr 1 --config b.yaml", capsys=capsys)
    assert_says(line, "--config; more than once; a.yaml, b.yaml")


# Command line, and what the one line must say: the flag, the value, and what would work.
BAD = [
    # unknown
    ("--chan 3", "--chan; did you mean --channels?"),
    ("--chan=3", "--chan; did you mean --channels?"),
    ("--num_epoch 3", "--num_epoch; did you mean --num_epochs?"),
    ("--k 3", "--k; did you mean --K?"),
    ("-K 3", "-K; did you mean --K?"),
    ("--use-amp", "--use-amp; did you mean --use_amp?"),
    ("--learning_rate 3", "--learning_rate; did you mean --lr?"),
    ("--bs 3", "--bs; did you mean --batch_size?"),
    ("--exp-name x", "--exp-name; did you mean --output_dir?"),
    ("--layer Branching_Attn", "layer='Branching_Attn'; did you mean Conv2d/ConvNN_Attn?"),
    ("--layer KvtAttention", "layer='KvtAttention'; KvtAttention is a layer of vit_main.py"),
    ("--no-lr", "--no-lr"),
    ("--d_model 3", "--d_model"),
    ("stray", "'stray'"),
    ("K=3", "'K=3'"),
    ("--num_epochs 3 stray", "'stray'"),
    ("--layer ConvNN Attention", "'Attention'"),
    ("--layer convNN", "layer='convNN'; did you mean ConvNN?; Conv2d, Conv2d_New, ConvNN, ConvNN_Attn, Attention"),
    ("--layer K=3", "layer='K=3'"),
    ("--dataset mnits", "dataset='mnits'; did you mean mnist?; cifar10"),
    ("--dataset MNIST", "dataset='MNIST'; did you mean mnist?"),
    ("--similarity_type loc", "similarity_type='loc'; did you mean Loc?; Col, Loc, Loc_Col"),
    # types
    ("--K", "--K needs a value"),
    ("--K x", "K='x'; whole number"),
    ("--K 2.5", "K='2.5'; whole number"),
    ("--K 3.0", "K='3.0'; whole number"),
    ("--K none", "K='none'; whole number"),
    ("--num_epochs 1e2", "num_epochs='1e2'; whole number"),
    ("--lr fast", "lr='fast'; number"),
    ("--K 1_0", "K='1_0'; whole number; plain decimal digits"),
    ("--K 0x10", "K='0x10'; whole number; plain decimal digits"),
    ("--K 010", "K='010'; whole number; plain decimal digits"),
    ("--K ' 3'", "K=' 3'; whole number"),
    ("--K \u0663", "K='\u0663'; whole number"),
    ("--channels 8 1_6", "channels='1_6'; whole number"),
    ("--lr 1_0.5", "lr='1_0.5'; number; plain decimal digits"),
    ("--lr 1e-0_3", "lr='1e-0_3'; number"),
    ("--channels", "--channels needs at least one value"),
    ("--channels 8 x", "channels='x'; whole number"),
    ("--channels 8,16", "channels='8,16'; whole number"),
    ("--auto_augment randaugment", "auto_augment='randaugment'; none, rand, trivial"),
    ("--random_erasing 1.1", "random_erasing=1.1; 1"),
    ("--random_erasing -0.1", "random_erasing=-0.1; 0"),
    ("--augment maybe", "augment='maybe'; True or False"),
    ("--augment 1", "augment='1'; True or False"),
    ("--no-augment True", "'True'"),
    ("--lr nan", "lr=nan; finite"),
    ("--lr inf", "lr=inf; finite"),
    ("--lr -inf", "lr=-inf; finite"),
    ("--lr 1e999", "lr=inf; finite"),
    ("--branch_ratio nan", "branch_ratio=nan; finite"),
    ("--checkpoint ''", "checkpoint=''; empty"),
    ("--output_dir ''", "output_dir=''; empty"),
    ("--config ''", "--config ''"),
    # ranges
    ("--K 0", "K=0; at least 1"),
    ("--K -3", "K=-3; at least 1"),
    ("--channels 8 0", "channels=0; at least 1"),
    ("--kernel_size 0", "kernel_size=0; at least 1"),
    ("--num_heads 0", "num_heads=0; at least 1"),
    ("--shuffle_scale 0", "shuffle_scale=0; at least 1"),
    ("--padding -1", "padding=-1; at least 0"),
    ("--sample_padding -1", "sample_padding=-1; at least 0"),
    ("--num_samples 0", "num_samples=0; at least 1; -1"),
    ("--num_samples -2", "num_samples=-2; at least -1"),
    ("--branch_ratio 1.5", "branch_ratio=1.5 must be at most 1"),
    ("--lambda_param -0.5", "lambda_param=-0.5 must be at least 0"),
    ("--lr -1e-3", "lr=-0.001; at least 0"),
    ("--val_fraction 1", "val_fraction=1.0; below 1"),
    ("--label_smoothing 1.5", "label_smoothing=1.5; below 1"),
    ("--ema_decay 1", "ema_decay=1.0; below 1"),
    ("--momentum -.5", "momentum=-0.5; at least 0"),
    ("--noise -1", "noise=-1.0; at least 0"),
    ("--batch_size 0", "batch_size=0; at least 1"),
    ("--num_epochs 0", "num_epochs=0; at least 1"),
    ("--train_limit 0", "train_limit=0; at least 1"),
    ("--num_workers -1", "num_workers=-1; at least 0"),
    ("--seed -1", "seed=-1; at least 0"),
    ("--seed 2147483648", "seed=2147483648; below 2147483648"),
    # no run reaches these
    ("--lr 1e300", "lr=1e+300 must be at most 1e+38"),
    ("--noise 1e300", "noise=1e+300; at most 1000"),
    ("--mixup 1e-300", "mixup=1e-300; 0; at least 0.001"),
    ("--cutmix 1001", "cutmix=1001.0; at most 1000"),
    (f"--batch_size 1{30 * '0'}", f"batch_size=1{30 * '0'}; at most 10000000"),
    ("--num_layers 1000000000", "num_layers=1000000000; at most 10000"),
    ("--num_workers 100000", "num_workers=100000; at most 1024"),
    ("--resize 100000", "resize=100000; at most 16384"),
    # neighbors: the default is 32 x 32 with BA and scale 2, so 16 x 16 tokens
    ("--K 257", "K=257; 256 tokens; 1 to 256"),
    ("--K 325 --padding 1", "K=325; 1 to 324"),
    ("--K 257 --padding 1 --layer ConvNN_Attn", "K=257; 1 to 256"),
    ("--K 1025 --shuffle_pattern NA", "K=1025; 1 to 1024"),
    ("--K 65 --shuffle_scale 4", "K=65; 1 to 64"),
    ("--K 17 --dataset digits", "K=17; 1 to 16"),
    ("--K 257 --layer Conv2d/ConvNN", "K=257; 1 to 256"),
    ("--K 257 --sampling_type random", "K=257; 1 to 256"),  # num_samples=-1 means all
    ("--sampling_type random --num_samples 8", "K=9; 8 candidates (sampling_type=random, num_samples=8); lower K"),
    ("--sampling_type random --num_samples 257", "num_samples=257; 256 tokens"),
    ("--sampling_type random --num_samples 325 --padding 1", "num_samples=325; 324 tokens"),
    ("--sampling_type spatial --num_samples 2", "K=9; 4 candidates (sampling_type=spatial, num_samples=2); raise num_samples"),
    ("--sampling_type spatial --num_samples 3 --K 10", "K=10; 9 candidates; num_samples=3"),
    ("--sampling_type spatial --num_samples 17", "num_samples=17; 16 x 16; at most 16"),
    ("--sampling_type spatial --num_samples 19 --padding 1", "num_samples=19; 18 x 18; at most 18"),
    ("--sampling_type spatial --num_samples 11 --sample_padding 3", "num_samples=11; sample_padding=3; at most 10"),
    ("--sampling_type spatial --num_samples 3 --sample_padding 8", "num_samples=3; sample_padding=8; at most 0"),
    # heads divide the channels that attention runs on: times 4 under A and BA
    ("--layer Attention --num_heads 3", "num_heads=3; 128"),
    ("--layer Attention --num_heads 64 --shuffle_pattern NA", "num_heads=64; 32"),
    ("--layer Attention --num_heads 64 --shuffle_pattern B", "num_heads=64; 32"),
    ("--layer Conv2d/Attention --num_heads 128", "num_heads=128; 64"),
    ("--layer Conv2d/Attention --num_heads 3 --branch_ratio 1", "num_heads=3; 128"),
    ("--layer Attention/Conv2d --num_heads 3 --branch_ratio 0", "num_heads=3; 128"),
    # shapes
    ("--dataset mnist --shuffle_scale 3", "shuffle_scale=3; 28 x 28"),
    ("--resize 33", "shuffle_scale=2; 33 x 33; resize"),
    ("--shuffle_scale 3 --layer Attention", "shuffle_scale=3; 32 x 32"),
    ("--shuffle_scale 3 --layer Conv2d/ConvNN_Attn", "shuffle_scale=3; 32 x 32"),
    ("--shuffle_pattern B --dataset mnist --K 1", "shuffle_scale=2; 7 x 7"),  # 28, 14, 7
    ("--shuffle_pattern B", "K=9; 1 to 4"),  # 16 x 16, 8 x 8, 4 x 4, 2 x 2 tokens
    ("--shuffle_pattern A --layer Conv2d/ConvNN", "shuffle_pattern=A; Conv2d; BA or NA"),
    ("--shuffle_pattern B --layer Attention/Conv2d", "shuffle_pattern=B; Conv2d; BA or NA"),
    ("--num_layers 3", "num_layers=3; channels=32 64 128 256 512"),
    ("--num_layers 1 --channels 8 8", "num_layers=1; channels=8 8"),
    ("--layer Conv2d/ConvNN --channels 1", "channels=1; layer=Conv2d/ConvNN"),
    # training and files
    ("--accumulate_steps 257", "accumulate_steps=257; batch_size=256"),
    ("--accumulate_steps 3 --batch_size 2", "accumulate_steps=3; batch_size=2"),
    ("--warmup_epochs 5 --num_epochs 4", "warmup_epochs=5; num_epochs=4"),
    ("--warmup_epochs 1 --warmup_steps 9", "warmup_epochs=1; warmup_steps=9; drop one"),
    ("--lr 0.1 --min_lr 0.2", "min_lr=0.2; lr=0.1"),
    ("--dataset task_find --augment", "augment=True; dataset=task_find; drop it"),
    ("--dataset task_find --val_fraction 0.1", "val_fraction=0.1; dataset=task_find; drop it"),
    ("--dataset task_find --task_symbols 5", "task_symbols=5; 6"),
    ("--checkpoint no.pt", "checkpoint='no.pt'; does not exist"),
    ("--checkpoint no.safetensors --test_only", "checkpoint='no.safetensors'; does not exist"),
    (f"--checkpoint {'x' * 300}.pt", "checkpoint; does not exist"),
    ("--checkpoint no.txt", "checkpoint='no.txt'; .pt; .safetensors"),
    ("--checkpoint .pt/", "checkpoint='.pt/'"),
    ("--export weights.pt", "export='weights.pt'; .safetensors"),
    ("--dataset folder --data_path gone", "data_path='gone'; train/; val/"),
    (f"--dataset folder --data_path {'x' * 300}", "data_path; train/; val/"),
    ("--config gone.yaml", "--config 'gone.yaml'; No such file"),
    ("--config K=3.yaml", "--config 'K=3.yaml'; No such file"),
    ("--config .", "--config '.'; directory"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line[:60] for line, _ in BAD])
def test_a_bad_command_line_ends_in_one_clear_line(line, says, folder, capsys):
    found = error_of(parse, line, capsys=capsys)
    assert "error: " in found
    assert_says(found.split("error: ", 1)[1], says)
    assert not list(folder.iterdir())  # nothing is written


BAD_YAML = [
    ("K: 3\nlr: 1\nK: 4\n", "--config 'c.yaml'; 'K'; twice"),
    ("{K: 3, K: 3}", "--config 'c.yaml'; 'K'; twice"),
    ("chanels: [8]", "--config 'c.yaml'; 'chanels'; did you mean channels?"),
    ("k: 8", "'k'; did you mean K?"),
    ("no-augment: true", "'no-augment'; did you mean augment?"),
    ("config: d.yaml", "'config'"),
    ("3: 4", "unknown key 3"),
    ("? [K, lr]\n: 3", "--config 'c.yaml'; line 1"),
    ("? {K: 3}\n: 3", "--config 'c.yaml'; line 1"),
    ("- K\n- 3\n", "--config 'c.yaml'; name: value"),
    ("just text", "--config 'c.yaml'; name: value"),
    ("0", "--config 'c.yaml'; name: value"),
    ("K: [1\n", "--config 'c.yaml'; line 1"),
    ("\tK: 3", "--config 'c.yaml'; line 1"),
    ("K: 3\n---\nK: 4\n", "--config 'c.yaml'; single document"),
    ("K: !!python/name:os.system", "--config 'c.yaml'; os.system"),
    ("[" * 5000, "--config 'c.yaml'"),
    (b"K: \xff", "--config 'c.yaml'; utf-8"),
    (b"K: \x00", "--config 'c.yaml'"),
    ("batch_size: !!int 1:30", "--config 'c.yaml'; line 1; a tag; without it"),
    ("lr: !!timestamp x", "--config 'c.yaml'; a tag"),
    ("channels: !!set {4, 8}", "--config 'c.yaml'; a tag"),
    ("!!omap [K: 3]", "--config 'c.yaml'; a tag"),
    ("learning_rate: 1", "--config 'c.yaml'; 'learning_rate'; did you mean lr?"),
    ("lr: 1" + 400 * "0", "--config 'c.yaml': lr=inf; finite"),
    ("K: 3.0", "--config 'c.yaml': K=3.0; whole number"),
    ("batch_size: 1:30", "batch_size='1:30'; whole number; plain decimal digits"),
    ("K: 1_0", "K='1_0'; whole number"),
    ("K: 0x10", "K='0x10'; whole number"),
    ("K: 0b11", "K='0b11'; whole number"),
    ("K: 010", "K='010'; whole number"),
    ("lr: 1:30.5", "lr='1:30.5'; number"),
    ("lr: 1_0.5", "lr='1_0.5'; number"),
    ("channels: [8, 1:30]", "channels='1:30'; whole number"),
    ("augment: yes", "augment='yes'; True or False"),
    ("augment: off", "augment='off'; True or False"),
    ("K: true", "K=True; whole number"),
    ("K: null", "K=None; whole number"),
    ("K: [3]", "K=[3]; whole number"),
    ("K: &again [*again]", "--config 'c.yaml'; line 1; an alias; again"),
    ("".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)), "--config 'c.yaml'; an alias; a0"),
    ("base: &base {K: 3}\n<<: *base\n", "--config 'c.yaml'; line 2; an alias"),
    ("# " + 10**5 * "x", "--config 'c.yaml'; larger than 100,000 bytes"),
    (f"? {5000 * 'x'}\n: 1", "--config 'c.yaml'; unknown key"),
    ("K: 0", "K=0; at least 1"),
    ("seed: none", "seed='none'; whole number"),
    ("lr: true", "lr=True; number"),
    ("lr: .nan", "lr=nan; finite"),
    ("lr: -.inf", "lr=-inf; finite"),
    ("lr: 1e999", "lr=inf; finite"),
    ("lr: {a: 1}", "lr={'a': 1}; number"),
    ("augment: maybe", "augment='maybe'; True or False"),
    ("augment: 1", "augment=1; True or False"),
    ("channels: 32", "channels=32; list"),
    ("channels: 32 64", "channels='32 64'; list"),
    ("channels: []", "channels=(); at least one"),
    ("channels: [8, 6.5]", "channels=6.5; whole number"),
    ("channels: [[8]]", "channels=[8]; whole number"),
    ("layer: 3", "layer=3; text"),
    ("layer: [Conv2d, ConvNN]", "layer=['Conv2d', 'ConvNN']; text"),
    ("scheduler: null", "scheduler=None; text"),
    ("checkpoint: ''", "checkpoint=''; empty"),
    ("export: weights.pt", "export='weights.pt'; .safetensors"),
    ("K: 257", "K=257; 1 to 256"),
]


@pytest.mark.parametrize(("text", "says"), BAD_YAML, ids=[str(text)[:40] for text, _ in BAD_YAML])
def test_a_bad_yaml_file_ends_in_one_clear_line(text, says, capsys):
    assert_says(error_of(parse_yaml, text, capsys=capsys), says)


def test_a_pipe_a_device_and_a_link_to_itself_as_config(capsys):
    os.mkfifo("pipe.yaml")
    os.symlink("loop.yaml", "loop.yaml")
    for name, says in [
        ("pipe.yaml", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("loop.yaml", "Too many levels of symbolic links"),
    ]:
        assert_says(error_of(parse, "--config", name, capsys=capsys), f"--config {name!r}; {says}")


HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "safetensors", "tqdm", "tensorboard", "wandb"}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-c", "import options.runs"], 0),
        (["allconvnet_main.py", "--help"], 0),
        (["allconvnet_main.py", "--K", "9999"], 2),
        (["allconvnet_main.py", "--config", "configs/demo.yaml", "--chan", "3"], 2),
        (["vit_main.py", "--help"], 0),
        (["vit_main.py", "--layer", "NeighborhoodAttention", "--kernel_size", "4"], 2),
    ],
    ids=["import", "help", "bad value", "bad flag", "ViT help", "ViT bad value"],
)
def test_nothing_heavy_is_imported_for_help_and_errors(words, status):
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "options" in imported and not imported & HEAVY
    assert "Traceback" not in done.stderr
    rest = [line for line in lines if not line.startswith("import time:")]
    assert len(rest) == (1 if status else 0) and all(line.startswith(f"{words[0]}: error: ") for line in rest)
