"""A recipe and a train config without mistakes, to put one in."""

GOOD_RECIPE = """
hf_assets_path = "assets/stdlib"
[model]
family = "llama3"
flavor = "debug"
[training]
seq_len = 128
global_batch_size = 4
steps = 10
[optimizer]
lr = 1e-3
[nitp]
weight = 1.0
target_layer = 2
"""
GOOD_TRAIN_CONFIG = """
[training]
local_batch_size = 4
disable_cuda_graphs = true
[activation_checkpoint]
mode = "none"
"""
