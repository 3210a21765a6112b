"""What happens before a run starts."""
