"""The HTML report: its pages, pictures and templates."""
