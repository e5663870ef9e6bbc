"""The model: ordered low-rank layers, their training, and the artifact that is served."""
