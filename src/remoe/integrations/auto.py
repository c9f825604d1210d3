"""Our models among those that transformers' Auto classes know."""


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
