"""Run one side of a PPO comparison in its own process: our loop or TRL's trainer, with the same model, sizes and
epochs.

    python -m prudent.bench.ppo_sides SIDE SETTINGS.json RESULT.json      SIDE: ours or trl

Every response has its full length on both sides (no stop token ends one), so that a sample is the same work. Only TRL
1.12 is accepted, the last release with PPO (trl.experimental.ppo). The result has the seconds of each step after the
first or, with `memory`, the peak of tensor memory, with the models' own.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .measure import extra_memory

TRL = "1.12"


@dataclass(frozen=True)
class Sides:
    """The settings of both sides. model: a folder, or "" for random weights of `shape` (LlamaConfig's fields)."""

    model: str = ""
    shape: tuple[tuple[str, Any], ...] = ()
    mode: str = "lora"  # or full
    device: str = "cpu"
    dtype: str = "float32"
    prompts: int = 32
    prompt_tokens: int = 16
    response_tokens: int = 48
    epochs: int = 2
    minibatches: int = 2
    micro_rows: int = 16
    steps: int = 5
    heads: int = 5
    memory: bool = False  # measure the peak memory of two steps instead of times

    @classmethod
    def read(cls, path: Path) -> Sides:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "shape": tuple((k, v) for k, v in fields["shape"])})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(sides: Sides) -> Any:
    """Load the causal language model in its dtype, on the device. Its weights are copied, because a memory-mapped file
    does not count as an allocation."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, sides.dtype)
    if sides.model:
        loaded: Any = AutoModelForCausalLM.from_pretrained(sides.model, dtype=dtype, trust_remote_code=False)
        return copy.deepcopy(loaded).to(sides.device)
    torch.manual_seed(0)
    with torch.device(sides.device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**dict(sides.shape)), dtype=dtype)


def prompt_ids(sides: Sides, vocabulary: int, step: int = 0) -> list[list[int]]:
    """Random ids of one length, 3 or above, because 0, 1 and 2 are often special tokens."""
    generator = torch.Generator().manual_seed(step)
    shape = (sides.prompts, sides.prompt_tokens)
    rows: list[list[int]] = torch.randint(3, vocabulary, shape, generator=generator).tolist()
    return rows


class OurLoop:
    """The phases of rlhf/ppo's loop, on a policy with a shared critic and `sides.heads` heads on its trunk.

    micro_tokens: of scoring and update; None: `sides.micro_rows` samples.
    """

    def __init__(self, sides: Sides, micro_tokens: int | None = None) -> None:
        from ..engine import EnsembleHead
        from ..rlhf.ppo.config import PPOConfig
        from ..rlhf.ppo.policy.policy import Policy, RewardOnTrunk
        from ..rlhf.ppo.update import open_optimizer
        from ..rlhf.sampling.sampler import open_sampler

        self.sides = sides
        length = sides.prompt_tokens + sides.response_tokens
        self.config = PPOConfig.model_validate({
            "model": sides.model or "random", "prompts": "-", "output": "-", "dtype": sides.dtype,
            "reward": {"source": "-", "kind": "shared"},
            "policy": {"mode": sides.mode},
            "rollout": {"prompts_per_step": sides.prompts, "max_new_tokens": sides.response_tokens,
                        "min_new_tokens": sides.response_tokens},
            "update": {"epochs": sides.epochs, "minibatches": sides.minibatches,
                       "micro_tokens": micro_tokens or sides.micro_rows * (length + 1)},
        })  # fmt: skip
        model = load(sides)
        head = EnsembleHead(model.config.hidden_size, sides.heads)
        self.policy = Policy(self.config, model, device=sides.device, reward=RewardOnTrunk(head))
        self.sampler = open_sampler(self.config.rollout, model, {1}, sides.device)
        self.optimizer = open_optimizer(self.policy, self.config)

    def draw(self, step: int) -> Any:
        from ..rlhf.ppo.rollout import draw
        from ..rlhf.sampling.prompts import Prompt

        prompts = [Prompt("", ids) for ids in prompt_ids(self.sides, self.policy.vocab_size, step)]
        return draw(self.sampler, self.policy, prompts, range(len(prompts)), self.config, step, progress=False)

    def score(self, samples: Any) -> Any:
        from ..rlhf.ppo.advantages import shape
        from ..rlhf.ppo.score import score

        experience = score(self.policy, None, samples, self.config, closing=[1])
        return shape(experience, self.config, self.config.kl.coef)

    def update(self, experience: Any, step: int) -> None:
        from ..rlhf.ppo.update import update

        generator = torch.Generator().manual_seed(step)
        coef = self.config.kl.coef
        update(self.policy, self.optimizer, experience, self.config, kl_coef=coef, generator=generator)


def ours(sides: Sides) -> list[float]:
    """Seconds of each step of the loop."""
    loop = OurLoop(sides)
    return _timed(lambda step: loop.update(loop.score(loop.draw(step)), step), sides)


def _timed(step: Callable[[int], None], sides: Sides) -> list[float]:
    seconds = []
    for number in range(sides.steps):
        began = time.perf_counter()
        step(number)
        if sides.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def trl(sides: Sides) -> list[float]:
    """Seconds of each step of TRL's trainer, from one on_step_end to the next, or from train() to the first."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

    version = metadata.version("trl")
    if not version.startswith(f"{TRL}."):
        raise ValueError(f"--trl-python, --trl-path: expected TRL {TRL}, the last with PPO, got {version}")
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found, unused-ignore]

    policy = load(sides)
    config = (
        AutoConfig.from_pretrained(sides.model, trust_remote_code=False)
        if sides.model
        else copy.deepcopy(policy.config)
    )
    config.num_labels, config.pad_token_id = 1, 0

    def judge() -> Any:
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype).to(sides.device)
        model.base_model.load_state_dict(policy.base_model.state_dict())
        return model

    reward, value = judge(), judge()
    lora, reference = None, None
    if sides.mode == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        reference = copy.deepcopy(policy)
    marks = []

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if sides.device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    rows = prompt_ids(sides, policy.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        minibatch = sides.prompts // sides.minibatches
        arguments = PPOConfig(
            output_dir=folder, per_device_train_batch_size=sides.micro_rows,
            gradient_accumulation_steps=sides.prompts // sides.micro_rows, num_mini_batches=sides.minibatches,
            num_ppo_epochs=sides.epochs, total_episodes=sides.prompts * sides.steps,
            local_rollout_forward_batch_size=min(sides.prompts, minibatch), response_length=sides.response_tokens,
            temperature=1.0, bf16=False, gradient_checkpointing=False, use_cpu=sides.device == "cpu",
            report_to="none", save_strategy="no", num_sample_generations=0, logging_steps=10**9, disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer(policy.config.vocab_size), model=policy, ref_model=reference,
            reward_model=reward, value_model=value, train_dataset=Dataset.from_dict({"input_ids": rows}),
            peft_config=lora, callbacks=[Clock()],
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
    marks = marks[-sides.steps :]
    return [after - before for before, after in zip([began, *marks], marks, strict=False)]


def tokenizer(vocabulary: int) -> Any:
    """A tokeniser with one word for each id: TRL needs a tokeniser, although prompts are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", padding_side="left")


def run(side: str, sides: Sides) -> dict[str, Any]:
    """{"seconds": of each step but the first} or, with `memory`, {"peak": bytes}."""
    work = {"ours": ours, "trl": trl}[side]
    if not sides.memory:
        return {"seconds": work(sides)[1:]}
    if sides.device == "cuda":
        work(sides)
        return {"peak": torch.cuda.max_memory_allocated()}

    def call() -> None:
        work(sides)

    return {"peak": extra_memory(call, torch.device("cpu"))}


def main(argv: list[str]) -> int:
    side, settings, result = argv
    found = run(side, Sides.read(Path(settings)))
    found["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    if side == "trl":
        found["versions"]["trl"] = metadata.version("trl")
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
