"""The doctor: a command that reads the log of any trainer and says what is wrong.

May import: ``_diagnosis``, ``_report``; matplotlib and TensorBoard only when needed.
"""
