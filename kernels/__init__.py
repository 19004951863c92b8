"""Fused ops on tensors. Nothing here depends on models, text or training."""

if __name__ == "kernels":
    # `python -m` and `python -c` put the checkout's root on sys.path. There transformers finds and imports this folder
    # as the package `kernels`. Loading the ops a second time would register them twice, which torch refuses.
    import sys
    from importlib import import_module

    sys.modules[__name__] = import_module("prudent.kernels")
else:
    from .advantages import AdvantageOutput, advantage_convention, advantages
    from .ensemble_reward import (
        STD_FLOOR,
        TRUST_DIRECTIONS,
        Aggregation,
        EnsembleOutput,
        TrustRegion,
        aggregate,
        ensemble_reward,
        nominal_reward,
        philox_normal,
    )
    from .linear_logprob import LogprobOutput, linear_logprob
    from .preference_step import StepOutput, preference_step

    __all__ = [
        "STD_FLOOR",
        "TRUST_DIRECTIONS",
        "AdvantageOutput",
        "Aggregation",
        "EnsembleOutput",
        "LogprobOutput",
        "StepOutput",
        "TrustRegion",
        "advantage_convention",
        "advantages",
        "aggregate",
        "ensemble_reward",
        "linear_logprob",
        "nominal_reward",
        "philox_normal",
        "preference_step",
    ]
