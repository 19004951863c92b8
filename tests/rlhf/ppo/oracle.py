"""A tabular policy with every response enumerated in fp64: exact expectations and gradients, independent of PPO.

The policy's probabilities are quarters, so a finite set of samples *is* its distribution: each response of at most T
tokens as often as its probability times 4^T says. A mean over the set is then an expectation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import prudent
from prudent.rlhf.ppo.batch import Experience, Samples, Scored, TokenBatch, response_mask
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.update import update

VOCAB, STOP, PROMPTS = 3, 0, 2
State = tuple[int, ...]  # the prompt's number, then the tokens so far
QUARTERS = ((2, 1, 1), (1, 2, 1), (1, 1, 2))


def responses(longest: int) -> Iterator[tuple[int, ...]]:
    """Every response: it ends with the stop token or at `longest` tokens."""
    for length in range(1, longest + 1):
        for body in itertools.product(range(1, VOCAB), repeat=length - 1):
            for last in range(VOCAB):
                if last == STOP or length == longest:
                    yield (*body, last)


def states(longest: int) -> list[State]:
    return [
        (prompt, *body)
        for prompt in range(PROMPTS)
        for length in range(longest)
        for body in itertools.product(range(1, VOCAB), repeat=length)
    ]


class Table(nn.Module):
    """A `Policy` whose hidden states are its logits and values: one free row for each prompt and text so far."""

    packed = False

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest, self.number = longest, {state: i for i, state in enumerate(states(longest))}
        quarters = torch.tensor([QUARTERS[(7 * i) % 3] for i in range(len(self.number))], dtype=torch.float64)
        self.logits = nn.Parameter((quarters / 4).log())
        self.value = nn.Parameter(torch.zeros(len(self.number), dtype=torch.float64))

    def hidden(self, batch: TokenBatch, role: str) -> Tensor:
        table = torch.cat([self.logits, self.value[:, None]], 1)
        assert batch.attention_mask is not None
        rows = []
        for ids, there in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
            texts = [(ids[0] - VOCAB, *ids[1 : place + 1]) if there[place] else (0,) for place in range(len(ids))]
            rows += [self.number[text] for text in texts]
        return table[rows]

    def logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float) -> Any:
        weight = torch.eye(VOCAB, VOCAB + 1, dtype=torch.float64)
        return prudent.linear_logprob(hidden[batch.rows], weight, batch.targets, temperature=temperature)

    def values(self, hidden_rows: Tensor) -> Tensor:
        return hidden_rows[:, -1]

    # the oracle's own way to the same numbers

    def tokens(self, prompt: int, response: tuple[int, ...]) -> list[Tensor]:
        """log pi of each token."""
        places = [self.number[(prompt, *response[:place])] for place in range(len(response))]
        return [self.logits[at].log_softmax(0)[token] for at, token in zip(places, response, strict=True)]

    def expectation(self, number: Callable[[int, tuple[int, ...]], Any]) -> Tensor:
        """Mean over prompts and responses of `number`, with the probabilities' gradient."""
        total = torch.zeros((), dtype=torch.float64)
        for prompt in range(PROMPTS):
            for response in responses(self.longest):
                total = total + torch.stack(self.tokens(prompt, response)).sum().exp() * number(prompt, response)
        return total / PROMPTS

    def visits(self) -> Tensor:
        """[states] how often a response comes through each state, in expectation over prompts; no gradient."""
        visits = torch.zeros(len(self.number), dtype=torch.float64)
        with torch.no_grad():
            for state, at in self.number.items():
                visits[at] = sum(self.tokens(state[0], state[1:]), torch.zeros(())).exp() / PROMPTS
        return visits


class World(NamedTuple):
    policy: Table
    reference: Table
    reward: dict[State, float]  # by prompt and response


