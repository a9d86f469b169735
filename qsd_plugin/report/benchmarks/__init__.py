"""One module per benchmark, each with a ``run(...)`` that returns the figures as a JSON-ready dictionary."""
