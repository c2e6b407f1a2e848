"""The report of a run: tables, pictures and pages, from the stages' records."""
