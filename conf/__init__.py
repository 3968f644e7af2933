"""The settings of a run: YAML files here, their types in schema.py, one function to read them in compose.py."""
