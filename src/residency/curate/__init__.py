"""Choose, weigh and grow the rows a specialist learns from (rows → rows)."""
