"""Several workers behind one port: processes that serve, and the supervisor that keeps them."""
