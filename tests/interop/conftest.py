"""The lines of the pages import packages that need not be there: they hold no tests."""

collect_ignore_glob = ["*_run.py", "*_lines.py", "*_model.py"]
