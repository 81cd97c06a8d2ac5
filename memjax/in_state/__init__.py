"""The memory is a bounded state, rewritten at every token: it fades, and does not grow with the input."""
