"""``python -m optax_stability``: the doctor."""

import sys

from optax_stability._doctor._command import main

if __name__ == "__main__":
    sys.exit(main())
