"""Run `prudent plan`: compute the memory of each phase of a PPO run from configs alone, without weights or a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..models.shapes import model_config
from ..ppo.budget import PHASES, TERMS, Budget, Cut, ModelShape, cuts, micro_tokens, parse_size, plan
from ..ppo.memory import advice, job_shape
from ..ppo.policy.precision import trunk_dtype
from ..report.words import count
from .config import PlanConfig

TOLERANCE = 0.1  # largest error of the plan, as a share of the tracked peak
FLOOR = 16 << 20  # bytes of error that are always allowed: a tiny model's peak is small tensors, which the plan omits


class PlanResult(NamedTuple):
    """budget: at `micro_tokens`, or at one sample if none fits. limit: bytes. verified: phase -> tracked bytes."""

    budget: Budget
    limit: int
    fits: bool
    advice: list[Cut]
    verified: dict[str, int] | None = None

    @property
    def failed(self) -> bool:
        """Whether the plan was verified and differs from the loop by more than `TOLERANCE` and `FLOOR` in a phase."""
        return any(self._off(phase) > FLOOR for phase in self.verified or {})

    def _off(self, phase: str) -> int:
        """Return the difference of plan and loop in bytes if it exceeds `TOLERANCE`, else 0."""
        assert self.verified is not None
        off = abs(self.budget.tensors(phase) - self.verified[phase])
        return off if off > TOLERANCE * self.verified[phase] else 0

    def ratio(self, phase: str) -> float:
        """Planned over tracked tensor bytes."""
        assert self.verified is not None
        return self.budget.tensors(phase) / self.verified[phase]

    def __str__(self) -> str:
        budget, job, shape = self.budget, self.budget.job, self.budget.shape
        lines = [
            f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {count(shape.layers, 'layer')} of width "
            f"{shape.hidden}; {count(job.prompts, 'prompt')} x {count(job.samples, 'sample')}, {job.prompt_tokens} + "
            f"{job.response_tokens} tokens; {job.mode}, {str(job.dtype).removeprefix('torch.')}",
            "",
            f"{'GiB':<20}" + "".join(f"{phase:>10}" for phase in PHASES),
        ]
        for term in TERMS:
            sizes = [budget.terms[phase][term] for phase in PHASES]
            if any(sizes):
                lines.append(f"{term:<20}" + "".join(f"{size / 2**30:>10.2f}" for size in sizes))
        lines.append(f"{'in all':<20}" + "".join(f"{budget.total(phase) / 2**30:>10.2f}" for phase in PHASES))
        lines += ["", self._verdict()]
        if self.verified is not None:
            lines += ["", f"{'tensors, GiB':<20}{'planned':>10}{'tracked':>10}{'ratio':>8}"]
            for phase, tracked in self.verified.items():
                planned = budget.tensors(phase) / 2**30
                off = self._off(phase)
                small = f"  {off / 2**20:.1f} MiB off, which is allowed" if 0 < off <= FLOOR else ""
                lines.append(f"{phase:<20}{planned:>10.2f}{tracked / 2**30:>10.2f}{self.ratio(phase):>8.3f}{small}")
            verdict = "is not" if self.failed else "is"
            lines.append(
                f"the plan {verdict} within {TOLERANCE:.0%} of the loop's peak, or {FLOOR >> 20} MiB, in every phase"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        budget, size = self.budget, f"{self.limit / 2**30:.1f} GiB"
        samples = max(1, budget.micro_tokens // budget.job.tokens)
        if self.fits:
            return (
                f"fits {size}: update.micro_tokens={budget.micro_tokens} ({count(samples, 'sample')} of "
                f"{budget.job.tokens} tokens a forward pass), {(self.limit - budget.peak) / 2**30:.1f} GiB free"
            )
        over = budget.peak - self.limit
        passes = "even with one sample a forward pass" if samples == 1 else f"with {samples} samples a forward pass"
        worst = max(PHASES, key=budget.total)
        term = max(budget.terms[worst], key=lambda name: budget.terms[worst][name])
        takes = f"{term} take{'s' * (not term.endswith('s'))} {budget.terms[worst][term] / 2**30:.1f} GiB"
        return (
            f"does not fit {size}, {passes}: {over / 2**30:.1f} GiB too much in {worst}, where the {takes}; "
            f"{advice(self.advice)}"
        )


def run_plan(config: PlanConfig, *, progress: bool = True) -> PlanResult:
    """Plan the memory of `config` on a card of `config.gpu`; with `verify`, compare with the loop.

    A number in update.micro_tokens is kept; auto takes the largest that fits.
    """
    model = model_config(config.model)
    limit = parse_size(config.gpu)
    if config.memory_budget is not None:
        limit = min(limit, parse_size(config.memory_budget))
    shape = ModelShape.of(model, config.model)
    job = job_shape(config, model, heads=config.heads, features=config.features)
    configured = config.update.micro_tokens
    tokens = micro_tokens(shape, job, limit) if configured == "auto" else configured
    budget = plan(shape, job, tokens or job.tokens)
    fits = budget.peak <= limit
    result = PlanResult(budget, limit, fits, [] if fits else cuts(shape, job, limit))
    if not config.verify:
        return result
    if job.masked or job.eager or job.reward == "adapter":
        raise ValueError(
            "verify: expected no eager attention, packing only with flash-attn, and no reward with a LoRA of its own: "
            "these can be planned but not verified"
        )
    from .verify import trace

    settings = config.model_copy(
        update={"update": config.update.model_copy(update={"micro_tokens": budget.micro_tokens})}
    )
    heads = config.heads if job.reward else None
    weights = trunk_dtype(config, torch.device("cuda"))
    traced = trace(settings, model, weights, job.prompt_tokens, heads, progress, config.features)
    return result._replace(verified={phase: traced.peaks[phase]["Total"] for phase in PHASES})
