"""The subcommands of `prudent study`."""

from __future__ import annotations

from .commands import Job

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
            "policy_gradient.steps",
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
