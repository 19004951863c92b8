"""GRPO in TRL with a pessimistic reward, and its uncertainty in TRL's log.

    python examples/trl_grpo.py POLICY REWARD_MODEL_OR_URL [STEPS]

pip install prudent[train] trl. With a URL (`prudent serve --model REWARD_MODEL`), the reward model runs elsewhere.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import prudent

policy, reward_model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100
questions = ["How was your day?", "What should I cook?", "Tell me about trains.", "Is it cold outside?"]
prompts = [[{"role": "user", "content": question}] for question in questions]

reward = prudent.trl_reward(
    reward_model,
    aggregation="lcb:1",  # the heads' mean minus their disagreement; None: the model's own
    policy=policy,  # whose stop tokens say which completions were cut off
)
trainer = GRPOTrainer(
    model=policy,
    processing_class=AutoTokenizer.from_pretrained(policy),
    reward_funcs=reward,
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    args=GRPOConfig(
        output_dir="runs/grpo",
        max_steps=steps,
        logging_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=32,
        bf16=torch.cuda.is_available(),
        scale_rewards="batch",  # dividing by each group's own std would erase how much the rewards differ
        report_to="none",
    ),
)
trainer.train()
for entry in trainer.state.log_history:
    if "reward" in entry:
        print({name: round(entry[name], 4) for name in entry if name == "reward" or name.startswith("prudent/")})
