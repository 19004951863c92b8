"""Inputs, outputs and argument checks of `advantages`, and the trainers' conventions.

The fields of `Inputs` are the registered op's schema, in order. Each backend offers
    forward(inputs) -> (advantage [B, T], returns [B, T], reward [B, T], dropped [B] bool, stats [6])
and is never called with an empty batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import Checks, is_number

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
HOLES = ("skip", "zero")
SCORE_AT = ("last", "after")
WHITEN = ("none", "centre", "sample", "population")
VARIANCE_EPS = 1e-8  # as in all three trainers: added to the variance (sample), or its lower bound (population)

checks = Checks("advantages", "mask")
require = checks.require

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class AdvantageStats(NamedTuple):
    """Scalars [] over the unmasked tokens of sequences that were not dropped.

    tokens, sequences  the number of such tokens, and of sequences that have one
    dropped            the number of sequences dropped because one of their advantages was not finite
    mean, std          of the advantages before whitening; std with the whitening's ddof, 0 below two tokens
    kl                 mean of the KL estimate over tokens, clipped as in the reward
    """

    tokens: Tensor
    sequences: Tensor
    dropped: Tensor
    mean: Tensor
    std: Tensor
    kl: Tensor


class AdvantageOutput(NamedTuple):
    """Output of `advantages` for B sequences of T tokens; fp32, or fp64 if an input is fp64. No gradient.

    advantage  [B, T]  whitened if asked; 0 at masked tokens
    returns    [B, T]  advantage before whitening + value: the critic's target; 0 at masked tokens
    reward     [B, T]  the shaped reward, score - kl_coef * KL; 0 at masked tokens
    dropped    [B]     bool, sequences with an advantage that is not finite: 0 above, in no statistic
    stats              AdvantageStats

    With score_at="after", the step after a sequence's last token also has a reward and a return.
    """

    advantage: Tensor
    returns: Tensor
    reward: Tensor
    dropped: Tensor
    stats: AdvantageStats


class Inputs(NamedTuple):
    """Arguments of `prudent::advantages`, in schema order. A `kl_clip` of infinity does not clip."""

    score: Tensor
    logprob: Tensor | None
    ref_logprob: Tensor | None
    value: Tensor | None
    mask: Tensor
    gamma: float
    lam: float
    kl_coef: float
    kl_estimator: str
    kl_clip: float
    holes: str
    score_at: str
    whiten: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """The fields `score` to `mask`."""
        return self[:5]

    @property
    def output_dtype(self) -> torch.dtype:
        floating = (self.score, self.logprob, self.ref_logprob, self.value)
        wide = any(t is not None and t.dtype == torch.float64 for t in floating)
        return torch.float64 if wide else torch.float32

    @property
    def effective_lam(self) -> float:
        """1 without a critic: GAE with lam = 1 and values of 0 is the discounted reward-to-go."""
        return 1.0 if self.value is None else self.lam


def advantage_convention(trainer: str, kl_estimator: str = "k1") -> dict[str, Any]:
    """The keywords of `advantages` that reproduce a trainer: "trl", "openrlhf" or "verl", with its KL estimator.

    The sources are TRL 1.12.0 (PPOTrainer), OpenRLHF 0.11.2 (compute_approx_kl, compute_reward,
    get_advantages_and_returns) and verl 0.9.1 (kl_penalty, compute_gae_advantage_return). Raises ValueError for another
    trainer, or for an estimator that the trainer does not have.
    """
    known: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "trl": (("k1", "k3"), {"kl_clip": None, "holes": "zero", "score_at": "after", "whiten": "sample"}),
        "openrlhf": (
            ("k1", "k2", "k3"),
            {"kl_clip": 10.0, "holes": "zero", "score_at": "last", "whiten": "population"},
        ),
        "verl": (
            KL_ESTIMATORS,
            {
                "kl_clip": 10.0 if kl_estimator == "k3" else None,  # verl clips only k3
                "holes": "skip",
                "score_at": "last",
                "whiten": "sample",
            },
        ),
    }
    _require_name(trainer, "trainer", tuple(known))
    estimators, options = known[trainer]
    _require_name(kl_estimator, "kl_estimator", estimators)
    return {"kl_estimator": kl_estimator, **options}


def _require_name(value: str, argument: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, argument, f"one of {', '.join(allowed)}", repr(value))


def check_inputs(inputs: Inputs) -> None:
    """Raise ValueError for a wrong shape, dtype, device or option. Reads no values, so it serves fake tensors too."""
    mask, score = inputs.mask, inputs.score
    require(mask.dim() == 2, "mask", "shape [B, T]", list(mask.shape))
    require(mask.dtype == torch.bool, "mask", "dtype bool", mask.dtype)
    batch, length = mask.shape
    checks.tensor(score, "score")
    require(
        tuple(score.shape) == ((batch,) if score.dim() == 1 else (batch, length)),
        "score",
        f"shape [{batch}] or [{batch}, {length}], as mask's",
        list(score.shape),
    )
    for name in ("logprob", "ref_logprob", "value"):
        tensor = getattr(inputs, name)
        checks.tensor(tensor, name, optional=True)
        if tensor is not None:
            expected = f"shape [{batch}, {length}], as mask's"
            require(tuple(tensor.shape) == (batch, length), name, expected, list(tensor.shape))
    for name in ("score", "logprob", "ref_logprob", "value"):
        tensor = getattr(inputs, name)
        if tensor is not None:
            checks.floating(tensor, name)
            checks.device(tensor, name, mask)
    _check_options(inputs)


def _check_options(inputs: Inputs) -> None:
    for name in ("gamma", "lam"):
        number = getattr(inputs, name)
        require(is_number(number) and 0 <= number <= 1, name, "a number in [0, 1]", number)
    coef, clip = inputs.kl_coef, inputs.kl_clip
    checks.not_negative(coef, "kl_coef")
    require(is_number(clip) and clip > 0, "kl_clip", "a number above 0, or None", clip)
    given = inputs.logprob is not None
    if given != (inputs.ref_logprob is not None):
        name = "ref_logprob" if given else "logprob"
        checks.refuse(name, "a tensor like the other log-probabilities, or both None", None)
    require(given or coef == 0, "kl_coef", "0 without logprob and ref_logprob", coef)
    _require_name(inputs.kl_estimator, "kl_estimator", KL_ESTIMATORS)
    _require_name(inputs.holes, "holes", HOLES)
    _require_name(inputs.score_at, "score_at", SCORE_AT)
    _require_name(inputs.whiten, "whiten", WHITEN)
