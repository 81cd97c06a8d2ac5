"""Programs behind the figures: each writes a record that says what ran, on what, and what came out."""

from pathlib import Path

RECORDS = Path(__file__).parent / "records"
