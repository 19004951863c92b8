"""The subcommands of `prudent`: which function each calls, which config keys have flags, what its --help says."""

from __future__ import annotations

from typing import NamedTuple


class Job(NamedTuple):
    """A subcommand.

    module, config, run: the module under `prudent.rlhf`, its config class (in the config.py beside it), its function.
    flags: config keys with a flag of their own, named after the key's first part (reward.source: --reward); a flag's
        type and help come from the config.
    keys: up to ten other keys that people set most; --help shows them.
    again: how to continue after an interrupt.
    options: switches of the call itself, which no config file can hold; see OPTIONS.
    """

    module: str
    config: str
    run: str
    summary: str
    about: str
    flags: tuple[str, ...]
    keys: tuple[str, ...]
    again: str
    options: tuple[str, ...] = ()


OPTIONS = {
    "resume": "Continue an interrupted run with the same output where it stopped.",
    "overwrite": "Replace the output of an earlier run.",
}

JOBS = {
    "demo": Job(
        "demo.demo",
        "DemoConfig",
        "run_demo",
        "run the whole pipeline on a small model and write a report",
        """What does a reward know, and what happens beyond? Sample responses from a real model; let a judge label a few
hundred pairs, a quarter of the labels flipped; train a single head and a BRME ensemble; fit a trust region to the
responses, without labels. Then let best-of-n choose among the model's own responses and among a mixture with foreign
ones, train the model itself by PPO against the single head with and without the price on distance, and write
report.html. Two seconds of sampling at the start tell how long it will take.

The same command continues an interrupted run; after a finished one it prints the table again. --size full draws about
six times as many tokens; single keys override what the size sets.

examples:
  prudent demo
  prudent demo --size full --output runs/full
  prudent demo --set ppo.steps=0                                # shorter, without PPO
  prudent demo --set held_out_prompts=48 --set ppo.steps=8      # longer, with narrower intervals and more PPO
  prudent demo --set foreign=0.5 --set price=3                  # more foreign candidates, a higher price
  prudent demo --output runs/mine --prompts my_prompts.txt
  prudent demo --model meta-llama/Llama-3.2-1B-Instruct --set samples_per_prompt=8""",
        ("output", "size", "model", "prompts", "preferences", "skip_bad_rows"),
        (
            "pairs",
            "label_noise",
            "draws",
            "held_out_prompts",
            "best_of",
            "foreign",
            "price",
            "features",
            "ppo.steps",
            "seed",
        ),
        "the same command continues",
    ),
    "train": Job(
        "reward.train",
        "TrainConfig",
        "run_train",
        "train a reward ensemble on preference pairs",
        """Stage 1 trains one Bradley-Terry head, stage 2 K Gaussian heads (BRME, arXiv 2409.15360, eq. 8). On a CPU the
trunk stays frozen and its features are computed once; --set mode=lora or mode=full trains it too. --stage pet (PET,
arXiv 2505.20556) makes a reward pessimistic against the best of n samples of MODEL, for policies trained without KL:
the stage-1 head, this run's ensemble (pet.start=brme) or a reward model that you have (pet.start=FOLDER).

Data: JSON lines, Parquet, or the name of a Hugging Face data set (NAME:SPLIT for another split than train). A row has
prompt, chosen and rejected; or chosen and rejected that share their beginning; or lists of messages; or several
responses with scores. It may have a margin. The prompt may be spread over the columns system, history, context,
instruction, question, input and tools; a warning names any column that looks like content and is not read. If the
tokeniser has a chat template, prompt and response become a user's and an assistant's message; if not, they are joined
unchanged, so end the prompt with a space if one is needed.

examples:
  prudent train --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --output runs/reward
  prudent train --config train.yaml --set brme.num_heads=7 --set bt.bsr=0.001
  prudent train --config train.yaml --resume
  prudent train --stage pet --model my/policy --data pairs.jsonl --output runs/pet --set pet.max_new_tokens=256
  prudent train --model my/one-head-reward --stage1 my/one-head-reward --data pairs.jsonl --output runs/reward""",
        ("model", "data", "output", "stage", "stage1", "skip_bad_rows"),
        (
            "mode",
            "features",
            "aggregation",
            "brme.num_heads",
            "trunk.lr",
            "trunk.batch_size",
            "max_length",
            "batch_tokens",
            "eval_fraction",
            "seed",
        ),
        "the same command with --resume continues",
        ("resume",),
    ),
    "score": Job(
        "evaluation.score",
        "ScoreConfig",
        "run_score",
        "write the reward of every line of a file",
        """Read JSON lines and write the same lines with reward, nominal, worst, the mean and std of every head, and the
distance from the reference responses (1: their 95 % quantile). A line holds prompt and response, or messages, or a pair
(chosen, rejected). The order is kept; memory use does not grow with the file.

examples:
  prudent score --model runs/reward/model --data responses.jsonl --output scored.jsonl
  prudent score --model runs/reward/model --data responses.jsonl --output scored.jsonl --aggregation lcb:1 --resume
  cat responses.jsonl | prudent score --model runs/reward/model --data - --output - > scored.jsonl""",
        ("model", "data", "output", "aggregation", "batch_tokens", "skip_bad_rows"),
        ("max_length", "append_eos"),
        "the same command with --resume continues (from a file, not from standard input)",
        ("resume", "overwrite"),
    ),
    "eval": Job(
        "evaluation.evaluate",
        "EvalConfig",
        "run_eval",
        "measure a reward model on held-out pairs",
        """Accuracy with a bootstrap interval for nominal, mean, worst, trade-off and each head; normalised margins,
coverage, std against error, agreement of the heads, dispersion of the features. Writes eval.json and pictures.

examples:
  prudent eval --model runs/reward/model --data held_out.jsonl --output runs/reward/eval
  prudent eval --model runs/reward/model --data pairs.jsonl --output runs/reward/eval \\
      --set compare=runs/reward/stage1 --set eval_fraction=0.1      # the prompts that training held out""",
        ("model", "data", "output", "aggregation", "batch_tokens", "skip_bad_rows"),
        (
            "compare",
            "foreign",
            "eval_fraction",
            "split_seed",
            "max_length",
            "min_score_gap",
            "limit",
            "feature_cache",
            "resamples",
            "pictures",
        ),
        "the same command starts over (with --set feature_cache=FOLDER it keeps the features)",
    ),
    "serve": Job(
        "serve.serve",
        "ServeConfig",
        "run_serve",
        "answer rewards over HTTP, in the dialects of trainers and engines",
        """Load one or more reward models and answer until SIGTERM or Ctrl-C; requests under way are answered first.
Items of all requests share forward passes.

  /score                 texts, chats, responses, pairs: reward, each head's mean and std, distance
  /get_reward            OpenRLHF (--reward.remote_url) and prudent ppo (--reward URL)
  /slime                 slime (--rm-type remote_rm --rm-url URL --reward-key reward)
  /v1/score/evaluation   LLaMA-Factory (reward_model_type: api)
  /verify                NeMo-Gym
  /classify, /pooling, /v1/embeddings   as vLLM and SGLang answer, the reward last; verl reads them
  /                      a page: a prompt, two responses, every head, every aggregation
  /health, /metrics, /openapi.json

Every path takes ?aggregation=lcb:1 and ?model=NAME. Only this machine reaches the server unless --host says
otherwise; then set a bearer token, best in the environment as PRUDENT_TOKEN.

examples:
  prudent serve --model runs/reward/model
  prudent serve --model runs/reward/model --aggregation trust:1 --port 9000
  prudent serve --model small=runs/a/model --model large=runs/b/model        # ?model=large asks the second
  PRUDENT_TOKEN=secret prudent serve --model runs/reward/model --host 0.0.0.0
  curl -s localhost:8000/score -H 'content-type: application/json' \\
      -d '{"items": [{"prompt": "Name a colour.", "response": "Blue."}]}'""",
        ("model", "host", "port", "token", "aggregation"),
        (
            "batch_tokens",
            "wait_ms",
            "timeout",
            "read_timeout",
            "max_queue",
            "max_items",
            "max_chars",
            "max_body",
            "max_length",
            "append_eos",
        ),
        "the same command starts it again",
    ),
    "sample": Job(
        "sampling.sample",
        "SampleConfig",
        "run_sample",
        "write a language model's responses to prompts",
        """Sample the policy that you are about to optimise, before you optimise it: `prudent calibrate` then fits the
trust region of a reward model to its responses, and `prudent score` says what the reward thinks of them. A line of the
output has the prompt, the response, and whether it ended by itself.

Use the prompts, temperature and length of the run to come: the distance knows no others.

examples:
  prudent sample --model Qwen/Qwen2.5-0.5B-Instruct --prompts prompts.txt --output policy_samples.jsonl
  prudent sample --model my/policy --prompts prompts.jsonl --output policy_samples.jsonl --resume \\
      --set rollout.samples_per_prompt=4 --set rollout.max_new_tokens=256 --set rollout.temperature=1.0
  prudent calibrate --model runs/reward/model --data policy_samples.jsonl""",
        ("model", "prompts", "output", "limit", "seed", "skip_bad_rows"),
        (
            "rollout.samples_per_prompt",
            "rollout.max_new_tokens",
            "rollout.max_prompt_tokens",
            "rollout.temperature",
            "rollout.top_k",
            "rollout.top_p",
            "rollout.prompts_per_step",
            "rollout.batch_rows",
            "rollout.engine",
            "dtype",
        ),
        "the same command with --resume continues",
        ("resume", "overwrite"),
    ),
    "calibrate": Job(
        "reward.calibrate",
        "CalibrateConfig",
        "run_calibrate",
        "refit what a reward model knows: its trust region, and the scale of its heads",
        """The trust region says where a reward was taught: its distance is 1 at the edge of 95 % of the reference
responses, and more for text unlike them, whatever the heads say. `prudent train` fits it to the training responses.
Refit it, without labels, to responses of the policy that you will optimise, then let the reward fall with the distance:
--aggregation trust:1 takes one unit (a standard deviation of the reward within a prompt) at the edge, four at
distance 2; trust:3,from=1,power=1 takes nothing inside.

A line of the data holds prompt and response, or messages, or a pair (chosen, rejected), as for `prudent score`; 20 are
needed, thousands are better, to prompts like those of the policy. `prudent sample` writes such a file. `prudent ppo`
closes a response that was cut off at its greatest length, other trainers do not: for these, --set cut=open.
--scale-data measures shift, scale and std_ref of the heads too: each head then has mean 0 and standard deviation 1 on
that file (BRME, arXiv 2409.15360, appendix F). The weights stay as they are. The model's folder is exchanged in one
step, or written to --output.

examples:
  prudent calibrate --model runs/reward/model --data policy_samples.jsonl
  prudent calibrate --model runs/reward/model --data policy_samples.jsonl --aggregation trust:1
  prudent calibrate --model my/one-head-reward --data samples.jsonl --scale-data hh.jsonl --output runs/calibrated""",
        ("model", "data", "output", "scale_data", "aggregation", "skip_bad_rows"),
        ("cut", "directions", "shrinkage", "limit", "feature_cache", "max_length", "batch_tokens", "append_eos"),
        "the same command starts over (with --set feature_cache=FOLDER it keeps the features)",
    ),
    "export": Job(
        "export.export",
        "ExportConfig",
        "run_export",
        "write a reward model for loaders that do not know prudent",
        """Write a folder that AutoModelForSequenceClassification loads where prudent is not installed, and with it TRL,
vLLM, OpenRLHF or verl. Its README.md says how to load it in each, what the numbers mean, and how the model was made.

  --as linear       an ordinary one-label reward model, for an aggregation that is a weighted sum of the heads' means
                    (mean, head:0). Exact; a constant that no weight can carry is stated in config.json and README.md.
  --as stock        the family's own classifier with 2K labels, means and raw stds, and a short client that makes the
                    reward of them, under any aggregation. The distance needs the last hidden state beside the logits.
  --as remote-code  the whole model with one file of code (trust_remote_code): reward, means, stds and distance.

What a form cannot carry is refused by name before anything is written. Of heads that read more than the last state
(features=wide and the like), remote-code is the only form.

examples:
  prudent export --model runs/reward --to exported/reward --as remote-code
  prudent export --model runs/reward --to exported/linear --as linear --aggregation mean
  prudent export --model runs/reward --to exported/stock --as stock --set max_shard_size=2GB""",
        ("model", "to", "as_", "aggregation"),
        ("append_eos", "max_shard_size"),
        "the same command starts over",
    ),
    "plan": Job(
        "plan.plan",
        "PlanConfig",
        "run_plan",
        "compute the memory of a PPO run, without weights or a GPU",
        """Print the memory of each phase of `prudent ppo` (rollout, scoring, update) by term, and the largest
micro-batch that fits; if none fits, the settings that help. --model is a built-in shape (llama3-8b, qwen2.5-14b, ...),
a config.json, a model's folder or a hub name. The keys are those of `prudent ppo`, so its YAML file works here too.
--verify runs the loop itself on tensors without data, which takes minutes for a large model, and exits with 1 if the
tracked peak of a phase differs from the plan by more than 10 %.

examples:
  prudent plan --model llama3-8b --gpu 40GB --set rollout.max_new_tokens=512
  prudent plan --model qwen2.5-14b --gpu 80GB --set policy.gradient_checkpointing=true --verify
  prudent plan --config ppo.yaml --gpu 24GB""",
        ("model", "gpu", "verify"),
        (
            "policy.mode",
            "policy.critic",
            "policy.lora_rank",
            "policy.gradient_checkpointing",
            "rollout.prompts_per_step",
            "rollout.samples_per_prompt",
            "rollout.max_new_tokens",
            "update.micro_tokens",
            "dtype",
            "heads",
        ),
        "the same command starts over",
    ),
    "ppo": Job(
        "ppo.pet_recipe",  # calls ppo.loop, except for --recipe pet
        "PPOConfig",
        "run_recipe",
        "train a policy against a reward, and watch for reward hacking",
        """One trunk serves policy, reference, critic and reward: LoRA on (policy), LoRA off (reference), a value head,
and the ensemble's heads if they fit the trunk. Every step logs reward, KL, length, how much the heads disagree, and the
distance from the responses that the reward was fitted to.
--gold adds a second reward, which is only watched; --stop-when ends the run, or rolls it back, when a metric meets a
condition. The run folder holds the policy, metrics.jsonl, TensorBoard files, samples and report.html.

A reward is a folder of `prudent train`, any sequence classifier, a function (MODULE:FUNCTION or FILE.py:FUNCTION,
called with prompts and responses) or a URL. --recipe pet trains the reward as well: Bradley-Terry on --data, PET
against the best of n of the model's own samples, then best-of-n and PPO without KL on that reward.

examples:
  prudent ppo --model NAME_OR_PATH --prompts prompts.txt --reward runs/reward/model --output runs/ppo
  prudent ppo --config ppo.yaml --resume
  prudent ppo --config ppo.yaml --set update.estimator=rloo --set rollout.samples_per_prompt=4 --set kl.coef=0.02
  prudent ppo --recipe pet --model NAME_OR_PATH --data pairs.jsonl --prompts prompts.txt --output runs/pet
  prudent ppo --config ppo.yaml --gold vader --data pairs.jsonl \\
      --stop-when "kl > 20 for 3" --stop-when "foreign > 0.2 for 3 then rollback"\n""",
        (
            "model",
            "prompts",
            "reward.source",
            "output",
            "data",
            "steps",
            "gold",
            "stop_when",
            "skip_bad_rows",
            "recipe",
        ),
        (
            "kl.coef",
            "reward.aggregation",
            "update.estimator",
            "update.lr",
            "update.epochs",
            "rollout.prompts_per_step",
            "rollout.samples_per_prompt",
            "rollout.max_new_tokens",
            "policy.mode",
            "memory_budget",
        ),
        "the same command with --resume continues",
        ("resume",),
    ),
}

# first flag after `prudent bench` -> module under `prudent.bench` that parses the remaining flags
BENCHES = {"--aot": "aot", "--traffic": "traffic", "--gpu-check": "gpu_check"}
BENCH_ABOUT = """Measure the kernels. By default every op is timed against eager and torch.compile, with its share of
the machine's measured read bandwidth. One of these flags, given first, chooses another benchmark; it takes the flags
after it, --help too.

  --aot        compile every shipped Triton launch ahead of time, without a GPU: registers, spills, shared memory
  --traffic    count the bytes that the Triton kernels ask for, under the interpreter, against the minimum
  --gpu-check  on a GPU machine: time against the goals, test correctness, and write one report (see bench/gpu.sh)

examples:
  prudent bench --op ensemble_reward --size small
  prudent bench --list
  prudent bench --aot --target sm_90 --op ensemble_reward
  prudent bench --traffic
  prudent bench --gpu-check --goals-only --minutes 5 --out runs/gpu"""