def a_world(longest: int = 3, seed: int = 0) -> World:
    policy, reference = Table(longest), Table(longest)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        reference.logits += torch.randn(reference.logits.shape, generator=generator, dtype=torch.float64) / 2
    texts = [(prompt, *response) for prompt in range(PROMPTS) for response in responses(longest)]
    rewards = torch.randn(len(texts), generator=generator, dtype=torch.float64)
    return World(policy, reference, dict(zip(texts, rewards.tolist(), strict=True)))


def a_config(update_options: dict[str, Any] | None = None, **given: Any) -> PPOConfig:
    plain = {"epochs": 1, "minibatches": 1, "whiten": False, "max_grad_norm": 1e30, "micro_tokens": 100}
    base = {"model": "table", "prompts": "none", "output": "run", "reward": {"source": "none"}}
    chosen = {**plain, **(update_options or {})}
    return PPOConfig.model_validate({**base, "rollout": {"samples_per_prompt": 2}, "update": chosen, **given})


def exact_values(world: World, kl_coef: float) -> Tensor:
    """[states] V(s) = E[what comes after s | s] of reward - kl_coef sum l, backwards from the longest texts."""
    value = torch.zeros_like(world.policy.value)
    with torch.no_grad():
        for state, at in sorted(world.policy.number.items(), key=lambda item: -len(item[0])):
            logp, ref = world.policy.logits[at].log_softmax(0), world.reference.logits[at].log_softmax(0)
            for token in range(VOCAB):
                text = (*state, token)
                after = world.reward[text] if text in world.reward else value[world.policy.number[text]]
                value[at] += logp[token].exp() * (after - kl_coef * (logp[token] - ref[token]))
    return value


def scored(world: World, rows: list[State], value: Tensor | None) -> Scored:
    """What scoring would have made of the texts `rows`, under the policy as it is."""
    samples = Samples(
        [[VOCAB + row[0]] for row in rows],
        [list(row[1:]) for row in rows],
        [row[-1] == STOP for row in rows],
        [row[0] for row in rows],
    )
    mask = response_mask(samples, "cpu")
    tables = [torch.zeros(mask.shape, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        for i, row in enumerate(rows):
            for table, policy in ((tables[0], world.policy), (tables[1], world.reference)):
                table[i, : len(row) - 1] = torch.stack(policy.tokens(row[0], row[1:]))
            if value is not None:
                tables[3][i, : len(row) - 1] = torch.stack(
                    [value[world.policy.number[row[: t + 1]]] for t in range(len(row) - 1)]
                )
    reward = torch.tensor([world.reward[row] for row in rows], dtype=torch.float64)
    return Scored(samples, mask, *tables[:3], tables[3] if value is not None else None, reward)


def whole_distribution(world: World) -> list[State]:
    """Each response as often as 4^T times its probability, prompt after prompt."""
    rows: list[State] = []
    with torch.no_grad():
        for text in world.reward:
            share = float(torch.stack(world.policy.tokens(text[0], text[1:])).sum().exp())
            rows += [text] * round(share * 4**world.policy.longest)
    assert len(rows) == PROMPTS * 4**world.policy.longest  # probabilities are what they claim to be
    return rows


def update_gradient(world: World, shaped: Experience, config: PPOConfig, kl_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """The gradient per response that an update descends: of logits and values, read off one step of plain SGD."""
    policy = world.policy
    before = policy.logits.detach().clone(), policy.value.detach().clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    metrics = update(policy, optimizer, shaped, config, kl_coef=kl_coef, generator=torch.Generator())
    assert metrics["update/steps"] == 1
    with torch.no_grad():
        found = before[0] - policy.logits, before[1] - policy.value
        policy.logits.copy_(before[0])
        policy.value.copy_(before[1])
    responses_per_token = len(shaped.mask) / float(shaped.mask.sum())
    return found[0] / responses_per_token, found[1] / responses_per_token


def gradient(of: Tensor, policy: Table) -> Tensor:
    return torch.autograd.grad(of, policy.logits)[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
