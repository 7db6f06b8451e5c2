"""What goes with PyBreaker, for those who ask for it: each module is loaded when it is
imported, and needs no more than `pybreaker` and the one package that it is about."""
