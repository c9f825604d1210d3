"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711) for PyTorch."""

__version__ = "0.1.0"
