"""A model as steps see it: its parameters, their layers, and their gradients."""
