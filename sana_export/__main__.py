"""`python -m sana_export`."""

from sana_export.cli import main

if __name__ == "__main__":
    main()
