"""The step in Triton: ``tile`` measures and multiplies elements, ``layers`` updates and decides,
``step`` is the kernel."""
