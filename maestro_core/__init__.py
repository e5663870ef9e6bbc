"""The model: ordered low-rank layers, their training, and the torch-free contract with the server."""
