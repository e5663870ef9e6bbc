"""Networks that the recipes train."""
