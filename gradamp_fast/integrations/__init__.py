"""Training stacks, one module each; importing this package imports none of them."""
