"""What is written to disk: the recipe of a picture, the PNG that carries it, and files that are whole or absent.

Nothing is imported here, so that `zimage --help` needs no Pillow: take names from `recipe`, `png` and `atomic`.
"""
