"""What the server computes: pure functions over named arrays. No Flower, no torch, no files, no clock."""
