"""Record the calls of the package's operators, for opcheck."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RecordOperators(TorchDispatchMode):
    """Record the arguments of the last call of each grpo_kernels operator, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "grpo_kernels":
            self.calls[function._opname] = args
        return function(*args, **(kwargs or {}))

    def opcheck(self, leaves=()):
        """Check every recorded operator.

        leaves: positions of the arguments that require grad, by name of an operator that has an
        autograd formula.
        """
        for name, arguments in self.calls.items():
            arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            for position in dict(leaves).get(name, ()):
                arguments[position].requires_grad_()
            torch.library.opcheck(getattr(torch.ops.grpo_kernels, name), tuple(arguments))
