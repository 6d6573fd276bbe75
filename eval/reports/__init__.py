"""Reports of an evaluation: Markdown, HTML, JSON and plots."""
