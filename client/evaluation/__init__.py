"""What a site's models are worth, in numbers."""
