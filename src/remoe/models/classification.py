"""A ReMoE transformer that classifies whole sequences.

Legend: B batch, S sequence, D model width, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from remoe.models.attention import CACHE_NAME
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.loss import padding_mask
from remoe.models.modeling_remoe import RemoeModel, RemoePreTrainedModel
from remoe.models.routed import RoutedModel, add_routing, build_controller, keep_statistics_local
from remoe.routing import Routing


@dataclass
class RemoeClassifierOutput(SequenceClassifierOutputWithPast):
    """Class logits, and the loss with its parts.

    Attributes:
        loss: task_loss, and in training mode the total of `SparsityController.loss_terms` too, when labels are given.
        logits: (B, C).
        cache, hidden_states, attentions: as in `RemoeModelOutput`.
        task_loss: mean over the batch, without the regulariser.
        reg_loss: the regulariser over all layers, without its coefficient.
        routings: one `Routing` a layer. This and `reg_loss` are items of the output in training mode, otherwise
            attributes alone.
    """

    task_loss: Tensor | None = None
    reg_loss: Tensor | None = None
    routings: tuple[Routing, ...] | None = None


class RemoeForSequenceClassification(RoutedModel, RemoePreTrainedModel):
    """Classes from the last token that is not padding; trained with the penalty on the gates, as the language model."""

    accepts_loss_kwargs = False  # its loss is a micro-batch's mean: transformers' Trainer divides it by their number

    def __init__(self, config: RemoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RemoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.sparsity = build_controller(config, [layer.mlp for layer in self.model.layers])
        keep_statistics_local(self)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> RemoeClassifierOutput:
        """Classifies.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: see `RemoeModel`.
            labels: (B,) int64 classes, (B,) values for one class, or (B, C) for several labels at once, as
                `config.problem_type` says.

        Raises:
            ValueError: for a batch of several sequences without `attention_mask` and without a padding token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        if self.training:
            self.sparsity.observe(outputs.routings)
        hidden_BSD = outputs.last_hidden_state
        last_B = self._last_token(hidden_BSD, input_ids, padding_mask(attention_mask, kwargs.get("token_mask")))
        logits_BC = self.score(hidden_BSD[torch.arange(len(hidden_BSD), device=hidden_BSD.device), last_B])
        reg_loss = self.sparsity.regularizer(outputs.routings)
        loss = task_loss = None
        if labels is not None:
            task_loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config, logits=None)
            loss = task_loss
            if self.training:
                loss = loss + self.sparsity.loss_terms(outputs.routings).total.to(loss.device)
        output = RemoeClassifierOutput(
            loss=loss,
            logits=logits_BC,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            task_loss=task_loss,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return add_routing(output, self.training, reg_loss=reg_loss, routings=outputs.routings)

    def _last_token(self, hidden_BSD: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B,) int64: the last position that is not padding, on either side."""
        B, S, _ = hidden_BSD.shape
        position_S = torch.arange(S, device=hidden_BSD.device)
        if mask is not None:
            return (position_S * mask[:, -S:].to(position_S)).argmax(dim=1)
        pad = self.config.pad_token_id
        if pad is not None and input_ids is not None:
            return (position_S * (input_ids != pad).to(position_S)).argmax(dim=1)
        if B > 1:
            raise ValueError("several sequences in a batch need an attention_mask, or a pad_token_id and input_ids")
        return position_S[-1:]
