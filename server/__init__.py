"""The HTTP service: which point answers which request, and the engine that runs it. Never imports torch."""
