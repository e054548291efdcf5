"""Training of small Z-Image models, and the world of drawn scenes in which they are trained and measured."""
