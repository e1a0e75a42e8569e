"""Profiles for people: what they cost, drawn as pages and figures.

`budgets` computes, `page` and its parts draw. Nothing here runs a model; what a page shows of one
comes from `hetero_sglang.profiler`.
"""

from __future__ import annotations

from hetero_sglang.report.budgets import BudgetRow, budget_rows, floor, profile_summary
from hetero_sglang.report.page import render_report

__all__ = ["BudgetRow", "budget_rows", "floor", "profile_summary", "render_report"]
