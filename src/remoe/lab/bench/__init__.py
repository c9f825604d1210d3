"""The benchmarks of `remoe bench`: one layer, decoding and training steps, of our and other implementations."""
