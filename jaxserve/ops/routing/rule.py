"""The rule by which a family chooses experts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights.

    Args:
        score: of an expert: `softmax` over all experts, `sigmoid` of its own logit, or
            `softmax_of_chosen`: experts are chosen by logit, softmax is over the chosen ones.
        renormalize: the weights of a token's experts sum to 1.
        scale: what weights are multiplied with at the end.
        num_groups, top_groups: experts come from the best `top_groups` of `num_groups` runs of
            experts (1: no groups).
        group_by: a group is as good as its best expert, or the sum of its best two.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_by: Literal["best", "best_two"] = "best"
