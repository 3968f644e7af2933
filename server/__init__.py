"""What happens at the coordinator: rounds, run folder, command line."""
