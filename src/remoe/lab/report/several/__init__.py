"""`write_comparison`: a page that shows how several models route one text."""

from remoe.lab.report.several.page import MOST_MODELS, write_comparison

__all__ = ["MOST_MODELS", "write_comparison"]
