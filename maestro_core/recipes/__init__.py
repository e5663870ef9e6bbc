"""One short file per recipe: data, network, schedule."""
