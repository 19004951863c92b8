"""Tiny models of several families, prompts, numbers and rules, and one response drawn without a cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prudent.rlhf.sampling.tokens import Rule, Sampling

VOCAB = 40


def a_model(family: str = "llama", **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if family == "gpt2":
        sizes, heads = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}, {}
    if family == "gpt_neox":
        heads = {"num_attention_heads": 4}
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **heads, **ids, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def some_prompts(lengths: list[int], samples: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    distinct = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [prompt for prompt in distinct for _ in range(samples)]


def numbers(rows: int, limit: int) -> torch.Tensor:
    return torch.rand(rows, limit, generator=torch.Generator().manual_seed(3))


def a_rule(limit: int = 12, stop: tuple[int, ...] = (3, 7, 9), least: int = 0, **options: Any) -> Rule:
    return Rule(Sampling(limit, **{"top_k": 0, "top_p": 1.0, **options}), least, set(stop))


def alone(model: Any, prompt: list[int], uniform: torch.Tensor, rule: Rule) -> tuple[list[int], bool]:
    """One response without a cache: the whole sequence is read again for every token."""
    said: list[int] = []
    for step, u in enumerate(uniform):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[:, -1].double()
        if step < rule.min_new_tokens:
            logits[:, rule.stop] = float("-inf")
        probability = torch.softmax(logits[0] / rule.sampling.temperature, 0)
        said.append(min(int((probability.cumsum(0) <= u).sum()), VOCAB - 1))
        if said[-1] in rule.stop.tolist():
            return said, True
    return said, False
