"""The subcommands of `prudent`: what each runs, which flags it has, what its --help teaches."""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """A command line flag that sets the config key `key`; of type bool it takes no value and means true, of type list
    it may be given several times."""

    name: str
    key: str
    help: str
    type: type = str


class Job(NamedTuple):
    """A subcommand: the module under `prudent.rlhf`, its config class and its function, and what --help teaches."""

    module: str
    config: str
    run: str
    summary: str
    about: str
    flags: tuple[Flag, ...]
    again: str  # what to do after an interrupt
    options: tuple[str, ...] = ()  # switches of the call itself, which no config file can hold


OPTIONS = {
    "resume": "go on where an interrupted run of the same output stopped",
    "overwrite": "replace the output of an earlier run",
}
SKIP_BAD_ROWS = "count broken lines and go on, instead of stopping at the first"
AGGREGATION = "how K heads become one reward, e.g. tradeoff:0.4, min, mean, lcb:1, uwo:0.5 (default: the model's own)"
BATCH_TOKENS = "tokens in one forward pass, padding included"

JOBS = {
    "demo": Job(
        "demo.demo",
        "DemoConfig",
        "run_demo",
        "the whole path on an embedded model, with a report",
        """Sample responses from a real model, make preference pairs with a quarter of the labels flipped, train a
single Bradley-Terry head and a BRME ensemble on the trunk's features, let best-of-n exploit both, train the model
itself by PPO against each, write report.html. Interrupted, the same command goes on where it was; finished, it prints
its table again.

examples:
  prudent demo
  prudent demo --set ppo.steps=0      # without PPO
  prudent demo --output runs/mine --prompts my_prompts.txt
  prudent demo --model meta-llama/Llama-3.2-1B-Instruct --set samples_per_prompt=8""",
        (
            Flag("--output", "output", "run folder (default runs/demo)"),
            Flag("--model", "model", "local folder or hub name (default: SmolLM2-135M-Instruct from its wheel)"),
            Flag("--prompts", "prompts", "file with one prompt a line (default: ours, a few hundred)"),
            Flag("--preferences", "preferences", "real preference pairs instead of the gold scorer's"),
        ),
        "the same command goes on where it was",
    ),
    "train": Job(
        "reward.train",
        "TrainConfig",
        "run_train",
        "a reward ensemble from preference pairs",
        """Stage 1, a Bradley-Terry head; stage 2, K Gaussian heads (BRME, arXiv 2409.15360 eq. 8). On the CPU the trunk
stays frozen and its features are computed once; --set mode=lora or mode=full train it too. --stage pet (PET, arXiv
2505.20556) makes the stage-1 head, this run's ensemble (pet.start=brme) or a reward model that you have (pet.start=DIR)
pessimistic against the best of n samples of MODEL, for policies trained without KL.

Data: JSON lines, Parquet or the name of a Hugging Face data set (NAME:SPLIT for another split than train), with
{prompt, chosen, rejected}; {chosen, rejected} that share their beginning; lists of messages; an optional margin; or
several responses with scores. Prompt and response texts become a user's and an assistant's message where the tokeniser
has a chat template; without one they are joined as they are, so end the prompt with the blank it needs.

examples:
  prudent train --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --output runs/reward
  prudent train --config train.yaml --set brme.num_heads=7 --set bt.bsr=0.001
  prudent train --config train.yaml --resume
  prudent train --stage pet --model my/policy --data pairs.jsonl --output runs/pet --set pet.max_new_tokens=256
  prudent train --model my/one-head-reward --stage1 my/one-head-reward --data pairs.jsonl --output runs/reward""",
        (
            Flag("--model", "model", "trunk: local folder or hub name"),
            Flag("--data", "data", "file or data set name of preference pairs"),
            Flag("--output", "output", "run folder"),
            Flag("--stage", "stage", "the last stage: bt, brme (default), or pet"),
            Flag(
                "--stage1",
                "stage1",
                "an existing one-head reward model instead of training stage 1 (then also --model)",
            ),
            Flag("--skip-bad-rows", "skip_bad_rows", SKIP_BAD_ROWS, bool),
        ),
        "the same command with --resume goes on where it was",
        ("resume",),
    ),
    "score": Job(
        "evaluation.score",
        "ScoreConfig",
        "run_score",
        "rewards for every line of a file",
        """JSON lines in, the same lines out with reward, nominal, worst, and every head's mean and std. A line holds
prompt and response, or messages, or a pair (chosen, rejected). Order is kept; memory does not grow with the file.

examples:
  prudent score --model runs/reward/model --data responses.jsonl --output scored.jsonl
  prudent score --model runs/reward/model --data responses.jsonl --output scored.jsonl --aggregation lcb:1 --resume
  cat responses.jsonl | prudent score --model runs/reward/model --data - --output - > scored.jsonl""",
        (
            Flag("--model", "model", "an EnsembleRewardModel: local folder or hub name"),
            Flag("--data", "data", "JSON lines to score; - for standard input"),
            Flag("--output", "output", "JSON lines to write; - for standard output"),
            Flag("--aggregation", "aggregation", AGGREGATION),
            Flag("--batch-tokens", "batch_tokens", BATCH_TOKENS, int),
            Flag("--skip-bad-rows", "skip_bad_rows", SKIP_BAD_ROWS, bool),
        ),
        "the same command with --resume goes on where it was (from a file, not from standard input)",
        ("resume", "overwrite"),
    ),
    "eval": Job(
        "evaluation.evaluate",
        "EvalConfig",
        "run_eval",
        "how good a reward model is on held-out pairs",
        """Accuracy with a bootstrap interval for nominal, mean, worst, trade-off and each head; normalised margins,
coverage, std against error, agreement of the heads, dispersion of the features. Writes eval.json and pictures.

examples:
  prudent eval --model runs/reward/model --data held_out.jsonl --output runs/reward/eval
  prudent eval --model runs/reward/model --data pairs.jsonl --output runs/reward/eval \\
      --set compare=runs/reward/stage1 --set eval_fraction=0.1      # the prompts that training held out""",
        (
            Flag("--model", "model", "an EnsembleRewardModel: local folder or hub name"),
            Flag("--data", "data", "file or data set name of preference pairs"),
            Flag("--output", "output", "folder for eval.json and the pictures"),
            Flag("--aggregation", "aggregation", AGGREGATION),
            Flag("--batch-tokens", "batch_tokens", BATCH_TOKENS, int),
            Flag("--skip-bad-rows", "skip_bad_rows", SKIP_BAD_ROWS, bool),
        ),
        "the same command starts over (with --set features=FOLDER the features are kept)",
    ),
    "plan": Job(
        "plan.plan",
        "PlanConfig",
        "run_plan",
        "what a PPO run takes on a card, without weights or a GPU",
        """Memory of each phase of `prudent ppo` (rollout, scoring, update) by term, the largest micro-batch
that fits, and where none does the settings that help. --model is a built-in shape (llama3-8b, qwen2.5-14b, ...), a
config.json, a model's folder or a hub name; the keys are those of `prudent ppo`, and its YAML file is read as it is.
--verify runs the loop itself on tensors without data, which takes minutes for a large model, and exits with 1 if a
phase's tracked peak is not within 10 % of the plan.

examples:
  prudent plan --model llama3-8b --gpu 40GB --set rollout.max_new_tokens=512
  prudent plan --model qwen2.5-14b --gpu 80GB --set policy.gradient_checkpointing=true --verify
  prudent plan --config ppo.yaml --gpu 24GB""",
        (
            Flag("--model", "model", "built-in shape, config.json, local folder or hub name"),
            Flag("--gpu", "gpu", "memory of the card, e.g. 80GB (10^9) or 80GiB (2^30) (default 80GB)"),
            Flag("--verify", "verify", "also run the loop on tensors without data, and compare", bool),
        ),
        "the same command starts over",
    ),
    "ppo": Job(
        "ppo.pet_recipe",  # hands on to ppo.loop, but for --recipe pet
        "PPOConfig",
        "run_recipe",
        "a policy trained against a reward, and watched for hacking",
        """One trunk for policy, reference, critic and reward: LoRA on (policy), off (reference), a value head, and the
ensemble's heads where they fit the trunk. Every step logs reward, KL, length and how much the heads disagree; --gold
puts a second judge beside the reward; --stop-when ends the run, or rolls it back, when a number moves. The run folder
holds the policy, metrics.jsonl, TensorBoard files, samples and report.html.

A reward is a folder of `prudent train`, any sequence classifier, a function (MODULE:FUNCTION or FILE.py:FUNCTION,
called with prompts and responses) or a URL. Prompts: one a line, or JSON lines, Parquet or a data set with `prompt`.
--recipe pet trains the reward as well: Bradley-Terry on --data, PET against best-of-n of the model's own samples, then
best-of-n and PPO on it without KL.

examples:
  prudent ppo --model NAME_OR_PATH --prompts prompts.txt --reward runs/reward/model --output runs/ppo
  prudent ppo --config ppo.yaml --resume
  prudent ppo --config ppo.yaml --set update.estimator=rloo --set rollout.samples_per_prompt=4 --set kl.coef=0.02
  prudent ppo --recipe pet --model NAME_OR_PATH --data pairs.jsonl --prompts prompts.txt --output runs/pet
  prudent ppo --config ppo.yaml --gold vader --data pairs.jsonl \\
      --stop-when "kl > 20 for 3" --stop-when "disagreement > 3x for 5 then rollback" """,
        (
            Flag("--model", "model", "the policy, a causal language model: local folder or hub name"),
            Flag("--prompts", "prompts", "file or data set of prompts"),
            Flag("--reward", "reward.source", "reward model, function or URL"),
            Flag("--output", "output", "run folder"),
            Flag("--data", "data", "preference pairs: what the heads' doubt about samples is compared with"),
            Flag("--steps", "steps", "steps of the loop (default 100)", int),
            Flag("--gold", "gold", "vader or MODULE:FUNCTION: watched, never trained on"),
            Flag("--stop-when", "stop_when", 'rule that ends the run, e.g. "kl > 20 for 3"; repeatable', list),
            Flag("--recipe", "recipe", "pet: make the reward pessimistic first (needs --data), then PPO without KL"),
        ),
        "the same command with --resume goes on where it was",
        ("resume",),
    ),
}

