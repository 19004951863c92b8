"""A text's score does not depend on padding or on other texts of the same or an earlier batch, in every family."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad

from prudent.engine import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from prudent.engine.config import longest_in_company, max_positions, position_offset
from prudent.engine.families import length_classes

PAD, VOCAB = 1, 96
LONG = {"max_position_embeddings": 64, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": PAD}
FACTORS = [1.0, 2.0, 3.0, 4.0]
ROPES = {
    "dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, 64),
    "longrope": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 24,
                "short_factor": [1.0] * 4,
                "long_factor": [8.0, 4.0, 2.0, 1.5],
            },
            "original_max_position_embeddings": 24,
        },
        24,
    ),
}


def _sizes() -> dict[str, Any]:
    """A small value for each of the names that transformers' configurations have for sizes."""
    width = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size")
    inner = ("intermediate_size", "ffn_dim", "d_inner", "hidden_dim", "n_inner")
    layers = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts", "rotary_dim")
    eight = ("head_dim", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    sixteen = ("moe_intermediate_size", "expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank")
    length = ("max_position_embeddings", "n_positions")
    groups = ((width, 32), (inner, 48), (layers, 2), ((*heads, "n_routed_experts"), 4), (eight, 8), (sixteen, 16))
    sizes = {name: size for names, size in (*groups, (length, 64)) for name in names}
    more = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    return sizes | more | {"vocab_size": VOCAB, "sliding_window": 6, "shared_expert_intermediate_size": 16}


SIZES = _sizes()
_LATENT = (
    *("axk1", "deepseek_v3", "deepseek_v32", "esmc", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"),
    *("sarvam_mla", "youtu"),
)
_PER_LAYER = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
OWN_SIZES: dict[str, dict[str, Any]] = {  # beside SIZES; None: the family's own
    **{kind: {"num_key_value_heads": None} for kind in _LATENT},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "big_bird": {"attention_type": "original_full"},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "falcon": {"head_dim": None},
    "gemma3n_text": {**_PER_LAYER, "laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {**_PER_LAYER, "head_dim": None},
    "gpt_neo": {"num_layers": None, "num_hidden_layers": None},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 32},
    "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 1},
    "mistral4": {"num_key_value_heads": 4, "head_dim": None},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"head_dim": None, "v_head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": None},
}
SLOW = {
    "falcon_h1",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen4_exp_text",
    "zamba2",
}  # seconds each on a CPU


def text_families() -> list[str]:
    """Model types that AutoModel builds and that have a language model or a text classifier."""
    auto = transformers.models.auto.modeling_auto
    tasks = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION")
    known = {kind for task in tasks for kind in getattr(auto, f"{task}_MAPPING_NAMES")}
    return sorted((known & set(auto.MODEL_MAPPING_NAMES)) - SLOW)


def small_config(kind: str) -> Any:
    cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    default = cls()
    own = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2} | OWN_SIZES.get(kind, {})
    small = {name: size for name, size in SIZES.items() if name not in own and getattr(default, name, None) is not None}
    return cls(**small | {name: size for name, size in own.items() if size is not None})


def drawn(model: Any) -> Any:
    """Draw weights so large that a shifted position or the effect of another text shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_trunk(kind: str) -> Any:
    """A trunk of a few thousand weights; None if these sizes make none that reads only token ids."""
    try:
        config = small_config(kind)
        with torch.device("meta"):
            if sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters()) > 3e6:
                return None
        trunk = drawn(transformers.AutoModel.from_config(config))
        with torch.no_grad():
            hidden_states(trunk, tokens(1, 11))
    except Exception:  # whatever a family says of sizes that are not its own, or of inputs that it lacks
        return None
    return trunk


def hidden_states(trunk: Any, ids: Tensor) -> Tensor:
    """The trunk's own hidden states of whole rows: [B, T, D]."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
    states: Tensor = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), **options).last_hidden_state
    return states


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def beside(ids: Tensor, other: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """One sequence [1, T] padded to a longer one, with a padding id that is another token to the trunk."""
    room = other.shape[1] - ids.shape[1]
    sides = (room, 0) if left else (0, room)
    mask = torch.cat([pad(torch.ones_like(ids), sides), torch.ones_like(other)])
    return torch.cat([pad(ids, sides, value=7), other]), mask


def faults(trunk: Any) -> Iterator[str]:
    """The ways in which this trunk's features depend on padding or other texts."""
    model = EnsembleRewardModel.from_trunk(trunk, num_heads=1)
    ids, place = tokens(2, 11), 0 if model.config.pooling == "first" else -1
    ids[:, 5] = PAD  # in a text it is a token like any other to the mask, and to some families' positions not
    ones = torch.ones_like(ids)
    own = hidden_states(trunk, ids)[:, place]
    size = own.abs().max()

    def differ(one: Tensor, other: Tensor) -> bool:
        return not (one - other).abs().max() < 2e-5 * size

    if differ(model.features(ids, ones), own):
        yield "a mask of ones"
    if differ(model.features(ids), own):
        yield "no mask"
    for length in (14, 40):
        for left in (False, True):
            if differ(model.features(*beside(ids[:1], tokens(1, length, 1), left))[:1], own[:1]):
                yield f"padded {'left' if left else 'right'} to {length}"
    if differ(model.features(ids, ones), own):
        yield "after longer texts"
    longest = max_positions(trunk.config)
    if longest is not None and longest <= 128:
        try:
            model.features(tokens(1, longest), torch.ones(1, longest, dtype=torch.long))
        except (IndexError, RuntimeError):
            yield f"a sequence of {longest} tokens"


@pytest.mark.slow
@torch.no_grad()
def test_every_text_trunk_that_builds_small_reads_a_text_alike_alone_and_in_company() -> None:
    found: Counter[str] = Counter()
    wrong = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in text_families():
            trunk = small_trunk(kind)
            if trunk is None or not isinstance(getattr(trunk.config, "hidden_size", None), int):
                continue
            found[kind] += 1
            if trunk.config.is_encoder_decoder:
                continue
            what = list(faults(trunk))
            if what:
                wrong[kind] = what
    assert wrong == {}
    expected = {"bert", "gpt2", "ibert", "llama", "longformer", "mamba", "mpnet", "mra", "phi3", "qwen3", "roberta"}
    assert expected <= set(found)
    assert len(found) > 100  # 170 with transformers 5.24


def long_trunk(rope: str) -> tuple[Any, int]:
    """A trunk of that rope type, and the length at which its frequencies change."""
    name, fields, switch = ROPES[rope]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, name)(**sizes, num_attention_heads=4, **LONG, **fields)
    return drawn(transformers.AutoModel.from_config(config)), switch


