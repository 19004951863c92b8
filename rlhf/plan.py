"""`prudent plan`: what a PPO run takes on a card, phase by phase, from configs alone: no weights, no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import Field, field_validator

from ..engine.budget import PHASES, TERMS, Budget, Cut, JobShape, ModelShape, cuts, micro_tokens, parse_size, plan
from .files import refuse_mistyped
from .given import model_folder
from .ppo.config import PPOConfig, RewardConfig
from .ppo.policy import trunk_dtype
from .ppo.prompts import longest_prompt
from .rollout import Turn

PROMPT_TOKENS = 512  # where rollout.max_prompt_tokens and the model's positions say nothing
TOLERANCE = 0.1  # of the tracked peak, within which the plan is to lie
FLOOR = 16 << 20  # bytes that it may be off by in any case: a tiny model's peak is of small tensors, which no plan has

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "vocab_size": 152064}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
    }  # fmt: skip


# as the models' config.json have them
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-1b": {**_LLAMA, **_sizes(2048, 8192, 16, 32, 8, tied=True)},
    "llama3-3b": {**_LLAMA, **_sizes(3072, 8192, 28, 24, 8, tied=True)},
    "llama3-8b": {**_LLAMA, **_sizes(4096, 14336, 32, 32, 8)},
    "llama3-70b": {**_LLAMA, **_sizes(8192, 28672, 80, 64, 8)},
    "qwen2.5-0.5b": {**_QWEN, "vocab_size": 151936, **_sizes(896, 4864, 24, 14, 2, tied=True)},
    "qwen2.5-1.5b": {**_QWEN, "vocab_size": 151936, **_sizes(1536, 8960, 28, 12, 2, tied=True)},
    "qwen2.5-7b": {**_QWEN, **_sizes(3584, 18944, 28, 28, 4)},
    "qwen2.5-14b": {**_QWEN, **_sizes(5120, 13824, 48, 40, 8)},
    "qwen2.5-32b": {**_QWEN, **_sizes(5120, 27648, 64, 40, 8)},
    "smollm2-135m": {
        "model_type": "llama", "max_position_embeddings": 8192, "vocab_size": 49152,
        **_sizes(576, 1536, 30, 9, 3, tied=True),
    },
}  # fmt: skip


class PlanConfig(PPOConfig):
    """A `PPOConfig` (the same file serves both), of which prompts, output and the reward's source may be missing."""

    prompts: str = ""
    output: Path = Path()
    reward: RewardConfig = RewardConfig(source="heads on the policy's trunk", kind="shared")
    gpu: str = "80GB"  # what the card has; memory_budget, if smaller, counts
    heads: int = Field(default=5, ge=1)  # K of a reward on the policy's trunk
    verify: bool = False  # run the loop on tensors without data and compare

    @field_validator("gpu")
    @classmethod
    def _card(cls, value: str) -> str:
        parse_size(value)
        return value


def model_config(name: str, key: str = "model") -> Any:
    """The transformers config of a built-in shape, a config.json, a model's folder or a hub name.

    key: the config's that gave it, for errors.

    Raises:
        ValueError: where there is none.
    """
    from transformers import AutoConfig

    if name.lower() in SHAPES:
        fields = dict(SHAPES[name.lower()])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    refuse_mistyped(key, name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}: expected {', '.join(SHAPES)}, a config.json, a folder or a hub name, got {name!r} ({first})"
        ) from None


