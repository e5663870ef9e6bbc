"""The HTTP service and the engine behind it. Never imports torch."""
