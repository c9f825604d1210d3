"""Flags of a training run of two seconds, for tests of training and of the command line."""

FLAGS = [
    "--seq-len", "32", "--batch-size", "4", "--micro-batch-size", "2", "--model.hidden-size", "32",
    "--model.num-hidden-layers", "2", "--num-experts", "4", "--device", "cpu",
]  # fmt: skip
