"""The memory is a bank outside the window, searched and read back: it grows over devices, host and disk."""