@pytest.mark.filterwarnings("ignore:.*longer than the trunk's")
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_rotary_frequencies_follow_a_texts_own_length_and_not_the_longest_of_its_batch(rope: str, left: bool) -> None:
    trunk, switch = long_trunk(rope)
    model = EnsembleRewardModel.from_trunk(trunk, num_heads=2)
    lengths = (switch - 9, switch, switch + 1, switch + 7, switch + 1)
    rows = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    widest = max(lengths)
    batch = [beside(row, tokens(1, widest, 9), left) for row in rows]
    together = model.features(torch.cat([ids[:1] for ids, _ in batch]), torch.cat([mask[:1] for _, mask in batch]))
    for row, got in zip(rows, together, strict=True):
        fresh, _ = long_trunk(rope)  # one that has seen nothing longer before
        own = hidden_states(fresh, row)[0, -1]
        torch.testing.assert_close(got, own, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.features(row)[0], own, rtol=0, atol=1e-5)
    naive = hidden_states(trunk, pad(rows[0], (0, widest - lengths[0])))[0, lengths[0] - 1]
    assert (naive - together[0]).abs().max() > 1e-3  # the trunk itself does follow the longest


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_a_scorer_gives_a_text_on_either_side_of_the_switch_its_score_alone(rope: str, make_tokenizer: Any) -> None:
    trunk, switch = long_trunk(rope)
    model = EnsembleRewardModel.from_trunk(trunk, num_heads=2)
    scorer = Scorer(model, make_tokenizer(), batch_tokens=10_000, progress=False)
    items = [tokens(1, n, n)[0].tolist() for n in (switch - 20, switch - 1, min(switch + 9, 64), 64)]
    alone = [scorer.score([item]).reward[0] for item in items]
    assert scorer.score(items).reward == pytest.approx(alone, abs=1e-5)


def test_rows_share_a_pass_only_on_one_side_of_the_switch() -> None:
    lengths = [60, 70, 64, 70, 80]
    assert length_classes(long_trunk("dynamic")[0].config, lengths) == [[0, 2], [1, 3], [4]]
    assert length_classes(long_trunk("longrope")[0].config, [20, 30, 24, 25]) == [[0, 2], [1, 3]]
    assert [longest_in_company(long_trunk(rope)[0].config) for rope in ("dynamic", "longrope")] == [64, 24]
    assert longest_in_company(small_config("roberta")) == 62
    assert length_classes(small_config("fnet"), [3, 4, 3]) == [[0, 2], [1]]


@pytest.mark.parametrize("kind", ["fnet", "nystromformer", "canine", "convbert"])
@torch.no_grad()
def test_families_whose_layers_mix_in_padding_see_none(kind: str) -> None:
    assert list(faults(small_trunk(kind))) == []


@pytest.mark.parametrize(
    ("kind", "first", "longest"),
    [("roberta", 2, 62), ("mpnet", 2, 62), ("longformer", 2, 62), ("ibert", 2, 62), ("mra", 2, 64), ("bert", 0, 64)],
)
@torch.no_grad()
def test_positions_begin_where_the_family_counts_from_and_end_with_its_table(
    kind: str, first: int, longest: int
) -> None:
    trunk = small_trunk(kind)
    assert (position_offset(trunk.config), max_positions(trunk.config)) == (first, longest)
    assert list(faults(trunk)) == []
    positions = torch.arange(longest)[None] + first
    row = tokens(1, longest)
    mask = torch.ones_like(row)
    own = hidden_states(trunk, row)
    stated = trunk(input_ids=row, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(own, stated, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("big_bird", {"attention_type": "block_sparse"}, "set attention_type to original_full in its config"),
        ("ibert", {"quant_mode": True}, "it scales activations by the whole batch; set quant_mode to false"),
    ],
)
def test_a_trunk_that_must_depend_on_other_texts_is_refused_before_its_weights_are_read(
    kind: str, options: dict[str, Any], says: str, tmp_path: Any
) -> None:
    config = small_config(kind)
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"does not depend on other texts, got '{kind}': .*{says}"):
        EnsembleRewardConfig(text_config=config)
    config.save_pretrained(tmp_path)  # no weights are there
    with pytest.raises(ValueError, match=says):
        EnsembleRewardModel.from_trunk(str(tmp_path))
