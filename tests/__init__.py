"""Tests; `tests.simulation` is a library that several of them share."""
