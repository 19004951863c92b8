"""One GRPO step of TRL on the path of each folder, without prudent; writes what the reward model read and gave."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import datasets
import trl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert "prudent" not in sys.modules
sys.modules["prudent"] = None  # from here on, `import prudent` raises

policy, results = sys.argv[1], []
knows = "trust_remote_code" in {field.name for field in dataclasses.fields(trl.GRPOConfig)}
for folder in sys.argv[3:]:
    options = {"trust_remote_code": True} if knows else {}
    arguments = trl.GRPOConfig(
        output_dir=sys.argv[2] + ".run", max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        num_generations=4, max_completion_length=8, per_device_train_batch_size=4, seed=3, disable_tqdm=True, **options,
    )  # fmt: skip
    reward, more = folder, {}
    if not knows:
        reward = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        more = {"reward_processing_classes": AutoTokenizer.from_pretrained(folder)}
    rows = [[{"role": "user", "content": text}] for text in ("Once", "Why is", "The sky", "Tell me")]
    trainer = trl.GRPOTrainer(
        model=policy,
        args=arguments,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
        **more,
    )

    def keep(_module, _args, given, output):
        ids, mask = given["input_ids"].tolist(), given["attention_mask"].tolist()
        rows = [[i for i, m in zip(row, seen, strict=True) if m] for row, seen in zip(ids, mask, strict=True)]
        results.append({"rows": rows, "logits": output.logits[:, 0].tolist()})

    trainer.reward_funcs[0].register_forward_hook(keep, with_kwargs=True)
    trainer.train()
Path(sys.argv[2]).write_text(json.dumps(results))
