"""`python -m volumen.phantom` writes a phantom data folder."""

from volumen.phantom.volume import main

if __name__ == "__main__":
    raise SystemExit(main())
