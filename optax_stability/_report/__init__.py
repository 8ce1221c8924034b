"""Pictures of a history, and the report: one HTML page.

May import: ``_core``, ``_diagnosis``; matplotlib only when it draws.
"""
