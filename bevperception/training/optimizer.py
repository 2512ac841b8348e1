"""AdamW with parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from bevperception.config import TrainingConfig

BACKBONE_PREFIX = "backbone."


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, object]]:
    """Trainable parameters by learning rate and weight decay.

    Norms, biases, embeddings and every other parameter of one dimension (layer scales among them) are
    not decayed; the backbone's rate is ``backbone_rate_factor`` of the rest's.

    Args:
        model: its parameters under ``backbone.`` are the backbone's; those that do not require a
            gradient are left out.
        config: rates and decay.

    Returns:
        Up to four groups for AdamW, each with a ``name``; empty ones are left out.
    """
    not_decayed = {
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or parameter.ndim <= 1 or name.endswith("bias")
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(BACKBONE_PREFIX), name not in not_decayed)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "name": f"{'backbone' if in_backbone else 'model'}{'' if decayed else ', not decayed'}",
            "params": parameters,
            "lr": config.learning_rate * (config.backbone_rate_factor if in_backbone else 1.0),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def rate_factor(config: TrainingConfig) -> Callable[[int], float]:
    """Share of the peak learning rate at an optimiser step: linear warm-up, then half a cosine.

    Args:
        config: ``warmup_steps``, ``steps`` and ``final_rate_factor``.

    Returns:
        A function of the step, counted from 0; it ends at ``final_rate_factor`` at the last step.
    """
    warmup, final = min(config.warmup_steps, config.steps), config.final_rate_factor

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def build_optimizer(model: nn.Module, config: TrainingConfig) -> tuple[AdamW, LambdaLR]:
    """AdamW over :func:`parameter_groups` and the schedule, to be stepped at every optimiser step."""
    # One kernel for all tensors where there is one: a small model's step on a GPU is mostly launches. Under
    # loss scaling the fused step would undo the scale itself, after the gradient was clipped.
    fused = all(p.is_cuda for p in model.parameters()) and config.precision != "16-mixed"
    optimizer = AdamW(parameter_groups(model, config), lr=config.learning_rate, fused=fused or None)
    return optimizer, LambdaLR(optimizer, rate_factor(config))
