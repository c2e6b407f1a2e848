"""What every verb says and how it ends: the console, tables that fit it, and the boundary that turns errors into messages."""
