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
        """Sample responses from a real model, make preference pairs with a quarter of the labels flipped, train a
single Bradley-Terry head and a BRME ensemble on the trunk's features, let best-of-n exploit both, train the model
itself by PPO against each, and write report.html. The same command continues an interrupted run; after a finished one
it prints the table again.

examples:
  prudent demo
  prudent demo --set ppo.steps=0      # without PPO
  prudent demo --output runs/mine --prompts my_prompts.txt
  prudent demo --model meta-llama/Llama-3.2-1B-Instruct --set samples_per_prompt=8""",
        ("output", "model", "prompts", "preferences", "skip_bad_rows"),
        (
            "samples_per_prompt",
            "pairs_per_prompt",
            "held_out_prompts",
            "best_of",
            "label_noise",
            "max_new_tokens",
            "brme.num_heads",
            "ppo.steps",
            "ppo.kl_coef",
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
            "bt.bsr",
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
needed, thousands are better, to prompts like those of the policy. --scale-data measures shift, scale and std_ref of the
heads too: each head then has mean 0 and standard deviation 1 on that file (BRME, arXiv 2409.15360, appendix F). The
weights stay as they are. The model's folder is exchanged in one step, or written to --output.

examples:
  prudent calibrate --model runs/reward/model --data policy_samples.jsonl
  prudent calibrate --model runs/reward/model --data policy_samples.jsonl --aggregation trust:1
  prudent calibrate --model my/one-head-reward --data samples.jsonl --scale-data hh.jsonl --output runs/calibrated""",
        ("model", "data", "output", "scale_data", "aggregation", "skip_bad_rows"),
        ("directions", "shrinkage", "limit", "features", "max_length", "batch_tokens", "append_eos"),
        "the same command starts over (with --set features=FOLDER it keeps the features)",
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

STUDIES = {
    "toy": Job(
        "study.toy",
        "ToyConfig",
        "run_toy",
        "BRME's toy: does PPO on a pessimistic reward find the optimal actor?",
        """BRME's toy of 8 prompts and 8 responses (arXiv 2409.15360, section 4, figure 1). 16 preference pairs leave
most of the 64 cells without a label, and a policy trained by PPO on one reward model moves there. Three more reward
models of other seeds are the uncertainty set. Each seed repeats the whole experiment; the table says how often each
reward leads to the optimal actor. Settings that the paper does not give (widths, rates, steps) are keys, and a second
table shows how much the result depends on them. Writes toy.json, toy.md and toy.png.

examples:
  prudent study toy
  prudent study toy --seeds 100 --set sensitivity=false --output runs/toy
  prudent study toy --set reward.scale=1 --set policy.kl=0.1 --output runs/toy_other""",
        ("output", "seeds"),
        (
            "lam",
            "models",
            "sensitivity",
            "first_seed",
            "reward.scale",
            "reward.activation",
            "reward.steps",
            "reward.normalise",
            "policy.kl",
            "policy.steps",
        ),
        "the same command starts over",
    ),
    "stochastic": Job(
        "study.stochastic",
        "StochasticConfig",
        "run_stochastic",
        "lemma 1's stochastic case: what do meaningless rewards do to a good policy?",
        """BRME (arXiv 2409.15360), section 6.2 and appendix E: a reward that is the same for every response leaves the
policy unchanged, a random one hurts it, and the minimum of five random ones hurts it less. Policies that solve the toy
are trained on each reward, with several optimisers; the study measures over many seeds how well they still solve it.
Writes stochastic.json, stochastic.md and stochastic.png.

examples:
  prudent study stochastic
  prudent study stochastic --seeds 400 --set steps=400 --output runs/stochastic""",
        ("output", "seeds"),
        ("heads", "steps", "samples", "epochs", "clip", "start", "adam_lr", "sgd_lr", "kl", "first_seed"),
        "the same command starts over",
    ),
    "learning": Job(
        "study.learning",
        "LearningConfig",
        "run_learning",
        "PPO on a small language model: gold against proxy reward for every lambda, the single head, and PET",
        """A language model's own samples, ordered by VADER with a quarter of the labels flipped, train a single head, a
BRME ensemble, and PET on both. PPO then maximises each of them, and VADER scores the result. Each reward, seed and KL
coefficient has a PPO run of its own, several at a time; finished runs are not repeated.
Writes learning.json, learning.md and learning.png; runs/ holds every run with its own report.

examples:
  prudent study learning --model path/to/stories260k
  prudent study learning --model path/to/model --set kl=[0] --set seeds=1 --output runs/quick""",
        ("model", "output", "seeds"),
        (
            "kl",
            "lambdas",
            "pet_lambda",
            "processes",
            "rewards.prompts",
            "rewards.samples_per_prompt",
            "rewards.label_noise",
            "ppo.steps",
            "ppo.estimator",
            "ppo.lr",
        ),
        "the same command continues",
    ),
    "overoptimisation": Job(
        "study.overoptimisation.study",
        "OveroptimisationConfig",
        "run_overoptimisation",
        "which reward survives best-of-n, foreign candidates and policy gradient, by several gold scorers",
        """A reference policy's responses, ordered by a gold scorer with a share of the labels flipped, train every kind
of reward on features of the frozen trunk: single heads, ensembles, BRME, PET, BSR, a posterior's lower bound, and
prices on the distance from the reference responses. Best-of-n optimises each of them over the policy's candidates and
over mixtures with foreign ones. Constants are chosen on other golds and other seeds.
Writes overoptimisation.json, overoptimisation.md and overoptimisation.png.

examples:
  prudent study overoptimisation
  prudent study overoptimisation --model path/to/stories260k --set samples.prompts=openings \\
      --set samples.held_out=128 --set samples.training=64 --set samples.max_new_tokens=20 \\
      --set samples.temperature=1.0 --set samples.top_k=0 --set samples.top_p=1.0 --set samples.dtype=float32""",
        ("model", "output", "seeds"),
        (
            "golds",
            "pairs",
            "noise",
            "views",
            "shares",
            "samples.folder",
            "samples.prompts",
            "samples.held_out",
            "samples.candidates",
            "processes",
        ),
        "the same command continues",
    ),
    "warning": Job(
        "study.overoptimisation.warning",
        "WarningConfig",
        "run_warning",
        "what warns before gold falls: distance, heads' disagreement, KL, length, ...",
        """Read the PPO runs of a folder that have a gold scorer: in some gold falls, in others it stays. Each signal of
metrics.jsonl gets a threshold from the runs with another seed (or another gold) in which gold stays; the table says for
how many falls it was crossed in time, and how many steps ahead. Writes warning.json, warning.md and warning.png.

examples:
  prudent study warning --runs runs/study/overoptimisation/policy/runs
  prudent study warning --runs runs/study/learning/runs --set hold_out=gold""",
        ("runs", "output"),
        ("window", "fall", "false_alarms", "hold_out", "resamples"),
        "the same command starts over",
    ),
}

STUDY_ABOUT = """Test claims about pessimism over many seeds. Each study writes its table, its picture and every number,
whether or not they support the claim. `prudent study STUDY --help` says more.

examples:
  prudent study toy
  prudent study stochastic
  prudent study learning --model path/to/stories260k
  prudent study overoptimisation
  prudent study warning --runs runs/study/overoptimisation/policy/runs"""

# first flag after `prudent bench` -> module under `prudent.bench` that parses the remaining flags
BENCHES = {"--aot": "aot", "--traffic": "traffic", "--gpu-check": "gpu_check"}
BENCH_ABOUT = """Measure the kernels. By default every op is timed against eager and torch.compile, with its share of
the machine's measured read bandwidth. One of these flags, given first, chooses another benchmark; it takes the flags
after it, --help too.

  --aot        compile every shipped Triton launch ahead of time, without a GPU: registers, spills, shared memory
  --traffic    count the bytes that the Triton kernels ask for, under the interpreter, against the minimum
  --gpu-check  on a GPU machine: build, test correctness, then time against the goals, and write one report

examples:
  prudent bench --op ensemble_reward --size small
  prudent bench --list
  prudent bench --aot --target sm_90 --op ensemble_reward
  prudent bench --traffic
  prudent bench --gpu-check --minutes 9 --out runs/gpu"""
