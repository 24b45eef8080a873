"""What an optimizer and its matrices tell about themselves."""

from singd.report.stats import stats
from singd.report.suggest import Suggestion, suggest
from singd.report.table import html_table, rows, table

__all__ = ["Suggestion", "html_table", "rows", "stats", "suggest", "table"]
