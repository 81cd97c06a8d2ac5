"""Measuring: what `memjax bench` runs. `ops` checks and times the ops of pallas_kernels, beside named peers."""
