"""Groups of parameters for the optimizer: `--freeze`, `--layer_decay`, `--decay_norms`."""

import re

from torch import nn

from options.training import TrainConfig
from runs import RunError

HEAD = "classifier."  # unless the model has an attribute `head`
BLOCK = re.compile(r"(?:blocks|layers)\.(\d+)\.")
UNDECAYED = ("pos_embedding", "class_token", "pos_embed", "cls_token", "reg_token", "dist_token")  # here, and in timm
# and all vectors: norms, biases, gates


def head_of(model: nn.Module) -> str:
    """Return the prefix of the classifier's parameters."""
    head = getattr(model, "head", HEAD)
    return head if isinstance(head, str) else "head."  # the classifier itself, as in timm


def freeze(model: nn.Module, part: str | None) -> None:
    """Let the classifier alone learn if `part` is "backbone". Raises RunError for a model without one."""
    if part is None:
        return
    head = head_of(model)
    if not any(name.startswith(head) for name, _ in model.named_parameters()):
        raise RunError(f"--freeze {part}: this model has no parameter {head}*, which is what would be left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))


def start_training(model: nn.Module) -> None:
    """Set training mode, and evaluation mode for the parts that are frozen.

    Those keep the BatchNorm statistics of the checkpoint, drop nothing, and draw no candidates.
    """
    model.train()
    parts, head = [], head_of(model)
    for name, part in model.named_children():  # in a classifier of several layers the last one alone may learn
        inner = list(part.children()) if head.startswith(f"{name}.") else []
        parts += inner or [part]
    learns = True
    for part in reversed(parts):  # a part without parameters, such as dropout, goes with the part after it
        own = [parameter.requires_grad for parameter in part.parameters()]
        learns = any(own) if own else learns
        if not learns:
            part.eval()


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor of the learning rate by the name of the parameter (BEiT, arXiv 2106.08254).

    As in timm's `param_groups_layer_decay`: decay ** (L + 1 - i) in block i of L, counted from 1, with the final norm in the
    last; 1 in the classifier, and decay ** (L + 1) before the blocks. Raises RunError for a model without numbered blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    number = {name: int(found[1]) + 1 for name in names if (found := BLOCK.match(name))}
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    head = head_of(model)
    if not number or not any(name.startswith(head) for name in names):
        raise RunError(f"--layer_decay {decay}: this model has no blocks.* or layers.* before a {head}*; leave it out")
    last = max(number.values())
    others = {name: last + 1 if name.startswith(head) else last if "norm." in name else 0 for name in names}
    return {name: decay ** (last + 1 - number.get(name, others[name])) for name in names}


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return the optimizer's groups of the parameters that learn, from the highest learning rate to the lowest."""
    scales = layer_scales(model, config.layer_decay)
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = config.decay_norms or not (parameter.ndim <= 1 or name.endswith(UNDECAYED))
            groups.setdefault((scales[name], decays), []).append(parameter)
    return [
        {"params": groups[key], "lr": config.lr * key[0], "weight_decay": config.weight_decay * key[1]}
        for key in sorted(groups, reverse=True)
    ]
