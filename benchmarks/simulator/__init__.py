"""Discrete events around the server's own scheduler: the same decisions, in virtual time."""
