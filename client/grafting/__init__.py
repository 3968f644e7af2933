"""FLEx's personal experts: which one, its forward pass, its file."""
