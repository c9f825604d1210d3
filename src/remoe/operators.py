"""Names for custom operators, which PyTorch keeps in one table per process."""


def operator_name(name: str) -> str:
    """`name` in the namespace of this copy of the package, "remoe::name" for the installed one.

    The code in an exported model's folder is a copy under another package name, and several may be loaded together.
    """
    package = __name__.rpartition(".")[0]
    namespace = package if package == "remoe" else "remoe_" + package.encode().hex()
    return f"{namespace}::{name}"
