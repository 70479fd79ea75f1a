"""Mistakes found in published tensor-parallel code, planted in the decoder: the checks against dense must see each.

The faults are the same on every rank. Each test names what must fail.
"""
import numpy as np
import pytest

import mpitp
from check_decoder import decoder_problems
from decoder_cases import config
from mpitp.sharding import parameters
from mpitp.layers.attention import ParallelAttention
from mpitp.layers.base import ParallelLayer
from mpitp.layers.heads import AttentionCall, Heads
from mpitp.layers.mlp import ParallelMLP

pytestmark = [pytest.mark.usefixtures("several_ranks"), pytest.mark.host]     # the mistakes are made in NumPy
SIX = dict(num_layers=1, num_attention_heads=6, num_query_groups=6, kv_channels=4)
SHARED = dict(num_layers=1)                     # one key/value head of five query heads
KEY_VALUE = ("layers.0.attention.key.weight", "layers.0.attention.value.weight")


@pytest.fixture
def several_ranks(world):
    if world.size == 1:
        pytest.skip("on one rank these are not mistakes")


def seen(group, configuration, *names, without=(), **options):
    """The check must name these results on every rank, and none of `without`."""
    found = group.comm.allgather(decoder_problems(group, configuration, **options))
    for problems in found:
        assert set(names) <= set(problems) and not set(without) & set(problems), problems


def test_nothing_is_found_without_a_fault(group):
    for more in (SIX, SHARED, dict(SHARED, qk_norm=True)):
        assert decoder_problems(group, config("llama, one kv head", **more)) == []
    assert decoder_problems(group, config("bloom", num_layers=1, attention_dropout=0.5), dropout=True) == []


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_4_rank_0s_rows_on_every_rank(group, monkeypatch, part):
    if len(set(group.partition(6).lengths)) > 1:
        pytest.skip("the ranks' parts differ in size: this mistake would raise")
    right = parameters.ParameterSpec.window

    def wrong(spec, place):
        return right(spec, place._replace(rank=0) if f"attention.{part}." in spec.name else place)

    def gathered_rightly(layer, arrays=None):   # what was loaded is wrong, gradients are put together as ever
        monkeypatch.undo()
        return ParallelLayer.gather(layer, arrays)
    monkeypatch.setattr(parameters.ParameterSpec, "window", wrong)
    monkeypatch.setattr(mpitp.Decoder, "gather", gathered_rightly)
    seen(group, config("llama, one kv head", **SIX), "logits", "loss", "embedding.weight", *KEY_VALUE)


def test_6_norm_gradients_not_summed_over_the_heads(group, monkeypatch):
    right = ParallelAttention.sum_norm_gradients

    def own_blocks_alone(total):
        parts = list(total.fold.known.values()) if total.group.reproducible else [total.local_sum()]
        return sum((part for part in parts if part is not None), np.zeros(total.shape, total.dtype))

    def wrong(layer, norms, gradients):
        with monkeypatch.context() as patch:
            patch.setattr(layer.group.sum_class, "all_reduce", own_blocks_alone)
            right(layer, norms, gradients)
    monkeypatch.setattr(ParallelAttention, "sum_norm_gradients", wrong)
    several = config("llama, one kv head", qk_norm=True, num_layers=1, num_query_groups=5)
    seen(group, several, "layers.0.attention.query_norm.weight",
         "layers.0.attention.key_norm.weight", without=["logits", "embedding.weight"])


def test_7_shared_key_value_gradient_not_summed(group, monkeypatch):
    def wrong(layer, unit, dkv_of, call):
        own = [dkv_of[key] for key in dkv_of if key[1] is unit]
        return sum(own[1:], own[0]) if own else np.zeros((2, call.B, call.S, 1, layer.kv_channels), layer.dtype)
    monkeypatch.setattr(ParallelAttention, "sum_key_value", wrong)
    seen(group, config("llama, one kv head", **SHARED), "embedding.weight", *KEY_VALUE,
         without=["logits", "loss", "layers.0.attention.query.weight"])


def test_8_scaled_by_the_hidden_size(group):
    def make(*arguments, **options):
        model = mpitp.Decoder(*arguments, **options)
        for block in model.blocks:
            block.attention.scale = block.attention.hidden_size ** -0.5
        return model
    seen(group, config("llama, one kv head", **SHARED), "logits", "loss", "embedding.weight", make=make)


def test_11_every_holder_carries_the_shared_gradient_on(group, monkeypatch):
    def wrong(heads, block):
        mine = [b.index for b in heads.partition.blocks_of(heads.rank)]
        return [unit for unit in heads.held_units if min(set(unit.blocks) & set(mine)) == block.index]
    monkeypatch.setattr(Heads, "owned_units", wrong)
    monkeypatch.setattr(Heads, "rank", group.rank, raising=False)
    seen(group, config("llama, one kv head", **SHARED), "embedding.weight", "layers.0.attention_norm.weight",
         without=["logits", "loss", *KEY_VALUE])


def test_9_the_same_dropout_mask_on_every_shard(group, monkeypatch):
    right = AttentionCall.keep

    def wrong(call, heads, unit, b, first, stop):
        start = call.layer.partition.bounds[group.rank]
        return right(call, slice(heads.start - start, heads.stop - start), unit, b, first, stop)
    monkeypatch.setattr(AttentionCall, "keep", wrong)
    seen(group, config("bloom", num_layers=1, attention_dropout=0.5), "logits", "loss", dropout=True)


def test_slopes_of_the_local_heads(group):
    def make(*arguments, **options):
        model = mpitp.Decoder(*arguments, **options)
        for block in model.blocks:
            block.attention.slopes = np.roll(block.attention.slopes, block.attention.partition.bounds[group.rank])
        return model
    seen(group, config("bloom", num_layers=1), "logits", "loss", make=make)


def test_bias_twice_beside_a_parallel_residual(group, monkeypatch):
    right = ParallelMLP.add_bias

    def wrong(layer, y_ND):
        right(layer, y_ND)
        right(layer, y_ND)
    monkeypatch.setattr(ParallelMLP, "add_bias", wrong)
    seen(group, config("gpt_neox", num_layers=1), "logits")
