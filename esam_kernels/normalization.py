"""SAM-ON (Mueller et al., 2023): a perturbation of the normalization layers alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from esam_kernels.settings import check_rho

__all__ = ["normalization_groups"]

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def normalization_groups(
    model: nn.Module, rho: float, layers: tuple[type[nn.Module], ...] = ()
) -> list[dict[str, Any]]:
    """Parameter groups in which only the normalization layers are perturbed.

    >>> groups = normalization_groups(model, rho=0.5)
    >>> optimizer = SAM(groups, torch.optim.SGD, lr=0.1, ascent_share=0.25, model=model)

    Args:
        model: whose parameters are grouped.
        rho: the radius of the normalization layers' weights and biases, finite and not negative. They are few, and take
            a larger radius than all weights do.
        layers: classes that count as normalization layers beside torch's BatchNorm, SyncBatchNorm, InstanceNorm,
            LayerNorm, GroupNorm and RMSNorm, with their subclasses: RMSNorm layers of another library, for one.

    Returns:
        Two groups, in the form that every torch optimizer takes. The first holds the normalization layers' own
        parameters, with this ``rho``, the second all others, with ``rho=0`` (left out if there are no others).
        Each parameter is in one group, once, in the order of ``model.parameters()``; one that a normalization layer
        shares with another layer is in the first. Frozen ones are grouped too: where the whole first group is frozen,
        nothing is perturbed, and a step is the base optimizer's.

    Raises:
        ValueError: a rho out of range, or a model whose normalization layers have no parameters.
        TypeError: a model that is no ``torch.nn.Module``, or layers that are no classes of modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    are_classes = isinstance(layers, (tuple, list)) and all(isinstance(layer, type) for layer in layers)
    if not (are_classes and all(issubclass(layer, nn.Module) for layer in layers)):
        raise TypeError(f"layers must be a tuple of classes of torch.nn.Module, got {layers!r}")
    rho = check_rho(rho)
    own = [
        param
        for module in model.modules()
        if isinstance(module, (*_LAYERS, *layers))
        for param in module.parameters(recurse=False)
    ]
    if not own:
        raise ValueError(
            f"{type(model).__name__} has no normalization layers with weights or biases: "
            "layers=(MyNorm,) names classes that count as such beside torch's own"
        )
    chosen = {id(param) for param in own}
    normalizing: list[Tensor] = [param for param in model.parameters() if id(param) in chosen]
    others: list[Tensor] = [param for param in model.parameters() if id(param) not in chosen]
    groups: list[dict[str, Any]] = [{"params": normalizing, "rho": rho}]
    return [*groups, {"params": others, "rho": 0.0}] if others else groups
