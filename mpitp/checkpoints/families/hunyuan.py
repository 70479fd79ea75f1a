"""Hunyuan's dense models: a Llama whose query and key heads are normalised after they are rotated."""
from __future__ import annotations

from dataclasses import dataclass

from ...attention_config import Rotary
from .keys import Keys
from .llama import ATTENTION_BIAS, TENSORS
from .rope import Rope, chosen
from .tables import ABOVE_0, COMMON, Key, Table
from .windows import Windows

HUNYUAN_TENSORS = {**TENSORS, "attention.query_norm": "layers.{}.self_attn.query_layernorm",
                   "attention.key_norm": "layers.{}.self_attn.key_layernorm"}


@dataclass(frozen=True)
class Alpha(Rope):
    """Where "dynamic" scaling has an alpha, it is a larger base, once for all lengths, and nothing else."""

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary | tuple[Rotary | None, ...]:
        """Return the Rotary of all layers."""
        found = chosen(keys)
        alpha = found.number("alpha", default=None, above=0)
        if alpha is None or found.values.get("rope_type", found.values.get("type")) != "dynamic":
            return super().read(keys, head_dim, windows)
        if head_dim < 4:
            keys.fail(["head_dim"], head_dim, "at least 4, for an alpha of rotary positions")
        theta = found.number("rope_theta", default=keys.number("rope_theta", default=self.theta, above=0), above=0)
        return Rotary(base=theta * alpha ** (head_dim / (head_dim - 2)))


TABLE = Table({**COMMON, **ATTENTION_BIAS, "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)},
              dict(gated=True, normalization="rmsnorm", mlp_bias=False, qk_norm=True, qk_norm_after_rotary=True),
              rope=Alpha())

# Of the mixtures of experts that share its config.json, of images, and of tokens.
WITHOUT_EFFECT = tuple("""
    pretraining_tp eod_token_id add_classification_head class_num dense_list enable_lm_head_fp32 im_end_id im_newline_id
    im_start_id image_token_id mask_init_id max_seq_length moe_intermediate_size norm_type num_media_embeds
    org_vocab_size pad_id pool_type position_embedding_xdrope routed_scaling_factor group_limited_greedy sep_id
    text_start_id text_end_id video_end_id video_start_id use_mixed_mlp_moe use_rotary_pos_emb moe_topk
""".split())
FAMILIES = [TABLE.family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", HUNYUAN_TENSORS,
                         without_effect=WITHOUT_EFFECT,
                         refused=(("use_cla", (False,)), ("use_qk_norm", (True,)), ("mlp_bias", (False,))))]
