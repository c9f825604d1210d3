"""`write_report`: a page that shows how a trained model routes."""

from remoe.lab.report.page import write_report

__all__ = ["write_report"]
