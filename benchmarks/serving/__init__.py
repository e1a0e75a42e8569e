"""Measurements of whole servers."""
