"""Draw run.json: one self-contained page and its Markdown twin."""
