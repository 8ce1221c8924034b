"""The command line: ``python benchmarks/early_warning``."""

import sys
from pathlib import Path


def main() -> None:
    """Runs both studies."""
    from reporting import run_suite

    import early_warning

    run_suite(
        "early_warning",
        early_warning.__doc__,
        early_warning.make_report,
        early_warning.tables,
    )


if __name__ == "__main__":
    # Python looks for modules in the folder it is given; they are in the one above.
    sys.path[0] = str(Path(__file__).parents[1])
    main()
