"""`TrainConfig`: options of training, of the system, and of the output."""

import os
from dataclasses import dataclass

from options.fields import BATCH, EPOCHS, LARGEST, check_fields, option

KERNELS = ("auto", "chunked", "triton")
# Help texts of options that the benchmark declares too.
DEVICE_HELP = "auto: cuda, else mps, else cpu"
KERNELS_HELP = "kernels of search and aggregation: the fastest for the device, PyTorch in chunks, or Triton (CUDA)"


# The environment variable that replaces --kernels, and its values; the last one is for tests.
KERNELS_VARIABLE, KERNELS_IN_ENVIRONMENT = "CONVNN_KERNELS", (*KERNELS, "reference")


SYSTEM = {"group": "system and output"}


# Options that may change when a run is resumed: its length, paths and output, and the device and compilation, which change
# results by rounding only. Any other change makes it a different run.
RESUME_MAY_CHANGE = set(
    "num_epochs num_workers data_path download device output_dir resume checkpoint save_minutes save_every export test_only "
    "tensorboard wandb early_stopping use_compiled compile_mode kernels overwrite override strict trust_code".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """Training, system and output."""

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
    decay_norms: bool = option(True, "apply weight decay to norms, biases, positions and the class token too")
    layer_decay: float = option(
        1.0, "learning rate of each block relative to the next; the embeddings have the lowest", low=0.01, high=1
    )
    freeze: str | None = option(None, "part to freeze; backbone: train the classifier only", kind=str, choices=("backbone",))
    beta1: float = option(0.9, "adam, adamw: decay of the mean of the gradient", low=0, below=1)
    beta2: float = option(0.999, "adam, adamw: decay of the mean of the squared gradient", low=0, below=1)
    momentum: float = option(0.9, "sgd: momentum", low=0, below=1)
    scheduler: str = option(
        "none",
        "step: times lr_gamma every lr_step epochs; cosine: to min_lr at the end; plateau: times lr_gamma after lr_step "
        "epochs without a better plateau_metric",
        choices=("step", "cosine", "plateau", "none"),
    )
    lr_step: int = option(20, "step, plateau: epochs", low=1, high=EPOCHS)
    lr_gamma: float = option(0.1, "step, plateau: factor", low=0, below=1)
    plateau_metric: str = option(
        "loss", "plateau: loss or top-1 accuracy, of the validation images or else the test images", choices=("loss", "top1")
    )
    warmup_epochs: int = option(
        0, "epochs over which the learning rate rises linearly from --lr / steps to --lr", low=0, high=EPOCHS
    )
    warmup_steps: int = option(0, "the same in optimizer steps", low=0, high=EPOCHS)
    min_lr: float = option(0.0, "cosine: learning rate at the end", low=0, high=LARGEST)
    mixup: float = option(
        0.0, "alpha of mixup; 0: off. With cutmix, each batch takes one of them", low=0, high=1000, least=1e-3
    )
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", low=0, high=1000, least=1e-3)
    ema_decay: float = option(
        0.0, "decay of the exponential moving average of the weights, which is then evaluated; 0: off", low=0, below=1
    )
    early_stopping: int = option(
        0, "stop after n epochs without a better test (or validation) loss; 0: never", low=0, high=EPOCHS
    )

    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda", "mps"), **SYSTEM)
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS, **SYSTEM)
    seed: int = option(0, "seed of weights, order of images and augmentation", low=0, below=2**31, **SYSTEM)
    deterministic: bool = option(False, "use deterministic algorithms only", **SYSTEM)
    output_dir: str | None = option(
        None, "folder for the results (default: ./Output/<model>/<layer>)", kind=str, path=True, **SYSTEM
    )
    resume: bool = option(False, "resume from last.pt in the output directory, or start if it does not exist", **SYSTEM)
    overwrite: bool = option(
        False,
        "replace a run in the output directory (its weights are kept as *.pt.old), or the file of --export",
        **SYSTEM,
    )
    checkpoint: str | None = option(
        None,
        "weights to start from, or to evaluate with --test_only: FILE.pt or FILE.safetensors",
        kind=str,
        path=True,
        **SYSTEM,
    )
    strict: bool = option(False, "require the checkpoint to match the names and shapes of all weights of the model", **SYSTEM)
    save_minutes: float = option(
        10.0, "minutes between writes of last.pt within an epoch; 0: write it only at the end", low=0, high=10**7, **SYSTEM
    )
    save_every: int = option(0, "keep epoch_<n>.pt every n epochs; 0: none", low=0, high=EPOCHS, **SYSTEM)
    export: str | None = option(
        None,
        "write the best weights, or those that test_only evaluates, to FILE.safetensors, or the model with them to FILE.onnx",
        kind=str,
        path=True,
        **SYSTEM,
    )
    test_only: bool = option(
        False,
        "evaluate --checkpoint, or best.pt in the output directory, with the model options of its training; write "
        "test_results.json (test_results-2.json and so on if other options have results there)",
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
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} is more than num_epochs={self.num_epochs}; lower warmup_epochs"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs}: drop one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is more than lr={self.lr}")
        if self.export and not self.export.endswith((".safetensors", ".onnx")):
            raise ValueError(f"export={self.export!r} must end in .safetensors or .onnx")
        if self.override and not (self.test_only or self.resume):
            raise ValueError("override=True works only with test_only=True or resume=True; drop it")
        if self.freeze and self.layer_decay != 1:
            raise ValueError(f"layer_decay={self.layer_decay} has no effect with freeze={self.freeze}; drop one of them")
        if self.checkpoint and not self.checkpoint.endswith((".pt", ".pth", ".safetensors")):
            raise ValueError(f"checkpoint={self.checkpoint!r} must end in .pt, .pth or .safetensors")
        if self.checkpoint and not self.resume:  # a resumed run does not read it
            if os.path.isdir(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} is a folder; name a file in it")
            if not os.path.isfile(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} does not exist")
