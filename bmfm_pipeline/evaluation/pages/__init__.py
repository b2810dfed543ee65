"""Pages for people: what evaluations and runs found, as self-contained HTML, markdown and figures."""