def job_shape(config: PPOConfig, model: Any, device: str = "cuda", heads: int = 5) -> JobShape:
    """The sizes of `config` for a model of config `model`; `device`: cuda or cpu.

    A reward of kind auto is taken for heads on the policy's trunk. One that is another model counts with its weights,
    in the policy's dtype, where its config can be read.

    Raises:
        ValueError: for more new tokens than the model has positions, as `prudent ppo` would.
    """
    rollout, on_gpu = config.rollout, device == "cuda"
    kind = "shared" if config.reward.kind == "auto" else config.reward.kind
    dtype = trunk_dtype(config, torch.device(device))
    mixed = config.policy.mode == "full" and on_gpu and config.dtype == "auto"
    dtype = torch.bfloat16 if mixed else dtype
    flash = config.attn in ("auto", "flash") and on_gpu and dtype != torch.float32
    return JobShape(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        prompt_tokens=_prompt_tokens(config, model),
        response_tokens=rollout.max_new_tokens,
        batch_rows=rollout.batch_rows,
        mode=config.policy.mode,
        rank=config.policy.lora_rank,
        dropout=config.policy.lora_dropout > 0,
        critic=config.critic,
        reward=kind if kind in ("shared", "adapter") else None,  # type: ignore[arg-type]
        heads=heads,
        reward_bytes=_other_model(config.reward.source, dtype) if kind == "model" else 0,
        checkpointing=config.policy.gradient_checkpointing,
        optimizer=config.update.optimizer,
        dtype=dtype,
        mixed=mixed,
        masked=bool(config.packed) and not flash,
        eager=config.attn == "eager",
        truncated_sampling=rollout.top_k > 0 or rollout.top_p < 1,
        shared_prefix=rollout.engine == "shared_prefix" or (rollout.engine == "auto" and not on_gpu),
        device="gpu" if on_gpu else "cpu",
    )


class _Closing:
    """What `longest_prompt` asks of a `Turn`: at least one token ends a response. No tokeniser is read here."""

    closing = (0,)


def _prompt_tokens(config: PPOConfig, model: Any) -> int:
    limit = longest_prompt(config.rollout, model.get_text_config(), cast(Turn, _Closing()))
    return PROMPT_TOKENS if limit is None else limit if config.rollout.max_prompt_tokens else min(limit, PROMPT_TOKENS)


def _other_model(source: str, dtype: torch.dtype) -> int:
    """Bytes of another model's weights in `dtype`: by its config, or its files where no model is made of that alone."""
    from transformers import AutoModel

    folder = model_folder(source)
    config = model_config(folder, "reward.source")
    try:
        with torch.device("meta"):  # a classifier of any family: not all have a causal language model
            model = AutoModel.from_config(getattr(config, "text_config", None) or config)
        numbers: int = sum(parameter.numel() for parameter in model.parameters())
        return dtype.itemsize * numbers
    except (ValueError, ImportError) as error:
        found = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if not found:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"reward.source: expected a model that transformers makes of its config, or a folder with its "
                f"safetensors, got {source}: {reason}"
            ) from None
        return found


def auto_micro_tokens(
    config: PPOConfig, model_config: Any, limit: int, prompt_tokens: int | None = None, heads: int = 5
) -> int:
    """`update.micro_tokens: auto` resolved on a GPU: what fits into `limit` bytes, at most all of a step's samples.

    Args:
        limit: bytes that the process may take.
        prompt_tokens: of the longest prompt; None: rollout.max_prompt_tokens, or 512 without it.
        heads: K of a reward on the policy's trunk.

    Raises:
        ValueError: if not even one sample does, with the keys that would help.
    """
    shape, job = ModelShape.of(model_config), job_shape(config, model_config, heads=heads)
    job = replace(job, prompt_tokens=prompt_tokens or job.prompt_tokens)
    found = micro_tokens(shape, job, limit)
    if not found:
        need = plan(shape, job, job.tokens)
        raise ValueError(
            f"memory: expected at most {limit / 2**30:.1f} GiB, got {need.peak / 2**30:.1f} GiB with one sample a "
            f"forward pass; {_advice(cuts(shape, job, limit))}"
        )
    return found


def _advice(found: list[Cut]) -> str:
    alone = [cut for cut in found if cut.fits]
    if alone:
        return "any one of these fits: " + "; ".join(f"{c.setting} (-{c.saves / 2**30:.1f} GiB)" for c in alone[:3])
    if not found:
        return "no setting makes it much smaller: a smaller model or a larger card is needed"
    return "each of these saves: " + "; ".join(f"{c.setting} (-{c.saves / 2**30:.1f} GiB)" for c in found[:4])


