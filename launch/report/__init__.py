"""The report of a run: tables, pictures and pages, from what the stages wrote down."""
