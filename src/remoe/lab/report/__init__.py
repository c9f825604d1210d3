"""A page in which one sees how a trained model routes: `write_report`."""

from remoe.lab.report.page import write_report

__all__ = ["write_report"]
