"""`TrainConfig`: options of training, of the system, and of the output."""

from __future__ import annotations

import os
from dataclasses import dataclass

from options.fields import BATCH, EPOCHS, LARGEST, check_fields, option

KERNELS = ("auto", "chunked", "triton")
KERNELS_HELP = "kernels of search and aggregation: the fastest for the device, PyTorch in chunks, or Triton (CUDA)"


# Values of the environment variable that replaces --kernels; the last one is for tests.
KERNELS_VARIABLE, KERNELS_IN_ENVIRONMENT = "CONVNN_KERNELS", (*KERNELS, "reference")


SYSTEM = {"group": "system and output"}


# Options that may differ when a run is resumed: length, place and output; device and compilation change numbers by rounding
# only. Any other change would make it another run.
RESUME_MAY_CHANGE = set(
    "num_epochs num_workers data_path download device output_dir resume checkpoint save_minutes save_every export test_only "
    "tensorboard wandb early_stopping use_compiled compile_mode kernels overwrite override strict trust_code".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """Training, the system that it runs on, and its output."""

    heading = "training"

    batch_size: int = option(256, "images per optimizer step, over all accumulated micro-batches", low=1, high=BATCH)
    num_epochs: int = option(150, "epochs", low=1, high=EPOCHS)
    use_amp: bool = option(False, "automatic mixed precision")
    amp_dtype: str = option("bfloat16", "precision under --use_amp; float16 needs CUDA", choices=("bfloat16", "float16"))
    use_compiled: bool = option(False, "torch.compile the model")
    compile_mode: str = option(
        "default",
        "torch.compile mode; reduce-memory is default with activations recomputed",
        choices=("default", "reduce-overhead", "reduce-memory", "max-autotune"),
    )
    clip_grad_norm: float = option(1.0, "largest norm of the gradient; 0: no clipping", low=0, high=LARGEST)
    accumulate_steps: int = option(1, "micro-batches per optimizer step", low=1, high=BATCH)
    criterion: str = option("CrossEntropy", "loss; MSE is on one-hot targets", choices=("CrossEntropy", "MSE"))
    label_smoothing: float = option(0.0, "share of the target spread over all classes", low=0, below=1)
    optimizer: str = option("adamw", "optimizer", choices=("adam", "sgd", "adamw"))
    lr: float = option(1e-3, "learning rate", low=0, high=LARGEST)
    weight_decay: float = option(1e-6, "weight decay", low=0, high=1e6)
    decay_norms: bool = option(True, "weight decay of norms, biases, positions and the class token too")
    layer_decay: float = option(
        1.0, "learning rate of each block relative to the next one; embeddings get the smallest", low=0.01, high=1
    )
    freeze: str | None = option(None, "backbone: train the classifier only", kind=str, choices=("backbone",))
    momentum: float = option(0.9, "sgd: momentum", low=0, below=1)
    scheduler: str = option(
        "none",
        "step: times lr_gamma every lr_step epochs; cosine: to 0 at the end; plateau: times lr_gamma after lr_step "
        "epochs without a better loss",
        choices=("step", "cosine", "plateau", "none"),
    )
    lr_step: int = option(20, "step, plateau: epochs", low=1, high=EPOCHS)
    lr_gamma: float = option(0.1, "step, plateau: factor", low=0, below=1)
    warmup_epochs: int = option(0, "epochs over which the learning rate rises linearly from 0", low=0, high=EPOCHS)
    mixup: float = option(
        0.0, "alpha of mixup; 0: off. With cutmix, each batch takes one of them", low=0, high=1000, least=1e-3
    )
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", low=0, high=1000, least=1e-3)
    ema_decay: float = option(0.0, "decay of the averaged weights, which are then evaluated; 0: off", low=0, below=1)
    early_stopping: int = option(
        0, "stop after n epochs without a better test (or validation) loss; 0: never", low=0, high=EPOCHS
    )

    device: str = option("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cpu", "cuda", "mps"), **SYSTEM)
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS, **SYSTEM)
    seed: int = option(0, "of weights, order and augmentation", low=0, below=2**31, **SYSTEM)
    deterministic: bool = option(False, "use deterministic algorithms only", **SYSTEM)
    output_dir: str | None = option(None, "where results go (default: ./Output/<model>/<layer>)", kind=str, **SYSTEM)
    resume: bool = option(False, "resume from last.pt in the output directory; start if there is none", **SYSTEM)
    overwrite: bool = option(
        False,
        "write over a run in the output directory (its weights stay as *.pt.old), or over the file of --export",
        **SYSTEM,
    )
    checkpoint: str | None = option(
        None, "weights to start from, or to evaluate with --test_only: FILE.pt or FILE.safetensors", kind=str, **SYSTEM
    )
    strict: bool = option(False, "checkpoint: require exactly the weights of this model, in their shapes", **SYSTEM)
    save_minutes: float = option(
        10.0, "write last.pt this often within an epoch too; 0: only at its end", low=0, high=10**7, **SYSTEM
    )
    save_every: int = option(0, "keep epoch_<n>.pt every n epochs; 0: none", low=0, high=EPOCHS, **SYSTEM)
    export: str | None = option(
        None, "write the best weights to FILE.safetensors, or the model with them to FILE.onnx", kind=str, **SYSTEM
    )
    test_only: bool = option(
        False,
        "evaluate --checkpoint, or best.pt in the output directory, built as in its training, and write "
        "test_results.json (test_results-2.json and so on beside a result of other options)",
        **SYSTEM,
    )
    override: bool = option(
        False,
        "test_only: given options of the model, and other classes, win over the checkpoint; resume: other images may be given",
        **SYSTEM,
    )
    trust_code: bool = option(
        False, "test_only: run the file of the custom mixer that the checkpoint names, whoever wrote it", **SYSTEM
    )
    tensorboard: bool = option(False, "write event files for TensorBoard too", **SYSTEM)
    wandb: bool = option(False, "log to Weights & Biases too; WANDB_MODE=offline keeps that in the output directory", **SYSTEM)

    def __post_init__(self):
        check_fields(self)
        if self.accumulate_steps > self.batch_size:
            raise ValueError(f"accumulate_steps={self.accumulate_steps} is more than batch_size={self.batch_size} images")
        if self.warmup_epochs > self.num_epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is more than num_epochs={self.num_epochs}")
        if self.export and not self.export.endswith((".safetensors", ".onnx")):
            raise ValueError(f"export={self.export!r} must end in .safetensors or .onnx")
        if self.override and not (self.test_only or self.resume):
            raise ValueError("override=True needs test_only=True or resume=True: training takes all options as they are given")
        if self.freeze and self.layer_decay != 1:
            raise ValueError(
                f"layer_decay={self.layer_decay} is for a backbone that is trained, and freeze={self.freeze} keeps it fixed; "
                "drop one of them"
            )
        if self.export and self.test_only:
            raise ValueError(f"export={self.export!r} writes weights and test_only=True writes only its results; drop one")
        if self.checkpoint and not self.checkpoint.endswith((".pt", ".pth", ".safetensors")):
            raise ValueError(f"checkpoint={self.checkpoint!r} must end in .pt, .pth or .safetensors")
        if self.checkpoint and not self.resume:  # a run that is resumed does not read it
            if os.path.isdir(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} is a folder; name a file in it")
            if not os.path.isfile(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} does not exist")
