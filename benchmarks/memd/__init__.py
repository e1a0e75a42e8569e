"""How fast memd is, against what the machine can do in the same run."""
