"""Companions of PyBreaker. Each module is loaded only when a program imports
the module, and needs `pybreaker` and the one package that the module works with."""
