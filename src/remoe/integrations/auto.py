"""Our models among those that transformers' Auto classes know.

The config is registered as soon as AutoConfig is there, and the models when the first config is made, without which no
Auto class can look a model up. Modules of transformers that our models need may be half made before that.
"""

from functools import cache


def register_config() -> None:
    """Makes AutoConfig know our model's type."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from remoe.models.configuration_remoe import BEFORE_A_CONFIG, RemoeConfig

    AutoConfig.register("remoe", RemoeConfig, exist_ok=True)
    BEFORE_A_CONFIG.append(register_models)


@cache
def register_models() -> None:
    """Makes AutoModel and the Auto classes of our heads know our models."""
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    from remoe.models.classification import RemoeForSequenceClassification
    from remoe.models.configuration_remoe import RemoeConfig
    from remoe.models.modeling_remoe import RemoeForCausalLM, RemoeModel

    AutoModel.register(RemoeConfig, RemoeModel, exist_ok=True)
    AutoModelForCausalLM.register(RemoeConfig, RemoeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(RemoeConfig, RemoeForSequenceClassification, exist_ok=True)
