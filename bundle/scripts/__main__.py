"""`python -m volumen ...` is `volumen ...`."""

from volumen.cli.main import main
from volumen.cli.running.execution import leave

if __name__ == "__main__":
    leave(main())
