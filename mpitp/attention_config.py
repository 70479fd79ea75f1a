"""What an attention layer is: its sizes and choices, in the field's names. No arrays, no MPI."""
from dataclasses import dataclass

from .errors import is_integer, one_of, require, require_positive
from .require_numbers import require_number, require_probability

NORMALIZATIONS = ("layernorm", "rmsnorm")
SCALINGS = (None, "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) say which features of a head are rotated, and how fast.

    Pair i of `dim` / 2 turns by position * base^(-2 i / dim).

    Parameters
    ----------
    dim : int or None
        How many features of a head are rotated, an even number; the others stay. None: all.
    base : float
        Of the frequencies.
    interleaved : bool
        Pair i is features (2 i, 2 i + 1), as in GPT-J; False: (i, i + dim / 2), as in GPT-NeoX and Llama.
    scaling : str or None
        None; "linear" (positions over `factor`); "llama3" (long wavelengths over `factor`, with a ramp between
        `low_freq_factor` and `high_freq_factor`); "yarn" (arXiv 2309.00071: a ramp between `beta_slow` and `beta_fast`
        turns within `original_max_positions`; cos and sin are multiplied by `attention_factor`); "dynamic" (a larger
        base for sequences longer than `original_max_positions`, more so the longer); "longrope" (arXiv 2402.13753: each
        pair slowed by its own factor, `long_factors` for sequences longer than `original_max_positions`, else
        `short_factors`; `attention_factor` as yarn's).
    factor : float
        Of the scaling.
    original_max_positions : int or None
        Positions that the model was trained on; all but linear need it.
    low_freq_factor, high_freq_factor : float
        The ramp of llama3.
    beta_fast, beta_slow : float
        The ramp of yarn.
    attention_factor : float or None
        Of yarn, None: 0.1 ln(factor) + 1; of longrope, None: sqrt(1 + ln(factor) / ln(original_max_positions)).
    truncate : bool
        Whether yarn rounds the ends of its ramp to whole pairs.
    short_factors, long_factors : tuple of float or None
        Of longrope, one for each pair.

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
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require(self.dim is None or is_integer(self.dim) and self.dim > 0 and self.dim % 2 == 0,
                f"rotary dim {self.dim!r}", "a positive even number, or None for the whole head")
        require_number("rotary base", self.base, above=0)
        require_number("rotary factor", self.factor, above=0)
        require(self.scaling in SCALINGS, f"rotary scaling {self.scaling!r}", f"one of {', '.join(map(str, SCALINGS))}")
        if self.scaling not in (None, "linear"):
            require_positive(original_max_positions=self.original_max_positions)
        if self.scaling == "llama3":
            require(self.low_freq_factor < self.high_freq_factor, f"low_freq_factor = {self.low_freq_factor!r}",
                    f"less than high_freq_factor = {self.high_freq_factor!r}")
        if self.scaling == "yarn":
            require(self.base != 1, "rotary base = 1", "another one for yarn, whose ramp is over its powers")
        if self.scaling == "longrope":
            for name in ("short_factors", "long_factors"):
                found = getattr(self, name)
                require(isinstance(found, tuple) and found, f"{name} {found!r}", "a tuple of numbers, one a pair")
                for number in found:
                    require_number(name, number, above=0)
            require(self.original_max_positions != 1 or self.attention_factor is not None,
                    "original_max_positions = 1", "more for longrope, or an attention_factor")

    @property
    def longest(self) -> int | None:
        """The length up to which all sequences have the same frequencies; None: any."""
        return self.original_max_positions if self.scaling in ("dynamic", "longrope") else None


class HeadSizes:
    """Mixin of the configs that have attention heads: their sizes, with every default filled in."""
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None
    kv_channels: int | None
    attention_scale: float | None

    @property
    def query_groups(self) -> int:
        """Return the number of key/value heads, G."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Return the features of a head, K."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def scale(self) -> float:
        """Return the factor of the scores."""
        return self.head_dim ** -0.5 if self.attention_scale is None else self.attention_scale

    def require_sizes(self) -> None:
        """Raise InputError unless the sizes are positive and fit each other."""
        require_positive(hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
                         num_query_groups=self.query_groups)
        require(self.num_attention_heads % self.query_groups == 0,
                f"num_query_groups = {self.query_groups} key/value heads for {self.num_attention_heads} query heads",
                "a divisor of num_attention_heads")
        if self.kv_channels is None:
            require(self.hidden_size % self.num_attention_heads == 0,
                    f"num_attention_heads = {self.num_attention_heads} with hidden_size = {self.hidden_size}",
                    "a divisor of it, or kv_channels, the features of a head")
        require_positive(kv_channels=self.head_dim)
        require_number("attention_scale", self.scale)


@dataclass(frozen=True)
class AttentionConfig(HeadSizes):
    """An AttentionConfig is the architecture of one self-attention layer.

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
        A query sees itself and the window - 1 positions before it, and behind it unless causal. None: all.
    rotary : Rotary or None
        Rotary positions.
    alibi : bool
        Scores have slope_h (key - query position) added, the slopes of the global head (arXiv 2108.12409).
    softcap : float or None
        c: scores are c tanh(score / c), before ALiBi is added (arXiv 2408.00118).
    qk_norm : str or None
        "layernorm" or "rmsnorm" over each query and key head, without bias; None: no norm.
    qk_norm_by_head, qk_norm_bias : bool
        Whether each head has weights of its own in that norm, split as the heads are; whether it has a bias, of all
        heads ("layernorm" only). One of the two, and before rotary only.
    qk_norm_after_rotary, qk_norm_over_heads : bool
        Whether that norm comes after rotary, not before; whether it is one over the features of all heads ("rmsnorm"
        before rotary only), whose weights are split as the heads are.
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
    softcap: float | None = None
    qk_norm: str | None = None
    qk_norm_by_head: bool = False
    qk_norm_bias: bool = False
    qk_norm_after_rotary: bool = False
    qk_norm_over_heads: bool = False
    norm_epsilon: float = 1e-5
    zero_centered_gamma: bool = False
    attention_scale: float | None = None
    qkv_bias: bool = True
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_sizes()
        require_window(self.sliding_window)
        require_rotary(self.rotary, self.head_dim)
        if self.qk_norm is not None:
            one_of("qk_norm", self.qk_norm, NORMALIZATIONS)
        require(not self.qk_norm_over_heads or self.qk_norm == "rmsnorm" and not self.qk_norm_after_rotary,
                f"qk_norm_over_heads with qk_norm {self.qk_norm!r}"
                f"{' after rotary' if self.qk_norm_after_rotary else ''}", "'rmsnorm', before rotary")
        flags = [name for name in ("qk_norm_by_head", "qk_norm_bias", "qk_norm_over_heads", "qk_norm_after_rotary")
                 if getattr(self, name)]
        require(len(flags) < 2, " with ".join(flags), "one of them")
        for name, kinds in (("qk_norm_by_head", NORMALIZATIONS), ("qk_norm_bias", ("layernorm",))):
            require(name not in flags or self.qk_norm in kinds, f"{name} with qk_norm {self.qk_norm!r}",
                    " or ".join(map(repr, kinds)))
        require_number("norm_epsilon", self.norm_epsilon, above=0)
        if self.softcap is not None:
            require_number("softcap", self.softcap, above=0)
        require_probability("dropout", self.dropout)

    @property
    def norms_of(self) -> str:
        """Say what the norms of queries and keys are over, and whose their weights are."""
        if self.qk_norm and self.qk_norm_over_heads:
            return "all heads as one"
        return "heads of their own" if self.qk_norm and (self.qk_norm_by_head or self.qk_norm_bias) else "any head"


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
    require(rotary.scaling != "dynamic" or dim > 2, f"rotary dim {dim} with dynamic scaling", "at least 4")
    for name in ("short_factors", "long_factors") if rotary.scaling == "longrope" else ():
        count = len(getattr(rotary, name))
        require(count == dim // 2, f"{count} {name}", f"{dim // 2}, one for each pair of features")
