"""What a decoder is: every choice of its architecture, in the field's names. No arrays, no MPI."""
from dataclasses import dataclass

from .attention_config import NORMALIZATIONS, AttentionConfig, HeadSizes, Rotary, require_rotary, require_window
from .errors import is_integer, one_of, require, require_positive
from .require_numbers import require_number, require_probability

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "relu2", "identity")         # of ops/activation.py, a test compares
POSITIONS = ("rotary", "learned", "alibi", "none")
NORM_PLACEMENTS = ("before", "after", "after_residual", "both")


@dataclass(frozen=True)
class DecoderConfig(HeadSizes):
    """A DecoderConfig is the architecture of a decoder-only transformer.

    Parameters
    ----------
    vocab_size, hidden_size, num_layers, num_attention_heads : int
        Sizes, any on any number of ranks.
    num_query_groups : int or None
        Key/value heads, which divide num_attention_heads (None: as many; 1: multi-query attention).
    kv_channels : int or None
        Features of a head (None: hidden_size / num_attention_heads).
    ffn_hidden_size : int or None
        Features of the feed-forward middle (None: 4 hidden_size).
    activation, gated : str, bool
        Of the feed-forward block, as ParallelMLP's.
    position_embedding : str
        "rotary", "learned" (added to the embedding), "alibi", or "none".
    max_position_embeddings : int or None
        Positions of a learned embedding.
    position_offset : int
        Rows of a learned embedding's table before that of position 0, which nothing uses.
    rotary : Rotary or tuple of Rotary or None
        One for all layers (None: Rotary()), or a tuple, one a layer, None for layers that rotate nothing.
    causal : bool
        A query sees no later position; else in both directions, as models that embed texts do, which generate nothing.
    sliding_window : int or tuple of int or None
        A query sees itself and the window - 1 positions before it (and behind it, unless causal); None: all; or a
        tuple, one a layer.
    attention_scale : float or None
        Of the scores (None: kv_channels^-0.5).
    attention_softcap : float or None
        c: scores are c tanh(score / c).
    qk_norm, qk_norm_after_rotary, qk_norm_over_heads : bool
        Whether each query and key head is normalised, without bias; whether after rotary instead of before it; whether
        all heads are normalised as one, which takes one more all-reduce of 2 N forward and backward.
    qk_norm_by_head, qk_norm_bias : bool
        Whether each head has weights of its own in that norm; whether that norm has a bias. As AttentionConfig's.
    normalization : str
        "layernorm" or "rmsnorm".
    norm_epsilon : float
        Of every norm.
    norm_bias : bool or None
        None: layer norms have a bias, RMS norms none.
    zero_centered_gamma : bool
        Norms multiply by 1 + w, not by w.
    norm_placement : str
        "before": x + f(norm(x)); "after": x + norm(f(x)); "both": x + norm(f(norm(x)));
        "after_residual": norm(x + f(x)).
    parallel_residual : bool
        x + attention(norm(x)) + mlp(norm(x)), one all-reduce a block; needs placement "before".
    shared_norm : bool
        Attention and feed-forward share the one norm (parallel_residual only).
    final_norm, embedding_norm : bool
        A norm before the head, after the embedding.
    qkv_bias, attention_bias, mlp_bias, head_bias : bool
        Biases of query, key and value, of attention's output projection, of the feed-forward block, of the head.
    tie_word_embeddings : bool
        The head multiplies by the embedding's weight.
    embedding_multiplier, residual_multiplier, logits_multiplier : float
        Of the embedded tokens; of each branch before it is added to x (norm_placement "before" only); of the logits.
    logits_softcap : float or None
        c: logits are c tanh(logit / c).
    hidden_dropout, attention_dropout : float
        Probabilities, of the embedding and each branch, of the attention weights.
    init_method_std : float
        Of the initial weights; output projections have init_method_std / sqrt(2 num_layers).

    Raises
    ------
    InputError
        For a choice that is not one of these, or that does not fit another.
    """
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    position_embedding: str = "rotary"
    max_position_embeddings: int | None = None
    position_offset: int = 0
    rotary: Rotary | tuple | None = None
    causal: bool = True
    sliding_window: int | tuple | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: bool = False
    qk_norm_after_rotary: bool = False
    qk_norm_over_heads: bool = False
    qk_norm_by_head: bool = False
    qk_norm_bias: bool = False
    normalization: str = "layernorm"
    norm_epsilon: float = 1e-5
    norm_bias: bool | None = None
    zero_centered_gamma: bool = False
    norm_placement: str = "before"
    parallel_residual: bool = False
    shared_norm: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    qkv_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        require_positive(vocab_size=self.vocab_size, num_layers=self.num_layers)
        self.require_sizes()
        require_positive(ffn_hidden_size=self.ffn_size)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("position_embedding", self.position_embedding, POSITIONS)
        one_of("normalization", self.normalization, NORMALIZATIONS)
        one_of("norm_placement", self.norm_placement, NORM_PLACEMENTS)
        if self.position_embedding == "learned":
            require_positive(max_position_embeddings=self.max_position_embeddings)
        require(is_integer(self.position_offset) and self.position_offset >= 0,
                f"position_offset = {self.position_offset!r}", "0 or a positive integer")
        if self.parallel_residual:
            require(self.norm_placement == "before", f"norm_placement {self.norm_placement!r} with parallel_residual",
                    "before")
        require(not (self.parallel_residual and self.qk_norm_over_heads), "qk_norm_over_heads with parallel_residual",
                "one of the two")
        require(self.parallel_residual or not self.shared_norm, "shared_norm without parallel_residual", "both")
        for name in ("rotary", "sliding_window"):
            of_layers = getattr(self, name)
            if isinstance(of_layers, (tuple, list)):
                require(len(of_layers) == self.num_layers, f"{name} of {len(of_layers)} layers", f"{self.num_layers}")
        for layer in range(self.num_layers):
            require_window(self.window(layer))
            require_rotary(self.rotary_of(layer), self.head_dim)
        require_probability("hidden_dropout", self.hidden_dropout)
        require_probability("attention_dropout", self.attention_dropout)
        require_number("norm_epsilon", self.norm_epsilon, above=0)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            require_number(name, getattr(self, name))
        require(self.residual_multiplier == 1 or self.norm_placement == "before",
                f"residual_multiplier with norm_placement {self.norm_placement!r}", "before")
        for name in ("attention_softcap", "logits_softcap"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), above=0)
        require_number("init_method_std", self.init_method_std)
        self.attention(0)                           # what fits an attention is checked there

    @property
    def ffn_size(self) -> int:
        """Return the features of the feed-forward middle."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization == "layernorm" if self.norm_bias is None else self.norm_bias

    def attention(self, layer: int) -> AttentionConfig:
        """Return the architecture of one layer's attention."""
        return AttentionConfig(
            self.hidden_size, self.num_attention_heads, self.query_groups, self.head_dim,
            causal=self.causal, sliding_window=self.window(layer), rotary=self.rotary_of(layer),
            alibi=self.position_embedding == "alibi", softcap=self.attention_softcap,
            qk_norm=self.normalization if self.qk_norm else None, qk_norm_after_rotary=self.qk_norm_after_rotary,
            qk_norm_over_heads=self.qk_norm_over_heads, qk_norm_by_head=self.qk_norm_by_head,
            qk_norm_bias=self.qk_norm_bias,
            norm_epsilon=self.norm_epsilon, zero_centered_gamma=self.zero_centered_gamma, attention_scale=self.scale,
            qkv_bias=self.qkv_bias, bias=self.attention_bias, dropout=self.attention_dropout)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the sliding window of each layer."""
        return tuple(self.window(layer) for layer in range(self.num_layers))

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, None for all positions."""
        return self.sliding_window[layer] if isinstance(self.sliding_window, (tuple, list)) else self.sliding_window

    @property
    def rotaries(self) -> tuple[Rotary | None, ...]:
        """The Rotary of each layer, None where its positions are not rotary."""
        return tuple(self.rotary_of(layer) for layer in range(self.num_layers))

    def rotary_of(self, layer: int) -> Rotary | None:
        """Return the Rotary of a layer, None where its positions are not rotary."""
        if self.position_embedding != "rotary":
            return None
        if isinstance(self.rotary, (tuple, list)):
            return self.rotary[layer]
        return Rotary() if self.rotary is None else self.rotary
