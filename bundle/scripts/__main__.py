"""`python -m volumen ...` is `volumen ...`."""

from volumen.cli.execution import leave
from volumen.cli.main import main

if __name__ == "__main__":
    leave(main())