class PlanResult(NamedTuple):
    """budget: at `micro_tokens`, or at one sample where none fits. limit: bytes. verified: phase -> tracked bytes."""

    budget: Budget
    limit: int
    fits: bool
    advice: list[Cut]
    verified: dict[str, int] | None = None

    @property
    def failed(self) -> bool:
        """Whether the plan was held to the loop and is off by more than `TOLERANCE` and `FLOOR` in a phase."""
        return any(self._off(phase) > FLOOR for phase in self.verified or {})

    def _off(self, phase: str) -> int:
        """Bytes between plan and loop, where they are more than `TOLERANCE`; else 0."""
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
            f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {_count(shape.layers, 'layer')} of width "
            f"{shape.hidden}; {_count(job.prompts, 'prompt')} x {_count(job.samples, 'sample')}, {job.prompt_tokens} + "
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
                small = f"  {off / 2**20:.1f} MiB: too little to judge" if 0 < off <= FLOOR else ""
                lines.append(f"{phase:<20}{planned:>10.2f}{tracked / 2**30:>10.2f}{self.ratio(phase):>8.3f}{small}")
            held = "is not" if self.failed else "is"
            lines.append(
                f"the plan {held} within {TOLERANCE:.0%} of the loop's peak, or {FLOOR >> 20} MiB, in every phase"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        budget, size = self.budget, f"{self.limit / 2**30:.1f} GiB"
        samples = max(1, budget.micro_tokens // budget.job.tokens)
        if self.fits:
            return (
                f"fits {size}: update.micro_tokens={budget.micro_tokens} ({_count(samples, 'sample')} of "
                f"{budget.job.tokens} tokens a forward pass), {(self.limit - budget.peak) / 2**30:.1f} GiB free"
            )
        over = budget.peak - self.limit
        passes = "even with one sample a forward pass" if samples == 1 else f"with {samples} samples a forward pass"
        worst = max(PHASES, key=budget.total)
        term = max(budget.terms[worst], key=lambda name: budget.terms[worst][name])
        takes = f"{term} take{'s' * (not term.endswith('s'))} {budget.terms[worst][term] / 2**30:.1f} GiB"
        return (
            f"does not fit {size}, {passes}: {over / 2**30:.1f} GiB too much in {worst}, where the {takes}; "
            f"{_advice(self.advice)}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def run_plan(config: PlanConfig, *, progress: bool = True) -> PlanResult:
    """The plan of `config` on a card of `config.gpu`; with `verify` also what the loop takes of it.

    A number in update.micro_tokens is kept; auto takes the largest that fits.
    """
    model = model_config(config.model)
    limit = parse_size(config.gpu)
    if config.memory_budget is not None:
        limit = min(limit, parse_size(config.memory_budget))
    shape = ModelShape.of(model, config.model)
    job = job_shape(config, model, heads=config.heads)
    given = config.update.micro_tokens
    tokens = micro_tokens(shape, job, limit) if given == "auto" else given
    budget = plan(shape, job, tokens or job.tokens)
    fits = budget.peak <= limit
    result = PlanResult(budget, limit, fits, [] if fits else cuts(shape, job, limit))
    if not config.verify:
        return result
    if job.masked or job.eager or job.reward == "adapter":
        raise ValueError(
            "verify: expected no eager attention, packing only with flash-attn, and a reward on the frozen trunk or "
            "elsewhere: the others are planned, and not run without data"
        )
    from .plan_verify import trace

    settings = config.model_copy(
        update={"update": config.update.model_copy(update={"micro_tokens": budget.micro_tokens})}
    )
    heads = config.heads if job.reward else None
    weights = trunk_dtype(config, torch.device("cuda"))
    traced = trace(settings, model, weights, job.prompt_tokens, heads, progress)
    return result._replace(verified={phase: traced.peaks[phase]["Total"] for phase in PHASES})
