"""What an attention layer and a decoder are: every choice of architecture, in the field's names. No arrays, no MPI."""
from dataclasses import dataclass

from .errors import is_integer, one_of, require, require_number, require_positive, require_probability

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "identity")         # of ops/activation.py, a test compares
POSITIONS = ("rotary", "learned", "alibi", "none")
NORMALIZATIONS = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("before", "after", "after_residual", "both")
SCALINGS = (None, "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) say which features of a head are rotated, and how fast.

    Pair i of `dim` / 2 turns by position * base^(-2 i / dim).

    Parameters
    ----------
    dim : int or None
        How many features of a head turn, even; the others stay. None: all.
    base : float
        Of the frequencies.
    interleaved : bool
        Pair i is features (2 i, 2 i + 1), as in GPT-J; False: (i, i + dim / 2), as in GPT-NeoX and Llama.
    scaling : str or None
        None; "linear" (positions over `factor`); "llama3" (long wavelengths over `factor`, with a ramp between
        `low_freq_factor` and `high_freq_factor`); "yarn" (arXiv 2309.00071: a ramp between `beta_slow` and `beta_fast`
        turns within `original_max_positions`; cos and sin are multiplied by `attention_factor`).
    factor : float
        Of the scaling.
    original_max_positions : int or None
        Positions that the model was trained on; llama3 and yarn need it.
    low_freq_factor, high_freq_factor : float
        The ramp of llama3.
    beta_fast, beta_slow : float
        The ramp of yarn.
    attention_factor : float or None
        Of yarn; None: 0.1 ln(factor) + 1.
    truncate : bool
        Whether yarn rounds the ends of its ramp to whole pairs.

    Raises
    ------
    InputError
        For a choice that is not one of these.
    """
    dim: int | None = None
    base: float = 10000.0
    interleaved: bool = False
    scaling: str | None = None
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.dim is None or is_integer(self.dim) and self.dim > 0 and self.dim % 2 == 0,
                f"rotary dim {self.dim!r}", "a positive even number, or None for the whole head")
        require_number("rotary base", self.base, above=0)
        require_number("rotary factor", self.factor, above=0)
        require(self.scaling in SCALINGS, f"rotary scaling {self.scaling!r}", f"one of {', '.join(map(str, SCALINGS))}")
        if self.scaling in ("llama3", "yarn"):
            require_positive(original_max_positions=self.original_max_positions)
        if self.scaling == "llama3":
            require(self.low_freq_factor < self.high_freq_factor, f"low_freq_factor = {self.low_freq_factor!r}",
                    f"less than high_freq_factor = {self.high_freq_factor!r}")
        if self.scaling == "yarn":
            require(self.base != 1, "rotary base = 1", "another one for yarn, whose ramp is over its powers")


@dataclass(frozen=True)
class AttentionConfig:
    """The architecture of one self-attention layer.

    Parameters
    ----------
    hidden_size, num_attention_heads : int
        D and H, any on any number of ranks; ranks without a head are normal.
    num_query_groups : int or None
        Key/value heads G, a divisor of H. None: H (multi-head); 1: multi-query; between: grouped-query attention.
    kv_channels : int or None
        Features of a head, K. None: D / H.
    causal : bool
        A query sees no later position.
    sliding_window : int or None
        A query sees itself and the window - 1 positions before it. None: all.
    rotary : Rotary or None
        Rotary positions.
    alibi : bool
        Scores have slope_h (key - query position) added, the slopes of the global head (arXiv 2108.12409).
    qk_norm : str or None
        "layernorm" or "rmsnorm" over each query and key head, before rotary, without bias; None: no norm.
    norm_epsilon, zero_centered_gamma : float, bool
        Of that norm.
    attention_scale : float or None
        Of the scores. None: K^-0.5.
    qkv_bias, bias : bool
        Biases of query, key and value, and of the output projection.
    dropout : float
        Probability, of the attention weights.

    Raises
    ------
    InputError
        For a choice that is not one of these, or that does not fit another.
    """
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    causal: bool = True
    sliding_window: int | None = None
    rotary: Rotary | None = None
    alibi: bool = False
    qk_norm: str | None = None
    norm_epsilon: float = 1e-5
    zero_centered_gamma: bool = False
    attention_scale: float | None = None
    qkv_bias: bool = True
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(hidden_size=self.hidden_size)
        require_heads(self.num_attention_heads, self.query_groups)
        if self.kv_channels is None:
            require(self.hidden_size % self.num_attention_heads == 0,
                    f"{self.num_attention_heads} heads of hidden_size {self.hidden_size}",
                    "a divisor of it, or kv_channels, the features of a head")
        require_positive(kv_channels=self.head_dim)
        require_window(self.sliding_window)
        require_rotary(self.rotary, self.head_dim)
        if self.qk_norm is not None:
            one_of("qk_norm", self.qk_norm, NORMALIZATIONS)
        require_number("norm_epsilon", self.norm_epsilon, above=0)
        require_probability("dropout", self.dropout)

    @property
    def query_groups(self) -> int:
        """Key/value heads, G."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Features of a head, K."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.head_dim ** -0.5 if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder-only transformer.

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
    rotary : Rotary or tuple of Rotary or None
        One for all layers, or one for each (None: Rotary()).
    sliding_window : int or tuple of int or None
        A query sees itself and the window - 1 positions before it; None: all; or a tuple, one a layer.
    attention_scale : float or None
        Of the scores (None: kv_channels^-0.5).
    qk_norm : bool
        Whether each query and key head is normalised (before rotary), without bias.
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
    embedding_multiplier : float
        Of the embedded tokens.
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
    rotary: Rotary | tuple | None = None
    sliding_window: int | tuple | None = None
    attention_scale: float | None = None
    qk_norm: bool = False
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
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        require_positive(vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_layers=self.num_layers,
                         num_attention_heads=self.num_attention_heads)
        require_heads(self.num_attention_heads, self.query_groups)
        if self.kv_channels is None:
            require(self.hidden_size % self.num_attention_heads == 0,
                    f"num_attention_heads = {self.num_attention_heads} with hidden_size = {self.hidden_size}",
                    "a divisor of it, or kv_channels, the features of a head")
        require_positive(kv_channels=self.head_dim, ffn_hidden_size=self.ffn_size)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("position_embedding", self.position_embedding, POSITIONS)
        one_of("normalization", self.normalization, NORMALIZATIONS)
        one_of("norm_placement", self.norm_placement, NORM_PLACEMENTS)
        if self.position_embedding == "learned":
            require_positive(max_position_embeddings=self.max_position_embeddings)
        if self.parallel_residual:
            require(self.norm_placement == "before", f"norm_placement {self.norm_placement!r} with parallel_residual",
                    "before")
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
        require_number("embedding_multiplier", self.embedding_multiplier)
        require_number("attention_scale", self.scale)
        require_number("init_method_std", self.init_method_std)

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def ffn_size(self) -> int:
        """Features of the feed-forward middle."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.head_dim ** -0.5 if self.attention_scale is None else self.attention_scale

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization == "layernorm" if self.norm_bias is None else self.norm_bias

    def attention(self, layer: int) -> AttentionConfig:
        """Return the architecture of one layer's attention."""
        return AttentionConfig(
            self.hidden_size, self.num_attention_heads, self.query_groups, self.head_dim,
            sliding_window=self.window(layer), rotary=self.rotary_of(layer),
            alibi=self.position_embedding == "alibi", qk_norm=self.normalization if self.qk_norm else None,
            norm_epsilon=self.norm_epsilon, zero_centered_gamma=self.zero_centered_gamma, attention_scale=self.scale,
            qkv_bias=self.qkv_bias, bias=self.attention_bias, dropout=self.attention_dropout)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, None for all positions."""
        return self.sliding_window[layer] if isinstance(self.sliding_window, (tuple, list)) else self.sliding_window

    def rotary_of(self, layer: int) -> Rotary | None:
        """Return the Rotary of a layer, None where positions are not rotary."""
        if self.position_embedding != "rotary":
            return None
        found = self.rotary[layer] if isinstance(self.rotary, (tuple, list)) else self.rotary
        return Rotary() if found is None else found


def require_heads(num_attention_heads: int, num_query_groups: int) -> None:
    """Raise InputError unless every key/value head serves the same number of query heads."""
    require_positive(num_attention_heads=num_attention_heads, num_query_groups=num_query_groups)
    require(num_attention_heads % num_query_groups == 0,
            f"num_query_groups = {num_query_groups} key/value heads for {num_attention_heads} query heads",
            "a divisor of num_attention_heads")


def require_window(window: int | None) -> None:
    """Raise InputError unless window is None or a positive integer."""
    require(window is None or is_integer(window) and window > 0, f"sliding_window {window!r}",
            "a positive integer, or None")


def require_rotary(rotary: Rotary | None, head_dim: int) -> None:
    """Raise InputError unless rotary is None, or a Rotary that fits heads of head_dim features."""
    if rotary is None:
        return
    require(isinstance(rotary, Rotary), f"rotary {rotary!r}", "a Rotary, or None")
    dim = head_dim if rotary.dim is None else rotary.dim
    require(dim % 2 == 0 and dim <= head_dim, f"rotary dim {dim}",
            f"an even number up to {head_dim}, the features of a head")
