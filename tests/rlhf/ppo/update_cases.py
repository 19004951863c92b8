"""A tiny recurrent policy, experience for it, and updates of it, for the tests of the update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prudent
from prudent.rlhf.ppo.advantages import shape
from prudent.rlhf.ppo.batch import Experience, Samples, Scored, TokenBatch, response_mask, token_batch
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.update import open_optimizer, update

VOCAB, WIDTH = 11, 8


class Recurrent(nn.Module):
    """A tiny causal policy with a `Policy`'s methods: a GRU over the tokens, a language-model head, a critic."""

    packed = False

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.critic_gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.value_head = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.to(dtype)
        self.graphs: list[int] = []  # tokens of each forward pass that may be differentiated

    def hidden(self, batch: TokenBatch, role: str) -> Tensor:
        assert batch.attention_mask is not None
        if torch.is_grad_enabled():
            self.graphs.append(int(batch.attention_mask.sum()))
        network = self.critic_gru if role == "critic" else self.gru
        states: Tensor = network(self.dropout(self.embedding(batch.input_ids)))[0]
        return states.reshape(-1, WIDTH)

    def logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float) -> Any:
        return prudent.linear_logprob(hidden[batch.rows], self.head.weight, batch.targets, temperature=temperature)

    def values(self, hidden_rows: Tensor) -> Tensor:
        return self.value_head(hidden_rows)[:, 0]

    def parameter_groups(self, config: PPOConfig) -> list[dict[str, Any]]:
        heads = list(self.value_head.parameters())
        others = [p for name, p in self.named_parameters() if not name.startswith("value_head")]
        lr = config.update.lr or 1e-2
        return [{"name": "policy", "params": others, "lr": lr}, {"name": "value", "params": heads, "lr": 10 * lr}]


def a_config(update: dict[str, Any] | None = None, **given: Any) -> PPOConfig:
    """What every test starts from: two samples a prompt, one big micro-batch unless told otherwise."""
    options = {"micro_tokens": 10_000, "epochs": 1, "minibatches": 1, **(update or {})}
    given = {"reward": {"source": "none"}, "rollout": {"samples_per_prompt": 2}, **given}
    return PPOConfig.model_validate({"model": "tiny", "prompts": "none", "output": "run", "update": options, **given})


def sampled(config: PPOConfig, prompts: int = 5, seed: int = 0, policy: Any = None, moved: float = 0.3) -> Experience:
    """Shaped experience of ragged responses, two a prompt, scored by a policy that is `moved` away from `policy`."""
    policy = policy or Recurrent()
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(VOCAB, (length,), generator=draw).tolist()

    texts = [ids(1, 5) for _ in range(prompts)]
    rows = [index for index in range(prompts) for _ in range(2)]
    samples = Samples([texts[i] for i in rows], [ids(1, 9) for _ in rows], [i % 3 > 0 for i in rows], rows)
    mask = response_mask(samples, "cpu")
    batch = token_batch(samples, range(len(rows)), packed=False, device="cpu")
    tables = []
    with torch.no_grad():
        hidden = policy.hidden(batch, "actor")
        out = policy.logprobs(hidden, batch, config.rollout.temperature)
        critic = hidden if config.critic == "shared" else policy.hidden(batch, "critic")
        for numbers, size in ((out.logprob, moved), (out.logprob, moved), (out.entropy, 0.0)):
            table = torch.zeros(mask.shape, dtype=numbers.dtype)
            noise = torch.randn(numbers.shape, generator=draw, dtype=numbers.dtype)
            table[batch.sequence, batch.offset] = numbers + size * noise
            tables.append(table)
        value = torch.zeros_like(tables[0])
        noise = torch.randn(len(batch.targets), generator=draw, dtype=value.dtype)
        value[batch.sequence, batch.offset] = policy.values(critic[batch.rows]) + moved * noise
    reward = torch.randn(len(rows), generator=draw, dtype=value.dtype)
    scored = Scored(samples, mask, *tables, value if config.critic != "none" else None, reward)
    return shape(scored, config, config.kl.coef)


def run(
    config: PPOConfig, experience: Experience | None = None, policy: Recurrent | None = None, seed: int = 7
) -> tuple[Recurrent, dict[str, float]]:
    policy = policy or Recurrent()
    experience = experience or sampled(config)
    optimizer = open_optimizer(policy, config)
    generator = torch.Generator().manual_seed(seed)
    return policy, update(policy, optimizer, experience, config, kl_coef=config.kl.coef, generator=generator)


def gradients(monkeypatch: pytest.MonkeyPatch, config: PPOConfig, experience: Experience) -> dict[str, Tensor]:
    """What `.grad` held when the first optimizer step was asked for, before clipping."""
    policy, seen = Recurrent(), {}

    def look(*_: Any, **__: Any) -> Tensor:
        if not seen:
            seen.update({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        return torch.ones(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    run(config, experience, policy)
    return seen
