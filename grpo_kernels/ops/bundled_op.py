"""Operators of torch.library whose arguments are bundles.

An operator's schema takes tensors and numbers only. `bundled_op` derives it from the annotations of
a function that takes NamedTuples: each field becomes one argument, named `<parameter>_<field>`.
"""

import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix

PARAMETER = inspect.Parameter.POSITIONAL_OR_KEYWORD


class BundledOp:
    """An operator, called with the arguments of the function it was made from."""

    def __init__(self, name: str, function: Callable, mutates_args: Iterable[str]) -> None:
        hints = typing.get_type_hints(function)
        parameters = []
        self._layout = []  # (NamedTuple class or None, number of fields) of each parameter
        for parameter in inspect.signature(function).parameters:
            fields = {parameter: hints[parameter]}
            bundle = hints[parameter] if hasattr(hints[parameter], "_fields") else None
            if bundle is not None:
                types = typing.get_type_hints(bundle)
                fields = {f"{parameter}_{field}": types[field] for field in bundle._fields}
            parameters += [inspect.Parameter(k, PARAMETER, annotation=v) for k, v in fields.items()]
            self._layout.append((bundle, len(fields)))
        self.num_arguments = len(parameters)

        def flat_function(*arguments: Any) -> Any:
            return function(*self.bundle(arguments))

        returns = None if hints["return"] is type(None) else hints["return"]
        signature = inspect.Signature(parameters, return_annotation=returns)
        flat_function.__signature__ = signature  # torch.library reads it for the schema
        full_name = add_op_namespace_prefix(name)
        self._op = torch.library.custom_op(full_name, flat_function, mutates_args=mutates_args)

    def __call__(self, *arguments: Any) -> Any:
        flat = []
        for argument, (bundle, _) in zip(arguments, self._layout, strict=True):
            flat.extend([argument] if bundle is None else tuple(argument))
        return self._op(*flat)

    def bundle(self, arguments: Iterable[Any]) -> list[Any]:
        """Rebuild the function's arguments from the operator's."""
        arguments, bundles, start = list(arguments), [], 0
        for bundle, count in self._layout:
            fields = arguments[start : start + count]
            bundles.append(fields[0] if bundle is None else bundle(*fields))
            start += count
        return bundles

    def register_fake(self, function: Callable) -> Callable:
        """Register the function, of bundles, that makes empty outputs under torch.compile."""
        self._op.register_fake(lambda *arguments: function(*self.bundle(arguments)))
        return function

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Register the gradient.

        Args:
            backward: takes ctx and the gradient of each output; returns the gradients of the
                leading operator arguments, the others get None.
            setup_context: takes ctx, the list of bundles and the outputs.
        """

        def padded_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = tuple(backward(ctx, *grads))
            return (*found, *(None,) * (self.num_arguments - len(found)))

        self._op.register_autograd(
            padded_backward,
            setup_context=lambda ctx, inputs, output: setup_context(
                ctx, self.bundle(inputs), output
            ),
        )


def bundled_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable], BundledOp]:
    """Make an operator of the decorated function, whose parameters may be NamedTuples.

    Args:
        name: the operator's name without the namespace.
        mutates_args: flat argument names that the function writes to.
    """
    return lambda function: BundledOp(name, function, mutates_args)
