"""The raw operators, ``torch.ops.esam_kernels.*``: schemas, fakes, argument checks, and the way to the backends.

Every call into a backend goes through here. The schemas declare what is mutated, so the operators can stand inside
``torch.compile``d code; they carry no autograd (see :mod:`esam_kernels.selection` for what is differentiable).
``backend`` is the name of one, or "" for the default of the device (see :mod:`esam_kernels.backends`).

Lists of tensors are parallel: ``grads[i]`` belongs to ``params[i]``, has its dtype, and the same dense strides.
"""

from esam_kernels.backends.reference import NUM_PARTIALS, compute_dtype
from esam_kernels.ops.perturbation import norm_partials, perturb_, restore_, restore_adam_, restore_sgd_
from esam_kernels.ops.registration import direct
from esam_kernels.ops.selection import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    gather,
    gather_rows,
    select,
    select_gather,
    select_rows,
)

__all__ = [
    "NUM_PARTIALS",
    "compute_dtype",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "direct",
    "gather",
    "gather_rows",
    "norm_partials",
    "perturb_",
    "restore_",
    "restore_adam_",
    "restore_sgd_",
    "select",
    "select_gather",
    "select_rows",
]
