"""The raw operators, ``torch.ops.esam_kernels.*``: schemas, fakes, argument checks, and the way to the backends.

>>> losses, normalizer = ops.cross_entropy_forward(torch.randn(4, 10), torch.tensor([1, 0, 9, 3]), 0.0, -100)
>>> ops.select(losses, losses + torch.tensor([0.1, 0.5, 0.0, 0.3]), 2)
tensor([1, 3])

You need them only without the optimizer. Every call into a backend goes through here. The schemas declare what is
mutated, so the operators can stand inside compiled code. They have no autograd, except ``cross_entropy``,
``gather_rows`` and ``select_rows``. ``backend`` is the name of one, or "" for the default of the device.

Lists of tensors are parallel: ``grads[i]`` belongs to ``params[i]``, has its dtype, and the same dense strides.
"""

from esam_kernels.backends.reference import NUM_PARTIALS
from esam_kernels.ops.perturbation import norm_partials, perturb_, restore_, restore_adam_, restore_sgd_
from esam_kernels.ops.registration import direct as direct
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
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
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
