"""Benchmarks behind `remoe bench`: one layer, decoding, a training step; with other implementations beside ours."""
