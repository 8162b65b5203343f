"""What a run found out: the schema of report.json, the console's table, the page, and comparisons of runs."""

from optpipe.report.schema import (
    Attempt,
    BudgetReport,
    Callers,
    Check,
    Final,
    Finding,
    Group,
    Latency,
    Measurement,
    NotMeasured,
    Operator,
    Quality,
    Report,
    Roofline,
    StageResult,
    Sustained,
    Table,
    Verdict,
)

__all__ = [
    "Attempt", "BudgetReport", "Callers", "Check", "Final", "Finding", "Group", "Latency", "Measurement", "NotMeasured",
    "Operator", "Quality", "Report", "Roofline", "StageResult", "Sustained", "Table", "Verdict",
]  # fmt: skip
