"""`python -m memjax` is `memjax`."""

from memjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
