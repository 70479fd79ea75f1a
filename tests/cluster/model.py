"""Write a small checkpoint folder, the same bytes on every number of ranks: model.py FOLDER."""
import sys

import mpitp

with mpitp.TensorParallelGroup(reproducible=True) as group:
    config = mpitp.DecoderConfig(vocab_size=64, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=4,
                                 num_query_groups=2, activation="silu", gated=True, normalization="rmsnorm",
                                 max_position_embeddings=64)
    mpitp.save_model(mpitp.Decoder(group, config, seed=1), sys.argv[1], family="llama")
