"""How good the answers are: the method against full attention and against other methods."""
