"""Tests against real SGLang servers, started as a user would start them."""
