"""Ops: tensors in, tensors out. Nothing here knows of models, text or training."""

if __name__ == "kernels":
    # `python -m` and `python -c` in a checkout put its root on sys.path, and transformers imports a package of this
    # name if it finds one, to see its version. Loaded twice, the ops would be registered twice, which torch refuses.
    import sys
    from importlib import import_module

    sys.modules[__name__] = import_module("prudent.kernels")
else:
    from .ensemble_reward import (
        STD_FLOOR,
        Aggregation,
        EnsembleOutput,
        aggregate,
        ensemble_reward,
        nominal_reward,
        philox_normal,
    )

    __all__ = [
        "STD_FLOOR",
        "Aggregation",
        "EnsembleOutput",
        "aggregate",
        "ensemble_reward",
        "nominal_reward",
        "philox_normal",
    ]
