"""The memory is the exact keys and values of a window: eidetic, and bounded by a stated capacity."""
