"""Which layer an attention with other norms of queries and keys is."""
from typing import Any

from ..attention_config import AttentionConfig
from ..comm.group import TensorParallelGroup
from .attention import ParallelAttention


def normed_attention(group: TensorParallelGroup, config: AttentionConfig, **options: Any) -> ParallelAttention:
    """Return the layer whose norms of queries and keys are those of the config.

    Parameters
    ----------
    group, config
        As ParallelAttention's.
    options
        More of its parameters.
    """
    if config.norms_of == "all heads as one":
        from .norm_over_heads import AttentionNormedOverHeads
        return AttentionNormedOverHeads(group, config, **options)
    if config.norms_of == "heads of their own":
        from .norm_by_head import AttentionNormedByHead
        return AttentionNormedByHead(group, config, **options)
    return ParallelAttention(group, config, **options)
