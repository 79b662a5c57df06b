"""One HTML page of a run, of several runs, or of an experiment: `nl report`. First collect, then the page."""

from nested_learning.reporting.report import report, run_report

__all__ = ["report", "run_report"]
