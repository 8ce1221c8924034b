"""The doctor: a command that reads the log of any trainer and says what is wrong.

May import: ``_core``, ``_diagnosis``, ``_report``. Matplotlib and TensorBoard are
imported when they are needed.
"""
