"""The small trained model that comes with the package: what `memjax bank` reads and asks with when none is named.

`experiments/packaged_model.py` makes it, and its record says what it was trained on and what it finds.
"""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parents[1] / "packaged"
"""Its folder, as `memjax.lm.files.load_model` takes it."""
