"""Programs behind the figures: each writes a record that says what ran, on what, and what came out."""
