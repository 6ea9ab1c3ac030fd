"""`python -m volumen.phantom` writes a phantom data folder."""

from volumen.phantom.volume import main

raise SystemExit(main())