# `prudent study NAME`: what was claimed, tried on this machine
STUDIES = {
    "toy": Job(
        "study.toy",
        "ToyConfig",
        "run_toy",
        "BRME's toy of 8 prompts and 8 responses: does a pessimistic reward lead PPO to the optimal actor?",
        """BRME's toy (arXiv 2409.15360, section 4, figure 1). 16 preference pairs leave most of the 64 cells
without a label, and a policy trained by PPO on one reward model goes there. Three more reward models of other seeds are
the uncertainty set. Every seed repeats the whole of it; prints how often each reward leads to the optimal actor. What
the paper leaves open (widths, rates, steps) is a key, and the table of settings shows what hangs on it.
Writes toy.json, toy.md and toy.png.

examples:
  prudent study toy
  prudent study toy --seeds 100 --set sensitivity=false --output runs/toy
  prudent study toy --set reward.scale=1 --set policy.kl=0.1 --output runs/toy_other""",
        (
            Flag("--output", "output", "folder for the results (default runs/study/toy)"),
            Flag("--seeds", "seeds", "independent repetitions (default 20)", int),
        ),
        "the same command starts over",
    ),
    "stochastic": Job(
        "study.stochastic",
        "StochasticConfig",
        "run_stochastic",
        "lemma 1's stochastic case: what rewards that mean nothing do to a good policy",
        """BRME (arXiv 2409.15360) 6.2 and appendix E: a reward that is the same for every response leaves the policy
alone; one drawn at random hurts; the least of five draws hurts less. Policies that solve the toy are trained on each,
with several optimisers, and what is left of them is measured over many seeds.
Writes stochastic.json, stochastic.md and stochastic.png.

examples:
  prudent study stochastic
  prudent study stochastic --seeds 400 --set steps=400 --output runs/stochastic""",
        (
            Flag("--output", "output", "folder for the results (default runs/study/stochastic)"),
            Flag("--seeds", "seeds", "independent repetitions (default 100)", int),
        ),
        "the same command starts over",
    ),
    "learning": Job(
        "study.learning",
        "LearningConfig",
        "run_learning",
        "PPO on a small language model: gold beside proxy for every lambda, the single head, and PET",
        """A language model's own samples, ordered by VADER with a quarter of the labels flipped, train a single head, a
BRME ensemble, and PET on both; PPO then maximises each of them, and VADER says what that was worth. One PPO run a
reward, seed and KL coefficient, several at a time; a run that is finished is not done again.
Writes learning.json, learning.md and learning.png; runs/ holds every run with its own report.

examples:
  prudent study learning --model path/to/stories260k
  prudent study learning --model path/to/model --set kl=[0] --set seeds=1 --output runs/quick""",
        (
            Flag("--model", "model", "a small causal language model: local folder or hub name"),
            Flag("--output", "output", "folder for results and runs (default runs/study/learning)"),
            Flag("--seeds", "seeds", "repetitions, each with its own samples, labels and heads (default 3)", int),
        ),
        "the same command goes on where it was",
    ),
}

STUDY_ABOUT = """Claims about pessimism, tried out over many seeds: each study writes its table, its picture and every
number, whatever they say. `prudent study STUDY --help` teaches the rest.

examples:
  prudent study toy
  prudent study stochastic
  prudent study learning --model path/to/stories260k"""

# flag that comes first -> the module under `prudent.bench` that takes the rest
BENCHES = {"--aot": "aot", "--traffic": "traffic", "--gpu-check": "gpu_check"}
BENCH_ABOUT = """What the kernels are held to. Without one of these flags first: every op timed against eager and
torch.compile, with its share of the machine's measured read bandwidth. What follows is passed on, --help too.

  --aot        every shipped Triton launch compiled ahead of time, with no GPU: registers, spills, shared memory
  --traffic    the bytes that the Triton kernels ask for, counted under the interpreter, against the floor
  --gpu-check  on a GPU machine: build, correctness first, then times against the goals, into one report

examples:
  prudent bench --op ensemble_reward --size small
  prudent bench --list
  prudent bench --aot --target sm_90 --op ensemble_reward
  prudent bench --traffic
  prudent bench --gpu-check --minutes 9 --out runs/gpu"""
