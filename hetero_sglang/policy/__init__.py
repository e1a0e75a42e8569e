"""Pure functions of the method: roles to tables, budgets, drift verdicts, fetch plans.

Owns no state, does no I/O, knows neither SGLang nor memd. Everything here can be
tested with a few small arrays, and the exact definitions live in ``docs/method.md``.
"""
