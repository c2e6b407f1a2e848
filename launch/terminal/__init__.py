"""Terminal output of every verb: the console, tables that fit it, and the boundary that turns errors into messages."""
