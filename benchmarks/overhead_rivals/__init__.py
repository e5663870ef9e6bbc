"""Other servers with the same model, each a program for a Python that has that server."""
