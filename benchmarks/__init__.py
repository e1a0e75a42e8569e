"""Measurements. Each one first checks that what it times gives the right result."""
