"""transformers' Auto classes know "remoe" as soon as this package is imported, whichever comes first.

transformers takes seconds to import, so `import remoe` does not do it: where it is not there yet, the registration
waits for its Auto classes.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Makes AutoConfig, AutoModel and the Auto classes of our heads know our model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from remoe.models.classification import RemoeForSequenceClassification
    from remoe.models.configuration_remoe import RemoeConfig
    from remoe.models.modeling_remoe import RemoeForCausalLM, RemoeModel

    AutoConfig.register("remoe", RemoeConfig, exist_ok=True)
    AutoModel.register(RemoeConfig, RemoeModel, exist_ok=True)
    AutoModelForCausalLM.register(RemoeConfig, RemoeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(RemoeConfig, RemoeForSequenceClassification, exist_ok=True)


def register_when_imported() -> None:
    """Registers now where transformers' Auto classes are imported, else right after they are."""
    if AUTO_MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AutoModuleFinder())


class _AutoModuleFinder(MetaPathFinder):
    """Finds transformers' module as Python would, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()
