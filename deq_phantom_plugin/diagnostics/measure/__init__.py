"""Measures gradients, as numbers without words. The folder `show` makes words and figures."""
