"""What we claim, as commands: each writes a file in results/, and ``render`` puts the tables into README.md."""
