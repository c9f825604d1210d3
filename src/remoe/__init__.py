"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711) for PyTorch.

    layer = remoe.MoE(d_model=256, d_ffn=1024, num_experts=8, k=1)
    y, routing = layer(x)

Three storeys, each with its install: the method (`remoe`: torch), models and conversion (`remoe[models]`:
transformers), and the laboratory with the `remoe` command (`remoe[lab]`). Names are imported on first use, so that
`import remoe` starts quickly and needs torch alone.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

from remoe.errors import missing_extra

if TYPE_CHECKING:
    from remoe.layer import MoE as MoE
    from remoe.routing import ROUTERS as ROUTERS
    from remoe.routing import Assignment as Assignment
    from remoe.routing import ReLURouter as ReLURouter
    from remoe.routing import Router as Router
    from remoe.routing import Routing as Routing
    from remoe.routing import TopKRouter as TopKRouter
    from remoe.sparsity import LossTerms as LossTerms
    from remoe.sparsity import SparsityController as SparsityController

__version__ = "0.2.0"

_METHOD = {
    "MoE": "layer",
    "SparsityController": "sparsity",
    "LossTerms": "sparsity",
    "ROUTERS": "routing",
    "Assignment": "routing",
    "ReLURouter": "routing",
    "Router": "routing",
    "Routing": "routing",
    "TopKRouter": "routing",
}
_MODELS = {
    "RemoeConfig": "models.configuration_remoe",
    "RemoeModel": "models.modeling_remoe",
    "RemoeForCausalLM": "models.modeling_remoe",
    "RemoeForSequenceClassification": "models.classification",
    "SparsityCallback": "integrations.trainer",
    "quantize": "models.quantization",
    "relufy": "convert.relufy.convert",
    "load_relufied": "convert.relufy.model",
    "upcycle": "convert.upcycle",
    "load_megatron": "convert.megatron.convert",
    "save_megatron": "convert.megatron.convert",
}
# The second only counts where this package is imported while the first is half made.
_AUTO_CLASSES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")

__all__ = ["__version__", *_METHOD, *_MODELS]


def __getattr__(name: str) -> object:
    if name == "plots":  # a module of the laboratory, which a star import leaves out
        return import_module("remoe.plots")
    if name not in __all__:
        raise AttributeError(f"module 'remoe' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"remoe.{(_METHOD | _MODELS)[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "models", f"remoe.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "plots"])


class _AutoClassesFinder(MetaPathFinder):
    """Registers our config with transformers' AutoConfig as soon as this is imported, which takes seconds.

    The Auto classes are imported in the middle of other modules of transformers, which are then half made: nothing is
    registered here that needs them.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, finder: _AutoClassesFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register_config()
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


def _register_config() -> None:
    import_module("remoe.integrations.auto").register_config()


if hasattr(sys.modules.get(_AUTO_CLASSES[0]), "AutoConfig"):
    _register_config()
else:
    sys.meta_path.insert(0, _AutoClassesFinder())
