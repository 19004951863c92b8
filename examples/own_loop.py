"""A training loop of your own on the bare ops: REINFORCE with pessimistic rewards, centred within each prompt's group.

    python examples/own_loop.py POLICY REWARD_MODEL [STEPS]

Both are folders with one tokeniser; `prudent train --model POLICY` makes the second. Read it as a starting point: the
whole loop is `prudent ppo`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prudent

policy_name, reward_name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
tokenizer = AutoTokenizer.from_pretrained(policy_name)
policy = AutoModelForCausalLM.from_pretrained(policy_name)
reward_model = prudent.EnsembleRewardModel.from_pretrained(reward_name).eval()
head, group, length = reward_model.score, 8, 16
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
prompt = tokenizer("The best day of my life", return_tensors="pt").input_ids

for step in range(steps):
    with torch.no_grad():
        ids = policy.generate(
            prompt, do_sample=True, num_return_sequences=group, min_new_tokens=length, max_new_tokens=length
        )
        states = reward_model.model(ids).last_hidden_state  # [group, T, D]
        last = torch.arange(1, group + 1) * ids.shape[1] - 1  # the row of each last token
        scored = prudent.ensemble_reward(
            states, head.weight, head.bias, rows=last, shift=head.shift, scale=head.scale, group=group,
            std_floor=head.std_floor, aggregation="lcb:1,centre=group",
        )  # fmt: skip
    hidden = policy.model(ids).last_hidden_state[:, -length - 1 : -1].flatten(0, 1)
    logprob = prudent.linear_logprob(hidden, policy.lm_head.weight, ids[:, -length:].flatten()).logprob
    loss = -(scored.reward[:, None] * logprob.view(group, length)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: mean {scored.mean.mean():.3f}, std {scored.std.mean():.3f}, loss {loss:.4f}")
