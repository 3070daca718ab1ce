"""Overrides of tests: modules with a parameter more than the model's own. Named in `[override] imports`."""

from torchtitan.config.override import derive, override
from torchtitan.models.common import Linear
from torchtitan.models.common.feed_forward import FeedForward, SigmoidGatedFeedForward


@override(target=FeedForward.Config, fqns=["*layers.1.feed_forward"], description="a gate")
def gated(config: FeedForward.Config) -> SigmoidGatedFeedForward.Config:
    gate = Linear.Config(in_features=config.w1.in_features, out_features=1, param_init=config.w1.param_init)
    return derive(config, SigmoidGatedFeedForward.Config, gate=gate)
