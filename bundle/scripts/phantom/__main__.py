"""`python -m volumen.phantom` writes a phantom data folder."""

from volumen.phantom.command import main

if __name__ == "__main__":
    raise SystemExit(main())
