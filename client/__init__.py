"""What happens at a site. torch lives here."""
