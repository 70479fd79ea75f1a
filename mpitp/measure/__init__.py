"""What `bench` and the benchmarks time, and how: cases, each a function without arguments, in dicts by name.

"forward" is forward alone, "forward+backward" is both, with gradients in the same buffers again and again.
"""
from .block import BLOCK_HEADS, block_cases, block_config, block_data, block_flops, block_product_cases, tile_of
from .decode import decode_cases, matrix_vector_products, prefill_products
from .feed_forward import flops, mlp_cases, product_cases, read_case
from .links import Link, exchange_case, latency_and_rate, links
from .rounds import Case, Timing, finished, interleave, ratio, timing

__all__ = ["BLOCK_HEADS", "Case", "Link", "Timing", "block_cases", "block_config", "block_data", "block_flops",
           "block_product_cases", "decode_cases", "exchange_case", "finished", "flops", "interleave",
           "latency_and_rate", "links", "matrix_vector_products", "mlp_cases", "prefill_products", "product_cases",
           "ratio", "read_case", "tile_of", "timing"]
