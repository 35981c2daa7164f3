"""The namespace of the operators: the package's name, so that two copies can share a process.

A copy that is loaded under another name, as the Kernel Hub does, registers its operators under that
name. The builder of the Kernel Hub replaces this file by its own, which has the same function.
"""

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


def add_op_namespace_prefix(name: str) -> str:
    """Return the full name of an operator, "namespace::name"."""
    return f"{NAMESPACE}::{name}"
