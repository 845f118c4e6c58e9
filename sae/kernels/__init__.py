"""One training step of a dictionary, in more than one way: `reference` defines it, the others must
equal it.
"""
